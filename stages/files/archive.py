"""Sealed archives: zip files without compression whose every byte is known before one is believed.

::

    manifest.json     first: format, version; name, size, SHA-256 and CRC-32 of every other entry; a digest of its own
    …                 the entries, in the manifest's order
    directory         as zip has it, so that any tool lists and unpacks the file

No time, no order of a folder and no system stands in it: the same entries give the same bytes. What is opened is read
by the manifest alone: from it follows each byte of the file that is not an entry's own, and all are compared. So there
is no path to follow, nothing to unpack, no entry twice and no size that lies, and a flipped bit is found anywhere.
"""

import hashlib
import json
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from cache.files import arriving, is_whole, seal, sync_folder, write_all
from cache.fingerprint import canonical_json, pieces_sha256
from stages.errors import InputError

MANIFEST = "manifest.json"

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,40}\.(json|safetensors|onnx)")
_LARGEST_MANIFEST = 1 << 20
_MOST_ENTRIES = 64
_BLOCK = 1 << 20
_BEGIN = b"PK\3\4"

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
_DATE = 0x21  # 1980-01-01, the first day that zip knows
_FULL = 0xFFFFFFFF  # stands for what does not fit 32 bits
_FULL16 = 0xFFFF


@dataclass(frozen=True)
class Entry:
    """What the manifest says of an entry."""

    name: str
    size: int
    sha256: str
    crc32: int

    @classmethod
    def of(cls, name: str, data: bytes) -> Self:
        """Of bytes."""
        return cls(name, len(data), hashlib.sha256(data).hexdigest(), zlib.crc32(data))


def write_archive(path: Path, kind: str, version: int, entries: Mapping[str, bytes]) -> None:
    """Write a sealed archive; it arrives whole or not at all.

    Args:
        path: of the file.
        kind: what it is, for whoever opens another.
        version: of its contents.
        entries: bytes by name, in order.
    """
    about = [Entry.of(name, data) for name, data in entries.items()]
    assert all(_NAME.fullmatch(entry.name) and entry.name != MANIFEST for entry in about)
    lines = b",\n".join(canonical_json(vars(entry)) for entry in about)
    rest = b'"format": %s,\n"version": %d,\n"entries": [\n%s\n]\n}\n' % (canonical_json(kind), version, lines)
    manifest = seal(rest)
    layout = _Layout((Entry.of(MANIFEST, manifest), *about))
    with arriving(path) as file:
        for header, data in zip(layout.headers, (manifest, *entries.values()), strict=True):
            write_all(file, header)
            write_all(file, data)
        write_all(file, layout.directory)
        os.fsync(file.fileno())
    sync_folder(path.parent)


def is_zip(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins or ends as a zip file does: one that is damaged on one side is known by the other."""
    if not os.path.isfile(path):  # whatever else may be opened waits for somebody who writes
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(_BEGIN)) == _BEGIN or zipfile.is_zipfile(file)
    except OSError:
        return False


class SealedArchive:
    """An archive that `write_archive` wrote, every byte of it compared when it is opened.

    Args:
        path: of the file.
        kind: what it has to be.
        version: that is known here.
        compared: whether its bytes are, or its manifest and its size alone: a glance, before work.

    Raises:
        InputError: another file, another version, or a byte that is not as it was written.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, version: int, compared: bool = True) -> None:
        self.path = Path(path)
        self._kind = kind
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode) and not self.path.is_dir():
                raise self._another("it is no file")  # which might wait for somebody who writes
            with open(self.path, "rb") as file:
                self._layout = _Layout(self._entries(file, version))
                self._check_size(file)
                if compared:
                    self._check(file)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._layout.places

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which has those of all else: equal archives alone have equal ones."""
        return self._layout.entries[0].sha256

    @property
    def names(self) -> tuple[str, ...]:
        """Of the entries, without the manifest."""
        return tuple(entry.name for entry in self._layout.entries[1:])

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self._layout.size

    def read(self, name: str) -> bytes:
        """Bytes of an entry.

        Raises:
            InputError: there is no such entry, or the file was written to since it was opened.
        """
        if name not in self:
            raise InputError(f"{self.path}: holds no {name}")
        offset, entry = self._layout.places[name]
        with open(self.path, "rb") as file:
            file.seek(offset)
            data = file.read(entry.size)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise InputError(f"{self.path}: was written to while it was read")
        return data

    def read_json(self, name: str) -> object:
        """An entry of JSON.

        Raises:
            InputError: as `read`, and where it is no JSON.
        """
        return self._parsed(self.read(name), name)

    def read_tensors(self, name: str) -> dict[str, NDArray[np.generic]]:
        """An entry of safetensors.

        Raises:
            InputError: as `read`, and where it is none, or holds what numpy has no type for.
        """
        try:
            return dict(load(self.read(name)))
        except (SafetensorError, TypeError, ValueError, KeyError) as error:
            raise InputError(f"{self.path}: {name} does not hold tensors: {str(error)[:120]}") from error

    def _parsed(self, data: bytes, name: str) -> object:
        try:
            return json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}: {name} is not JSON: {str(error)[:120]}") from error

    def _entries(self, file: BinaryIO, version: int) -> tuple[Entry, ...]:
        """What the manifest says, itself first."""
        size = os.fstat(file.fileno()).st_size
        head = file.read(_LOCAL.size)
        if not head:
            raise self._another("it is empty")
        if not head.startswith(_BEGIN):
            raise self._another("it does not begin as one")
        name = file.read(len(MANIFEST)).decode("latin-1")
        if not MANIFEST.startswith(name):
            raise self._another("it is a zip file of something else")
        if name != MANIFEST:
            raise self._damaged(f"truncated: {size} bytes")
        length = _LOCAL.unpack(head)[7]
        if length > min(_LARGEST_MANIFEST, size):
            raise self._damaged("its manifest does not end")
        data = file.read(length)
        if not is_whole(data):
            raise self._damaged("its manifest is not as it was written")
        body = self._parsed(data, MANIFEST)
        if not isinstance(body, dict) or body.get("format") != self._kind:
            raise self._another("it holds something else")
        if type(said := body.get("version")) is not int or said != version:
            what = f"is of version {ascii(said)[:20]}, {version} is read here"
            raise InputError(f"{self.path}: {what}: take the release that wrote it")
        entries = body.get("entries")
        if body.keys() != {"digest", "format", "version", "entries"} or not isinstance(entries, list):
            raise self._damaged("its manifest says something else than what is in it")
        if len(entries) > _MOST_ENTRIES:
            raise self._damaged(f"its manifest names {len(entries)} entries")
        found = [Entry.of(MANIFEST, data), *(self._entry(each, size) for each in entries)]
        if len({entry.name for entry in found}) < len(found):
            raise self._damaged("its manifest names an entry twice")
        return tuple(found)

    def _entry(self, body: object, size: int) -> Entry:
        """One line of the manifest."""
        if isinstance(body, dict) and body.keys() == {"name", "size", "sha256", "crc32"}:
            entry = Entry(**body)
            texts = isinstance(entry.name, str) and isinstance(entry.sha256, str)
            numbers = type(entry.size) is int and type(entry.crc32) is int
            if texts and numbers and _NAME.fullmatch(entry.name) and 0 <= entry.crc32 <= _FULL:
                if 0 <= entry.size <= size:
                    return entry
                raise self._damaged(f"{entry.name} of {entry.size} bytes is not in a file of {size}")
        raise self._damaged("its manifest has a line that is no entry")

    def _check_size(self, file: BinaryIO) -> None:
        written, size = self._layout.size, os.fstat(file.fileno()).st_size
        if size != written:
            what = "truncated" if size < written else "longer than it was"
            raise self._damaged(f"{what}: {size} bytes, {written} were written")

    def _check(self, file: BinaryIO) -> None:
        """Compare every byte of the file with what the manifest says of it."""
        layout = self._layout
        file.seek(0)
        for entry, header in zip(layout.entries, layout.headers, strict=True):
            if file.read(len(header)) != header:
                raise self._damaged(f"the header of {entry.name} is not as it was written")
            if pieces_sha256(_blocks(file, entry.size)) != entry.sha256:
                raise self._damaged(f"{entry.name} is not as it was written")
        if file.read() != layout.directory:
            raise self._damaged("its directory is not as it was written")

    def _another(self, why: str) -> InputError:
        return InputError(f"{self.path}: is no {self._kind} as `export` writes it: {why}")

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self.path}: damaged, or changed: {what}")


class _Layout:
    """Where everything stands in a file of these entries, and each byte of it that is not an entry's own."""

    def __init__(self, entries: tuple[Entry, ...]) -> None:
        self.entries = entries
        self.headers: list[bytes] = []
        self.places: dict[str, tuple[int, Entry]] = {}
        offsets, at = [], 0
        for entry in entries:
            offsets.append(at)
            self.headers.append(_local_header(entry))
            self.places[entry.name] = (at + len(self.headers[-1]), entry)
            at += len(self.headers[-1]) + entry.size
        self._start = at
        self._listed = b"".join(map(_central_header, entries, offsets))

    @cached_property
    def directory(self) -> bytes:
        """The end of the file."""
        n, length, start = len(self.entries), len(self._listed), self._start
        end = b""
        if start > _FULL:
            end += _END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, n, n, length, start)
            end += _LOCATOR.pack(b"PK\6\7", 0, start + length, 1)
        end += _END.pack(b"PK\5\6", 0, 0, n, n, length, min(start, _FULL), 0)
        return self._listed + end

    @property
    def size(self) -> int:
        """Of the file."""
        return self._start + len(self.directory)


def _local_header(entry: Entry) -> bytes:
    name, large = entry.name.encode(), entry.size >= _FULL
    extra = struct.pack("<2H2Q", 1, 16, entry.size, entry.size) if large else b""
    size = _FULL if large else entry.size
    fields = (45 if large else 20, 0, 0, 0, _DATE, entry.crc32, size, size, len(name), len(extra))
    return _LOCAL.pack(_BEGIN, *fields) + name + extra


def _central_header(entry: Entry, offset: int) -> bytes:
    name = entry.name.encode()
    sizes = [entry.size, entry.size] if entry.size >= _FULL else []
    wide = sizes + ([offset] if offset >= _FULL else [])
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    needed, size = 45 if wide else 20, min(entry.size, _FULL)
    fields = (needed, needed, 0, 0, 0, _DATE, entry.crc32, size, size, len(name), len(extra), 0, 0, 0, 0)
    return _CENTRAL.pack(b"PK\1\2", *fields, min(offset, _FULL)) + name + extra


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (block := file.read(min(size, _BLOCK))):
        size -= len(block)
        yield block


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    body = dict(pairs)
    if len(body) < len(pairs):
        raise ValueError("a key stands twice")
    return body


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no number of JSON")
