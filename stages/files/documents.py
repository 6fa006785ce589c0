"""Files that stages leave for each other: JSON and safetensors, arriving whole or not at all, holding no code.

A *document* is JSON that begins with the digest of its own bytes, and says under ``files`` what bytes the files have
that it is about. So whatever is derived from a file can be named by the bytes that it was derived from, and a changed
byte of one or the other is found: of documents and weights whenever they are read, of rows of a set, which may be
gigabytes, where their times say that they were written to since (`cache.files.written_after`).
"""

import io
import json
import math
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, load_file, save

from cache.files import TEMPORARY, arriving, is_whole, seal, sync_folder, write_file, written_after
from cache.fingerprint import file_sha256, sha256
from cache.lock import hold, is_held

CONTENTS = "contents.json"


def write_json(path: Path, value: Any) -> None:
    """Write indented UTF-8 JSON, making its folder."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode("utf-8"))


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where there is no such file or it is no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> str:
    """Write named arrays as safetensors, making their folder; returns the SHA-256 of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = save({name: np.asarray(array, order="C") for name, array in tensors.items()})
    write_file(path, data)
    return sha256(data)


def write_document(path: Path, body: Mapping[str, Any]) -> None:
    """Write an indented JSON object that begins with the digest of its bytes, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(body, indent=2, ensure_ascii=False).removeprefix("{").removeprefix("\n") + "\n"
    write_file(path, seal(text.encode("utf-8")))


def read_document(path: Path) -> dict[str, Any] | None:
    """Read what `write_document` wrote; None where there is no such file or a byte of it is another."""
    try:
        data = path.read_bytes()
        body = json.loads(data) if is_whole(data) else None
    except (OSError, ValueError, RecursionError):
        return None
    if body is not None:
        del body["digest"]
    return body


def read_whole(path: Path, unread: Container[str] = ()) -> dict[str, Any] | None:
    """Read a document; None where it, or one of the files that it is about, is missing or has other bytes.

    Args:
        path: of the document; its ``files`` stand in the same folder or below.
        unread: of these it is enough that they are there.
    """
    about = read_document(path)
    return None if about is None or any(changed_files(path, about, unread)) else about


def changed_files(
    path: Path, about: Mapping[str, Any], unread: Container[str] = ()
) -> Iterator[tuple[Path, str | None]]:
    """Files that are not as a document says: each with the SHA-256 that it has, None where it is missing.

    Args:
        path: of the document.
        about: what it says.
        unread: as in `read_whole`.
    """
    for name, digest in about.get("files", {}).items():
        file = path.parent / name
        found = digest if name in unread and file.is_file() else digest_of(file)
        if found != digest:
            yield file, found


def write_contents(folder: Path, identity: str, names: Iterable[str]) -> None:
    """Write ``contents.json``: what a folder's files are made of, and what bytes they have."""
    files = {name: digest_of(folder / name) for name in sorted(names)}
    write_document(folder / CONTENTS, {"identity": identity, "files": files})


def has_contents(folder: Path, identity: str) -> bool:
    """Whether a folder's files are all there, as they were left, and made of this."""
    contents = read_whole(folder / CONTENTS)
    return contents is not None and contents["identity"] == identity


def find_damages(documents: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """What is wrong with documents and with the files that they are about: path and what."""
    for path in documents:
        about = read_document(path)
        if about is None:
            yield path, "its bytes are not those that were written"
        for file, found in changed_files(path, about or {}):
            yield file, "is missing" if found is None else "its bytes are not those that were written"


def digest_of(path: Path) -> str | None:
    """SHA-256 of a file's bytes; None where it cannot be read."""
    try:
        return file_sha256(path)
    except OSError:
        return None


def write_described(path: Path, tensors: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
    """Write named arrays and, last, the document beside them that says what they are.

    The document of an older pair goes first: killed in between, the new arrays must not stand without one of theirs.
    """
    described = path.with_suffix(".json")
    described.unlink(missing_ok=True)
    digest = write_tensors(path, tensors)
    write_document(described, {**about, "files": {path.name: digest}})


def read_described(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
    """What `write_described` wrote: what the document says, and the arrays; None where either is not whole."""
    about = read_document(path.with_suffix(".json"))
    try:
        data = path.read_bytes()
        if about is None or about["files"][path.name] != sha256(data):
            return None
        return about, load(data)
    except (OSError, SafetensorError, TypeError, KeyError):
        return None


class Column(NamedTuple):
    """What an array ``[N, …]`` has in each of its rows."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of a row."""
        return math.prod(self.shape) * self.dtype.itemsize


# The format's names, of the types that rows are stored in.
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
_TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}


class RowWriter:
    """Fills arrays of a safetensors file, some rows of all of them at a time; each row stands where it belongs at once.

    Args:
        file: empty.
        columns: what the arrays are.
        n_rows: N.
    """

    def __init__(self, file: io.RawIOBase, columns: Mapping[str, Column], n_rows: int) -> None:
        self._descriptor, self._columns, self._n_rows, self._written = file.fileno(), columns, n_rows, 0
        header: dict[str, Any] = {}
        end = 0
        # In the order of safetensors' own writer: wide types first, then by name.
        for name, column in sorted(columns.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
            begin, end = end, end + n_rows * column.nbytes
            about = {"dtype": _TYPE_NAMES[column.dtype], "shape": [n_rows, *column.shape], "data_offsets": [begin, end]}
            header[name] = about
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._starts = {name: 8 + len(text) + about["data_offsets"][0] for name, about in header.items()}
        self._write(len(text).to_bytes(8, "little") + text, 0)

    def append(self, rows: Mapping[str, NDArray[Any]]) -> None:
        """The next rows, ``[n, …]``, of every array."""
        before = self._written
        for name, column in self._columns.items():
            array = np.asarray(rows[name], dtype=column.dtype, order="C")
            if array.shape[1:] != column.shape:
                raise ValueError(f"rows of {name} have shape {array.shape[1:]}, not {column.shape}")
            self._write(array.tobytes(), self._starts[name] + before * column.nbytes)
            self._written = before + len(array)

    def finish(self) -> None:
        """Everything is on the disk when this returns."""
        if self._written != self._n_rows:
            raise ValueError(f"{self._written} rows were written, not {self._n_rows}")
        os.fsync(self._descriptor)

    def _write(self, data: bytes, at: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, at)
            view, at = view[written:], at + written


@contextmanager
def described_rows(
    path: Path, columns: Mapping[str, Column], n_rows: int, about: Mapping[str, Any]
) -> Iterator[RowWriter]:
    """What `write_described` does, of arrays ``[N, …]`` that are made some rows at a time: the same bytes.

    An older pair stands until the new arrays are whole. What a killed process left of its arrays is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    described = path.with_suffix(".json")
    with arriving(path) as file:
        hold(file.fileno())  # so that others see that it is written, until this process ends
        writer = RowWriter(file, columns, n_rows)
        yield writer
        writer.finish()
        described.unlink(missing_ok=True)
    sync_folder(path.parent)
    write_document(described, {**about, "files": {path.name: file_sha256(path)}})


def _remove_leftovers(path: Path) -> None:
    for leftover in path.parent.glob(f".{path.name}.*{TEMPORARY}"):
        with open(leftover, "rb") as file:
            if not is_held(file.fileno()):
                leftover.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, NDArray[Any]] | None:
    """Read named arrays; None where there is no such file or it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, TypeError):  # TypeError: of a type that numpy does not have
        return None


def map_described(path: Path, about: Mapping[str, Any]) -> dict[str, NDArray[Any]] | None:
    """Arrays that `described_rows` wrote, memory-mapped and read-only: rows are read when they are looked at.

    Bytes are compared only where the file may have been written to since.

    Args:
        path: of the arrays.
        about: what their document must say, or a part of it.

    Returns:
        None where there is no such pair, it is damaged, says something else, or holds other than float32 and int64.
    """
    document = path.with_suffix(".json")
    found = read_document(document)
    if found is None or any(found.get(name) != value for name, value in about.items()):
        return None
    try:
        if written_after(path, document):
            if file_sha256(path) != found["files"][path.name]:
                return None
            with suppress(OSError):  # somebody else's: compared again the next time
                os.utime(document)
    except (OSError, KeyError):
        return None
    return _map_tensors(path)


def _map_tensors(path: Path) -> dict[str, NDArray[Any]] | None:
    try:
        with safe_open(path, "numpy") as file:  # checks that the header fits the file
            names = list(file.keys())
        content = np.asarray(np.memmap(path, np.uint8, "r"))
        begin = 8 + int(content[:8].view("<u8")[0])
        header = json.loads(content[8:begin].tobytes())
        return {name: _mapped(content[begin:], **header[name]) for name in names}
    except (OSError, SafetensorError, KeyError):
        return None


def _mapped(content: NDArray[np.uint8], dtype: str, shape: list[int], data_offsets: list[int]) -> NDArray[Any]:
    begin, end = data_offsets
    values: NDArray[Any] = content[begin:end].view(_TYPES[dtype])
    return values.reshape(shape)
