"""What a tar holds: the headers of its members, read once. After that every file of it is a range of bytes.

The standard library reads one header: v7, ustar, pax, GNU with long names, sparse files of every format. Which headers
there are is settled here, since the library takes a damaged one, an early end, and the end mark of a tar that another
one follows, all for the end.
"""

import posixpath
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from stages.errors import InputError
from stages.inputs.images.decode import ImageError
from stages.inputs.images.kind import HEAD_BYTES, is_hidden, is_image
from stages.inputs.images.opening import file_stat, open_file
from stages.inputs.images.packed import refuse_packed
from stages.inputs.images.table import MAX_FILE_BYTES, Content, FileRange, Unusable, storable

_CHUNK = 1 << 20  # bytes; read at once where nothing but zeros is expected
_ZEROS = bytes(tarfile.BLOCKSIZE)
_FOLDERS = (tarfile.DIRTYPE, b"D")  # D: GNU tar's list of a folder, of --incremental
_LABEL, _CONTINUED = b"V", b"M"  # GNU tar's, of an archive in several volumes
_LIBRARY_ERRORS = (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError)


class Link(NamedTuple):
    """A member that is another name of something."""

    target: str  # symbolic: as it stands there; hard: the name of a member
    hard: bool


class SparseRange(NamedTuple):
    """A file of a tar without its holes, which are zeros."""

    size: int
    parts: tuple[tuple[int, FileRange], ...]  # where in the file, and what stands there

    def read(self) -> bytes:
        """Read the file, holes filled.

        Raises:
            ImageError: As `FileRange.read`.
        """
        if self.size > MAX_FILE_BYTES:
            raise ImageError(f"too large: more than {MAX_FILE_BYTES >> 20} MiB")
        data = bytearray(self.size)
        for start, part in self.parts:
            data[start : start + (part.size or 0)] = part.read()
        return bytes(data)


@dataclass
class Members:
    """Members of a tar by name, as `plain_name` has it; of two with one name the later, as when the tar is unpacked."""

    mtime_ns: int = 0
    entries: dict[str, Content | Link] = field(default_factory=dict)  # regular files and links, in their order
    images: set[str] = field(
        default_factory=set
    )  # those of them, links left out, that are images by name or first bytes
    hidden: set[str] = field(default_factory=set)  # those of them that are not looked at
    folders: set[str] = field(default_factory=set)
    links: dict[str, None] = field(default_factory=dict)  # names of those of them that are links, in their order
    special: list[str] = field(default_factory=list)  # names of pipes and devices
    repeated: list[str] = field(default_factory=list)  # names of members that a later one replaces


def read_members(path: str) -> Members:
    """Read the headers of a tar, and the first bytes of files whose names do not say that they are images.

    Tars joined by `cat` are one. A tar ends in a block of zeros at least: without any, nobody knows what is missing.

    Raises:
        InputError: Not an uncompressed tar, or a damaged one; the message names the member at which it is.
    """
    members = Members()
    try:
        now = file_stat(path)
        if not now.is_regular:  # opening a pipe would wait for ever
            raise InputError(f"{path}: not a regular file; give a tar")
        with open_file(path) as file:
            members.mtime_ns = now.mtime_ns
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header, encoding="utf-8") as tar:
                _read_headers(path, tar, file, now.size, members)
    except _LIBRARY_ERRORS as error:
        refuse_packed(path)
        raise InputError(f"{path}: not a tar, or damaged where it begins: {error}; copy or make it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return members


def plain_name(name: str) -> str:
    """Name of a member as an id: no more than a name, wherever it would lead.

    >>> plain_name("./cat//1.jpg"), plain_name("/cat/1.jpg"), plain_name("../cat/1.jpg")
    ('cat/1.jpg', 'cat/1.jpg', '../cat/1.jpg')
    """
    return posixpath.normpath(name).lstrip("/")


class _Header(tarfile.TarInfo):
    """A header as the library reads it; that of a plain file, of which there may be a million, in a fifth of the time.

    GNU tar may have times (of --incremental) where ustar has the beginning of a long name: then they are no name here.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        return cls._plain(buf, encoding, errors) or cls._any(buf, encoding, errors)

    @classmethod
    def _plain(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header | None":
        """Header of a regular file with name and size as they always were; None where the library has to look."""
        if len(buf) != tarfile.BLOCKSIZE or buf[257:262] != b"ustar":
            return None
        if buf[156:157] not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            return None
        try:
            size, checksum = _octal(buf[124:136]), _octal(buf[148:156])
        except ValueError:
            return None
        name = _text(buf[:100])
        if checksum != sum(buf) - sum(buf[148:156]) + 8 * ord(" ") or size < 0 or name.endswith(b"/"):
            return None
        if buf[345] and buf[257:265] != tarfile.GNU_MAGIC:
            name = _text(buf[345:500]) + b"/" + name
        header = cls(name.decode(encoding, errors))
        header.size, header.type = size, bytes(buf[156:157])
        return header

    @classmethod
    def _any(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if buf[257:265] == tarfile.GNU_MAGIC and buf[345]:
            header.name = _text(buf[:100]).decode(encoding, errors)
        return header


def _text(field: bytes | bytearray) -> bytes:
    return bytes(field).partition(b"\0")[0]


def _octal(field: bytes | bytearray) -> int:
    return int(_text(field).strip() or b"0", 8)


def _read_headers(path: str, tar: tarfile.TarFile, file: IO[bytes], size: int, members: Members) -> None:
    last, ended = "", False
    tar.offset, tar.pax_headers = 0, {}  # the library has read the first
    while tar.offset < size:
        start = tar.offset
        file.seek(start)
        if file.read(tarfile.BLOCKSIZE) == _ZEROS:
            tar.offset, tar.pax_headers, ended = _end_of_zeros(file, start), {}, True
            continue
        file.seek(start)
        try:
            member = _Header.fromtarfile(tar)
        except _LIBRARY_ERRORS as error:
            cut = size - start < tarfile.BLOCKSIZE or file.tell() >= max(size, start + tarfile.BLOCKSIZE + 1)
            what = "it ends within the header" if cut else f"at byte {start} is no header of a member"
            raise _damaged(path, f"{what}, {_after(last, ended)}") from error
        last, ended = storable(plain_name(member.name)), False
        if tar.offset <= start or member.size < 0:
            raise _damaged(path, f"the size of {last!r} is negative")
        if tar.offset > size:
            raise _damaged(path, f"it ends within {last!r}")
        _add(members, path, member, tar.offset, file)
    if not ended:
        raise _damaged(path, f"it has no end mark, so more may be missing {_after(last, ended)}")


def _damaged(path: str, what: str) -> InputError:
    return InputError(f"{path}: damaged: {what}; copy or make it again")


def _after(last: str, ended: bool) -> str:
    if not last:
        return "where it begins"
    return f"after the end mark behind {last!r}" if ended else f"after {last!r}"


def _end_of_zeros(file: IO[bytes], start: int) -> int:
    """Where the first block begins that is not all zeros."""
    file.seek(start)
    while chunk := file.read(_CHUNK):
        if rest := chunk.lstrip(b"\0"):
            return start + (len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        start += len(chunk)
    return start


def _add(members: Members, path: str, member: tarfile.TarInfo, end: int, file: IO[bytes]) -> None:
    name = plain_name(member.name)
    if member.type in _FOLDERS:
        members.folders.add(name)
        return
    if member.type == _LABEL:
        return
    if member.ischr() or member.isblk() or member.isfifo():
        members.special.append(name)
        return
    entry: Content | Link
    if member.issym():
        entry = Link(member.linkname, hard=False)
    elif member.islnk():
        target = plain_name(member.linkname)
        if target == name and name in members.entries:  # GNU tar was given a file twice
            return
        entry = members.entries.get(target) or Link(target, hard=True)
    elif member.type == _CONTINUED:
        entry = Unusable("begins in another volume of the tar")
    else:  # a type that nobody knows is a regular file, says POSIX
        entry = _content(path, member, end)
    if members.entries.pop(name, None) is not None:
        members.repeated.append(name)
        members.images.discard(name)
        members.links.pop(name, None)
    members.entries[name] = entry
    if isinstance(entry, Link):
        members.links[name] = None
    if is_hidden(name):
        members.hidden.add(name)
    elif not isinstance(entry, Link) and is_image(name, lambda: first_bytes(entry, file)):
        members.images.add(name)


def _content(path: str, member: tarfile.TarInfo, end: int) -> Content:
    """Where the bytes of a file are; those of a member end at `end`."""
    if member.sparse is None:
        return FileRange(path, member.offset_data, member.size)
    parts, offset = list[tuple[int, FileRange]](), member.offset_data
    pieces: Iterable[tuple[int, int]] = member.sparse  # type: ignore[assignment] # typed as bytes
    for start, size in pieces:
        if start < 0 or size < 0 or start + size > member.size or offset + size > end:
            return Unusable("damaged: its holes are where none can be")
        if size:
            parts.append((start, FileRange(path, offset, size)))
        offset += size
    return SparseRange(member.size, tuple(parts))


def first_bytes(content: Content, file: IO[bytes]) -> bytes:
    """The first bytes of a file of a tar, which is open, as far as no hole is among them."""
    if isinstance(content, SparseRange):
        content = next((part for start, part in content.parts if start == 0), content)
    if not isinstance(content, FileRange):
        return b""
    file.seek(content.offset)
    return file.read(min(content.size or 0, HEAD_BYTES))
