"""How files arrive and how JSON documents prove themselves.

A file arrives whole or not at all: it is written under a temporary name in its own folder, flushed to the disk,
renamed, and then the folder is flushed. A kill or a power cut leaves the old file, or the new one, or a ``*.tmp``. An
object of a store (`cache.remote`) arrives whole as it is put.

A document is JSON whose first line is the SHA-256 of all bytes after that line, so any bit flip is found. A cache's are
versioned: they say what schema they are of, and no other is read::

    {"digest": "9f86d081…",
    "schema": 1,
    …
    }
"""

import errno
import io
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cache.errors import CacheDamagedError, CacheError, CacheInvalidError, CacheNotFoundError
from cache.fingerprint import canonical_json, sha256
from cache.remote import Place, RemotePath, RemoteStat

SCHEMA = 1  # of every versioned document; a change of meaning takes the next number
TEMPORARY = ".tmp"
_LEFT_BY_SYSTEMS = ("thumbs.db", "desktop.ini")
_DIGEST = re.compile(rb'\{"digest": "([0-9a-f]{64})",\n')


@contextmanager
def disk_errors(path: Place) -> Iterator[None]:
    """Turn an OSError of a write (disk full, no permission) into a CacheError that says how to go on."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CacheError(
            f"{path}: cannot be written: {reason}; what was finished is kept, "
            "the same command goes on where it was once that is put right"
        ) from error


def sync_folder(path: Place) -> None:
    """Make renames and removals inside a folder survive a power cut; a store has them survive by itself."""
    if isinstance(path, RemotePath):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(file: io.RawIOBase, data: bytes | memoryview) -> None:
    """Write all of the data; a raw write may take fewer bytes than it was given."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


@contextmanager
def arriving(path: Path) -> Iterator[io.RawIOBase]:
    """A file to write to that gets its name when the context ends, and is gone where that ends in an exception.

    Whoever writes it also flushes it (``os.fsync``), and the folder then or later (``sync_folder``).

    Raises:
        CacheError: when the disk refuses (full, read-only); nothing is left behind.
    """
    # Not tempfile: its files are for their owner alone, and caches stand on shared disks.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    with disk_errors(path):
        if path.exists() and not path.is_file():  # a device, say, which a rename would put a file in the place of
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        try:
            with open(temporary, "xb", buffering=0) as file:
                yield file
            os.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def write_file(path: Place, data: bytes | memoryview) -> None:
    """Write a file that arrives whole or not at all, and is on the disk when this returns.

    Raises:
        CacheError: when the disk refuses (full, read-only); nothing is left behind.
    """
    if isinstance(path, RemotePath):
        path.write_bytes(data)
        return
    with arriving(path) as file:
        write_all(file, data)
        os.fsync(file.fileno())
    with disk_errors(path):
        sync_folder(path.parent)


def write_versioned(path: Place, body: Mapping[str, Any]) -> None:
    """Write a JSON document with digest and schema; lists of objects get a line per object, for eyes and for diff."""
    lines = []
    for key, value in {"schema": SCHEMA, **body}.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = b"[\n" + b",\n".join(map(canonical_json, value)) + b"\n]"
        else:
            text = canonical_json(value)
        lines.append(canonical_json(key) + b": " + text)
    write_file(path, seal(b",\n".join(lines) + b"\n}\n"))


def seal(rest: bytes) -> bytes:
    """A JSON object that begins with the digest of all that follows; `rest` is the object without its ``{``."""
    return b'{"digest": "%s",\n%s' % (sha256(rest).encode(), rest)


def is_whole(data: bytes) -> bool:
    """Whether bytes are a document as `seal` made it."""
    head = _DIGEST.match(data)
    return head is not None and sha256(memoryview(data)[head.end() :]) == head[1].decode()


def is_stray(name: str) -> bool:
    """Whether a file is of the kind that systems leave in any folder: Finder, Explorer, NFS; and all hidden ones.

    >>> [name for name in (".DS_Store", "._a", ".nfs0000a1", "Thumbs.db", "shard-00000.h5") if not is_stray(name)]
    ['shard-00000.h5']
    """
    return name.startswith(".") or name.casefold() in _LEFT_BY_SYSTEMS


def names_in(folder: Place) -> set[str]:
    """Names of all that lies directly in a folder; none where there is no folder."""
    try:
        return {file.name for file in folder.iterdir()}
    except FileNotFoundError:
        return set()


def stats_of(folder: Place, names: Iterable[str]) -> Mapping[str, os.stat_result | RemoteStat]:
    """Sizes and times of those of some files that are there, by name; of a store in one question."""
    if isinstance(folder, RemotePath):
        return folder.stats()
    found = {}
    for name in names:
        with suppress(FileNotFoundError):
            found[name] = (folder / name).stat()
    return found


def written_since(file: os.stat_result | RemoteStat, document: os.stat_result | RemoteStat | None) -> bool:
    """Whether a file may have been written to, moved or replaced since the document that has its digest was written.

    Told by their times, without reading: the time of change (ctime) is the kernel's, so a write that puts size and
    mtime back is seen as well. Bytes that a disk loses are not; only reading all of them finds those.

    Args:
        file: its sizes and times.
        document: those of the document; None where it is not there.
    """
    return document is None or max(file.st_mtime_ns, file.st_ctime_ns) >= document.st_mtime_ns


def written_after(path: Path, document: Path) -> bool:
    """The same by their paths.

    Raises:
        OSError: one of them is not there.
    """
    return written_since(path.stat(), document.stat())


def touch(path: Place) -> None:
    """Date a file anew.

    Raises:
        OSError: it is not there, or somebody else's.
        CacheUnreachableError: its store refuses.
    """
    if isinstance(path, RemotePath):
        path.touch()
    else:
        os.utime(path)


def read_versioned(path: Place) -> dict[str, Any]:
    """Read what `write_versioned` wrote, without its digest and schema.

    Raises:
        CacheNotFoundError: there is no such file.
        CacheDamagedError: its bytes do not match its digest, or the disk does not give them.
        CacheInvalidError: it is no document of ours, or of another schema.
        CacheError: it may not be read.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise CacheNotFoundError(f"{path}: no such file") from None
    except PermissionError:
        raise CacheError(f"{path}: cannot be read: permission denied") from None
    except OSError as error:
        raise CacheDamagedError(f"{path}: cannot be read: {error.strerror}") from error
    if _DIGEST.match(data) is None:
        raise CacheInvalidError(f"{path}: does not begin with a digest; not written by this project, or damaged")
    if not is_whole(data):
        raise CacheDamagedError(f"{path}: its bytes do not match its own digest: damaged, or edited by hand")
    try:
        body = json.loads(data, object_pairs_hook=_unique_keys)
        canonical_json(body)  # no NaN, no half characters: whatever was read can be written
    except CacheInvalidError as error:
        raise CacheInvalidError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CacheInvalidError(f"{path}: not JSON: {error}") from error
    del body["digest"]
    if (schema := body.pop("schema", None)) != SCHEMA:
        raise CacheInvalidError(
            f"{path}: schema {schema!r}, this version reads {SCHEMA}; use the version that wrote it"
        )
    return dict(body)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) < len(pairs):
        raise ValueError(f"a key stands twice among {[key for key, _ in pairs]!r:.200}")
    return body


def check_fields(body: Any, kinds: Mapping[str, type], what: str) -> dict[str, Any]:
    """The body, if it is an object with exactly these keys and kinds of value; ``bool`` is not an ``int`` here.

    Raises:
        CacheInvalidError: naming the first key that is unknown, missing or of the wrong kind.
    """
    if not isinstance(body, dict):
        raise CacheInvalidError(f"{what}: {type(body).__name__} where an object must stand")
    if body.keys() != kinds.keys():
        unknown, missing = sorted(body.keys() - kinds.keys()), sorted(kinds.keys() - body.keys())
        raise CacheInvalidError(f"{what}: unknown keys {unknown}, missing keys {missing}")
    for key, kind in kinds.items():
        if type(body[key]) is not kind:
            raise CacheInvalidError(f"{what}: {key} is {body[key]!r:.60}, must be {kind.__name__}")
    return body


def check(condition: bool, message: str) -> None:
    """Raise CacheInvalidError with the message unless the condition holds."""
    if not condition:
        raise CacheInvalidError(message)
