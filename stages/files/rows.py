"""Arrays ``[N, …]`` of a safetensors file, written some rows at a time and read as they are looked at.

They may be gigabytes: whether a byte of them changed is found where their times say that they were written to since
their document was (`cache.files.written_after`), and not whenever they are read.
"""

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from cache.files import TEMPORARY, arriving, sync_folder, written_after
from cache.fingerprint import file_sha256
from cache.lock import hold, is_held
from stages.files.documents import read_document, write_document


class RowFormat(NamedTuple):
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

    def __init__(self, file: io.RawIOBase, columns: Mapping[str, RowFormat], n_rows: int) -> None:
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
    path: Path, columns: Mapping[str, RowFormat], n_rows: int, about: Mapping[str, Any]
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
