"""Files that stages leave for each other: JSON and safetensors, arriving whole or not at all, holding no code."""

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from cache.files import TEMPORARY, arriving, sync_folder, write_file
from cache.lock import hold, is_held


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


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write named arrays as safetensors, making their folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, save({name: np.asarray(array, order="C") for name, array in tensors.items()}))


def write_described(path: Path, tensors: Mapping[str, NDArray[Any]], about: Any) -> None:
    """Write named arrays and, last, the JSON file beside them that says what they are.

    The JSON of an older pair goes first: killed in between, the new arrays must not stand under the old description.
    """
    described = path.with_suffix(".json")
    described.unlink(missing_ok=True)
    write_tensors(path, tensors)
    write_json(described, about)


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
def described_rows(path: Path, columns: Mapping[str, Column], n_rows: int, about: Any) -> Iterator[RowWriter]:
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
    write_json(described, about)


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


def map_tensors(path: Path) -> dict[str, NDArray[Any]] | None:
    """Named arrays of a file, memory-mapped and read-only: rows are read when they are looked at.

    Returns:
        None where there is no such file, it is damaged, or it holds other than float32 and int64.
    """
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
