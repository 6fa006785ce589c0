"""Arrays of a file, some rows at a time: in place, held in memory, from front to back, in several parts."""

import weakref
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages import errors

BLOCK_BYTES = 4 << 20  # of a column that can only be read from front to back
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    KeyError,
    TypeError,
    zipfile.BadZipFile,
    zlib.error,
    pa.ArrowException,
)
Blocks = Generator[NDArray[Any], None, None]  # rows of an array, one block after another


class Column(Protocol):
    """One array of a file, ``[n, ...]``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all rows."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what `read` gives."""
        ...

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start`` to ``stop`` (exclusive)."""
        ...

    def release(self) -> None:
        """Let go of what is held to read on; the next `read` opens it again."""
        ...


class ArrayFile(NamedTuple):
    """What stands in a file, or in several that belong together.

    Attributes:
        paths: of the files, the one that they are known by first.
        arrays: makes the column of each name; told which key it is to be, since text is read for some alone.
        soft: keys of columns that are taken only where they fit: by the habit of a tool, and not because they are named
            so.
    """

    paths: Sequence[str]
    arrays: Mapping[str, Callable[[str], Column]]
    soft: Mapping[str, str] = {}


def block_rows(row_bytes: int) -> int:
    """How many rows make a block."""
    return max(BLOCK_BYTES // max(row_bytes, 1), 1)


def reading_arrays(path: str) -> AbstractContextManager[None]:
    """Turn what numpy, zip, Parquet, HDF5 and torch make of a bad file into one line."""
    return errors.reading(path, *_UNREADABLE)


@dataclass(frozen=True)
class InPlace:
    """An array whose bytes stand in a file as they are."""

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    column_major: bool = False

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """See `Column`."""
        with reading_arrays(self.path):
            if self.column_major:
                mapped = np.memmap(self.path, self.dtype, "r", self.offset, self.shape, "F")
                return np.array(mapped[start:stop], order="C")
            row, n = prod(self.shape[1:]), stop - start  # read, not mapped: mapped pages would count as memory
            offset = self.offset + start * row * self.dtype.itemsize
            values = np.fromfile(self.path, self.dtype, n * row, offset=offset)
            if len(values) != n * row:
                raise ValueError("it ends before its last row")
            return values.reshape(n, *self.shape[1:])

    def release(self) -> None:
        """Nothing is held."""


class Held:
    """An array in memory: labels, ids."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values
        self.shape, self.dtype = values.shape, values.dtype

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """See `Column`."""
        return self._values[start:stop]

    def release(self) -> None:
        """It is held all the time."""


class Onwards:
    """An array that can only be read from front to back; going back begins anew.

    Args:
        shape, dtype: of all of it.
        begin: gives its rows from the first on, in blocks.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], begin: Callable[[], Blocks]) -> None:
        self.shape = shape
        self.dtype = dtype
        self._begin = begin
        self._blocks: Blocks | None = None
        self._close: Callable[[], object] = lambda: None
        self._at = 0  # row after the last that was read
        self._block = np.empty((0, *shape[1:]), dtype)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """See `Column`."""
        if self._blocks is None or start < self._at - len(self._block):
            self._close()
            self._blocks, self._at, self._block = self._begin(), 0, self._block[:0]
            self._close = weakref.finalize(self, self._blocks.close)  # and its file, also where nobody reads to the end
        parts = [self._block[:0]]
        while start < stop:
            if start >= self._at:
                self._block = next(self._blocks)
                self._at += len(self._block)
                continue
            first = self._at - len(self._block)
            parts.append(self._block[start - first : stop - first])
            start += len(parts[-1])
        return np.concatenate(parts)

    def release(self) -> None:
        """Close the file."""
        self._close()
        self._blocks, self._at, self._block = None, 0, np.empty((0, *self.shape[1:]), self.dtype)


class FromBFloat16:
    """The numbers of a column of the bits of bfloat16, uint16: float32 has every one of them."""

    def __init__(self, bits: Column) -> None:
        self.shape, self.dtype = bits.shape, np.dtype(np.float32)
        self._bits = bits

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """See `Column`."""
        return (self._bits.read(start, stop).astype(np.uint32) << 16).view(np.float32)

    def release(self) -> None:
        """See `Column`."""
        self._bits.release()


class Chosen:
    """Some of the values of each row of a column, in an order of their own."""

    def __init__(self, column: Column, places: Sequence[int]) -> None:
        self.shape, self.dtype = (column.shape[0], len(places)), column.dtype
        self._column = column
        self._places = list(places)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """See `Column`."""
        return self._column.read(start, stop)[:, self._places]

    def release(self) -> None:
        """See `Column`."""
        self._column.release()


class InParts:
    """Columns of several files, one after the other; the file of one alone is open."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._starts = [0, *accumulate(column.shape[0] for column in columns)]
        self.shape = (self._starts[-1], *columns[0].shape[1:])
        self.dtype = np.result_type(*(column.dtype for column in columns))
        self._open: Column | None = None

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """See `Column`."""
        parts = [np.empty((0, *self.shape[1:]), self.dtype)]
        while start < stop:
            number = bisect_right(self._starts, start) - 1
            first, end = self._starts[number], min(stop, self._starts[number + 1])
            column = self._columns[number]
            if self._open is not column:
                self.release()
                self._open = column
            parts.append(column.read(start - first, end - first).astype(self.dtype, copy=False))
            start = end
        return np.concatenate(parts)

    def release(self) -> None:
        """See `Column`."""
        if self._open is not None:
            self._open.release()
        self._open = None
