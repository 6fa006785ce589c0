"""Files of a source, whether they stand on this machine or in an object store (`s3://bucket/…`).

Of a store a folder is listed at once, a file is read by ranges of bytes, and a tar once from its beginning to its end,
for its headers. What the store does not give, after all retries, ends the work (`cache.CacheUnreachableError`): no
image is taken for unusable because a line was cut.
"""

import os
import stat
from collections.abc import Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import IO, NamedTuple, cast

from cache import RemotePath, is_remote
from stages.files.regular import check_regular


class FileStat(NamedTuple):
    """What is known of a file without reading it.

    Attributes:
        size: bytes.
        mtime_ns: when it was written.
        is_regular: whether it is neither a folder nor a pipe nor a device.
    """

    size: int
    mtime_ns: int
    is_regular: bool = True


def absolute(path: str) -> str:
    """The path wherever this process stands; a URL is that already."""
    return path.rstrip("/") if is_remote(path) else os.path.abspath(path)


def file_stat(path: str) -> FileStat:
    """What is known of a file.

    Raises:
        OSError: it is not there, or cannot be looked at.
    """
    if is_remote(path):
        found = RemotePath(path).stat()
        return FileStat(found.st_size, found.st_mtime_ns)
    now = os.stat(path)
    return FileStat(now.st_size, now.st_mtime_ns, stat.S_ISREG(now.st_mode))


def open_file(path: str) -> AbstractContextManager[IO[bytes]]:
    """A file to read from.

    Raises:
        OSError: it is not there, or cannot be opened; it is a pipe or a device, which may never end.
    """
    if is_remote(path):
        return cast(AbstractContextManager[IO[bytes]], RemotePath(path).open())
    check_regular(path)
    return open(path, "rb")


def read_part(path: str, start: int, n_bytes: int) -> bytes:
    """Some bytes of a file, fewer where it ends before; all that follow where ``n_bytes`` is -1.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    if is_remote(path):
        end = RemotePath(path).stat().st_size if n_bytes < 0 else start + n_bytes
        return RemotePath(path).read_range(start, end) if end > start else b""
    check_regular(path)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(n_bytes)


def is_there(path: str) -> bool:
    """Whether there is a file or a folder."""
    return RemotePath(path).exists() if is_remote(path) else os.path.exists(path)


def is_folder(path: str) -> bool:
    """Whether it is a folder; of a store, whether something lies below it."""
    return RemotePath(path).is_dir() if is_remote(path) else os.path.isdir(path)


def is_regular(path: str) -> bool:
    """Whether it is a file."""
    return RemotePath(path).is_file() if is_remote(path) else os.path.isfile(path)


def files_below(url: str) -> dict[str, FileStat]:
    """All objects below a URL by their names from there on; what stands for an empty folder is none."""
    found = RemotePath(url).walk().items()
    return {name: FileStat(now.st_size, now.st_mtime_ns) for name, now in found if not name.endswith("/")}


def matches_below(url: str, pattern: str) -> list[str]:
    """Names below a URL that match a pattern, part by part: `*` does not match a slash."""
    parts = pattern.split("/")

    def is_match(name: Sequence[str]) -> bool:
        return len(name) == len(parts) and all(map(fnmatchcase, name, parts))

    return sorted(name for name in files_below(url) if is_match(name.split("/")))
