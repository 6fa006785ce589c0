"""RemotePath: an object of a store, by those operations of `pathlib.Path` that a cache needs. The only door to fsspec.

``s3://bucket/prefix/name`` is an object, or all that lies below it is a folder: a store has no folders of its own. What
it has, and what a cache stands on: an object arrives whole or not at all, whoever reads after that reads it (S3 is
strongly consistent), and of several who create one by a conditional put one alone succeeds.

Endpoint, region and credentials are those of the machine (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, …, or fsspec's own
configuration, `FSSPEC_S3_…`), never part of a path. Requests are tried again by botocore and by s3fs; what then still
fails is a `CacheUnreachableError`, and never damage: nothing is known of what was not read.
"""

import os
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from errno import ENOENT
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from cache.errors import CacheError, CacheInvalidError, CacheUnreachableError

if TYPE_CHECKING:  # it takes a moment, and who has no store need not have it
    import io

    from fsspec import AbstractFileSystem

SCHEME = "s3://"
NO_URL = "not the URL of an object store that is known here; give s3://bucket/prefix"
_PIECE = 16 << 20  # bytes of one request where a whole object is read
_READAHEAD = 1 << 20  # bytes that a file object asks for at once
_CONDITION_FAILED = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")


class RemoteStat(NamedTuple):
    """What a store says of an object; its times are the store's own, of whole seconds, as `os.stat_result` has them."""

    st_size: int
    st_mtime_ns: int

    @property
    def st_ctime_ns(self) -> int:
        """When it was written: nothing of an object can be changed without that."""
        return self.st_mtime_ns

    @property
    def st_mtime(self) -> float:
        """When it was written, in seconds."""
        return self.st_mtime_ns / 1e9


@dataclass(frozen=True, order=True)
class RemotePath:
    """An object or a folder of a store; it may be pickled, and names no machine and no credentials.

    Attributes:
        url: ``s3://bucket`` or ``s3://bucket/some/name``, without a slash at its end.

    Raises:
        CacheInvalidError: no such URL.

    >>> root = RemotePath("s3://bucket/caches/")
    >>> str(root / "train-0123abcd"), (root / "a" / "b.h5").parent.name, root.with_name("c").url
    ('s3://bucket/caches/train-0123abcd', 'a', 's3://bucket/c')
    """

    url: str

    def __post_init__(self) -> None:
        if not self.url.startswith(SCHEME) or self.url.removeprefix(SCHEME)[:1] in ("", "/"):
            raise CacheInvalidError(f"{self.url}: {NO_URL}")
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    @property
    def key(self) -> str:
        """Bucket and name, as fsspec has them."""
        return self.url.removeprefix(SCHEME)

    @property
    def name(self) -> str:
        """The last part."""
        return posixpath.basename(self.key)

    @property
    def suffix(self) -> str:
        """The extension of the name."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> "RemotePath":
        """What it lies in; a bucket lies in itself."""
        return RemotePath(SCHEME + (posixpath.dirname(self.key) or self.key))

    def with_name(self, name: str) -> "RemotePath":
        """Another beside it."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> "RemotePath":
        """Another beside it, of another extension."""
        return self.with_name(self.name.removesuffix(self.suffix) + suffix)

    # -------------------------------------------------------------------------------------------------- what is there

    def stat(self) -> RemoteStat:
        """Size and time of an object.

        Raises:
            FileNotFoundError: there is no such object.
        """
        with self._answers() as store:
            info = store.info(self.key)
        if info["type"] != "file":
            self._missing()
        return _stat(info)

    def exists(self) -> bool:
        """Whether an object has this name, or lies below it."""
        with self._answers() as store:
            return bool(store.exists(self.key))

    def is_file(self) -> bool:
        """Whether an object has this name."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether an object lies below it."""
        return any(True for _ in self._listed())

    def iterdir(self) -> Iterator["RemotePath"]:
        """Objects and folders directly below it, in order of their names; none where there are none."""
        return (RemotePath(SCHEME + info["name"]) for info in self._listed())

    def folders(self) -> list["RemotePath"]:
        """Folders directly below it."""
        return [RemotePath(SCHEME + info["name"]) for info in self._listed() if info["type"] == "directory"]

    def glob(self, pattern: str) -> list["RemotePath"]:
        """Objects directly below it whose names match."""
        return [path for path in self.iterdir() if fnmatchcase(path.name, pattern)]

    def stats(self) -> dict[str, RemoteStat]:
        """Size and time of all objects directly below it, by name; asked for at once."""
        return {posixpath.basename(info["name"]): _stat(info) for info in self._listed() if info["type"] == "file"}

    def walk(self) -> dict[str, RemoteStat]:
        """Size and time of all objects below it, by their names from there on."""
        with self._answers() as store:
            found = store.find(self.key, detail=True)
        start = len(self.key) + 1
        return {name[start:]: _stat(info) for name, info in found.items() if len(name) > start}

    def _listed(self) -> list[dict[str, Any]]:
        with self._answers() as store:
            try:
                found = store.ls(self.key, detail=True)
            except FileNotFoundError:
                return []
        below = f"{self.key}/"  # not the object of this very name, nor what stands for an empty folder
        return [info for info in found if info["name"].startswith(below) and info["name"].strip("/") != self.key]

    # -------------------------------------------------------------------------------------------------------- reading

    def read_bytes(self) -> bytes:
        """All of an object.

        Raises:
            FileNotFoundError: there is no such object.
        """
        with self._answers() as store:
            return bytes(store.cat_file(self.key))

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` (exclusive) of an object, fewer where it ends before.

        Raises:
            FileNotFoundError: there is no such object.
        """
        (data,) = read_ranges([self], [start], [stop])
        return data

    def pieces(self) -> Iterator[bytes]:
        """All of an object, a piece at a time."""
        size = self.stat().st_size
        return (self.read_range(start, min(start + _PIECE, size)) for start in range(0, size, _PIECE))

    @contextmanager
    def open(self) -> Iterator["io.BufferedIOBase"]:
        """An object as a file to read from; what is near to what was read is read along with it."""
        with self._answers() as store, store.open(self.key, "rb", block_size=_READAHEAD) as file:
            yield file

    def fetch(self, to: Path) -> None:
        """Copy an object to a file of this machine."""
        with self._answers() as store:
            store.get_file(self.key, str(to))

    # -------------------------------------------------------------------------------------------------------- writing

    def write_bytes(self, data: bytes | memoryview) -> None:
        """Put an object: it arrives whole or not at all."""
        with self._answers() as store:
            store.pipe_file(self.key, bytes(data))

    def put(self, file: Path) -> None:
        """Put a file of this machine as an object: it arrives whole or not at all."""
        with self._answers() as store:
            store.put_file(str(file), self.key)

    def create(self, data: bytes) -> bool:
        """Put an object unless there is one; of several who do at the same time one alone is told True.

        Args:
            data: which nobody else would put there: an answer may be lost on its way, and is then told by it.

        Raises:
            CacheUnreachableError: the store knows no conditional puts.
        """
        if not self._put_unless_there(data):
            try:
                return self.read_bytes() == data
            except FileNotFoundError:
                return False
        if self._put_unless_there(data):
            raise CacheUnreachableError(
                f"{self}: this store ignores conditions of a put (If-None-Match), so it cannot keep two processes from "
                "one cache: give another store, or a folder"
            )
        return True

    def _put_unless_there(self, data: bytes) -> bool:
        with self._answers() as store:
            try:
                store.pipe_file(self.key, data, mode="create")
            except OSError as error:
                if isinstance(error, FileExistsError) or _code(error) in _CONDITION_FAILED:
                    return False
                raise
        return True

    def touch(self) -> None:
        """Date an object anew, unless somebody writes it at the same time.

        Raises:
            FileNotFoundError: there is no such object.
        """
        with self._answers() as store:
            info, data = store.info(self.key), store.cat_file(self.key)
            store.pipe_file(self.key, data, IfMatch=info["ETag"])

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove an object.

        Raises:
            FileNotFoundError: there is none.
        """
        if not missing_ok and not self.is_file():
            self._missing()
        with self._answers() as store:
            store.rm_file(self.key)

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing: a folder is there as soon as something lies in it."""

    # --------------------------------------------------------------------------------------------------------- errors

    @contextmanager
    def _answers(self) -> Iterator["AbstractFileSystem"]:
        """The store, while it is asked for something; what goes wrong is said in one line."""
        with _one_line(self):
            yield _store_of(self.key.partition("/")[0], os.getpid())

    def _missing(self) -> NoReturn:
        raise FileNotFoundError(ENOENT, os.strerror(ENOENT), self.url)


Place = Path | RemotePath  # where something stands


def is_remote(path: str) -> bool:
    """Whether text names an object of a store, or is meant to."""
    return "://" in path


def place(path: str | os.PathLike[str] | RemotePath) -> Place:
    """Where something stands: a path of this machine, or a URL of a store.

    Raises:
        CacheInvalidError: a URL of another kind.
    """
    if isinstance(path, RemotePath):
        return path
    text = os.fspath(path)
    if not is_remote(text):
        return Path(text)
    found = RemotePath(text)
    if any(part in ("", ".", "..") for part in found.key.split("/")):  # a store takes them for names
        raise CacheInvalidError(f"{text}: {NO_URL}")
    return found


def read_ranges(paths: Sequence[RemotePath], starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
    """Bytes of several objects, asked for side by side; fewer of one that ends before.

    Args:
        paths: of one bucket, one a range.
        starts: first byte of each range.
        stops: where each range ends, exclusive.

    Raises:
        FileNotFoundError: an object is not there.
        CacheUnreachableError: the store did not give them, after all retries.
    """
    if not paths:
        return []
    with paths[0]._answers() as store:
        found: list[Any] = store.cat_ranges([path.key for path in paths], list(starts), list(stops), on_error="return")
    for index, data in enumerate(found):
        if isinstance(data, BaseException):
            if _code(data) in ("InvalidRange", "416"):  # it begins after the end
                found[index] = b""
                continue
            with _one_line(paths[index]):
                raise data
    return found


@lru_cache(maxsize=8)
def _store_of(bucket: str, process: int) -> "AbstractFileSystem":
    """A store whose bucket is there; asked once a process, since a connection does not outlive a fork."""
    try:
        import fsspec

        store = fsspec.filesystem("s3", use_listings_cache=False)
    except ImportError as error:
        raise CacheUnreachableError(
            f"{SCHEME}{bucket}: needs the package s3fs: pip install 'mofe-feature-cache[s3]'"
        ) from error
    try:
        store.info(bucket)
    except FileNotFoundError as error:
        raise CacheUnreachableError(f"{SCHEME}{bucket}: no such bucket; make it, or look at its name") from error
    return store


@contextmanager
def _one_line(path: RemotePath) -> Iterator[None]:
    try:
        yield
    except (CacheError, MemoryError):
        raise
    except FileNotFoundError:
        raise FileNotFoundError(ENOENT, os.strerror(ENOENT), path.url) from None
    except PermissionError as error:
        raise CacheUnreachableError(
            f"{path}: permission denied by the store ({_reason(error)}); look at the credentials (AWS_PROFILE, "
            "AWS_ACCESS_KEY_ID, …) and at what they may do there"
        ) from error
    except Exception as error:  # botocore, aiohttp and asyncio have errors of their own, without a common class
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
            raise CacheUnreachableError(
                f"{path}: no credentials for the store ({_reason(error)}); give AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            ) from error
        raise CacheUnreachableError(
            f"{path}: the store did not answer, after all retries: {_reason(error)}; what was finished is kept, the "
            "same command goes on where it was"
        ) from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _code(error: BaseException) -> str:
    """The store's own code of an error; "" where it has none."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _stat(info: dict[str, Any]) -> RemoteStat:
    written: datetime = info["LastModified"]
    return RemoteStat(int(info["size"]), round(written.timestamp() * 1000) * 1_000_000)
