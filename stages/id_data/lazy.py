"""Rows of an array that are taken without being read: a cache may be larger than memory.

``numpy.asarray(rows[:4096])`` reads 4096 rows, and so does whoever computes with them. What is taken of rows are rows
again, so that folds, experts' shares and blocks are chosen without a byte of the features.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Floats = NDArray[np.float32]
RowNumbers = NDArray[np.intp]


class LazyArray:
    """``[n, D]`` float32 rows, read when they are asked for.

    Args:
        read: gives rows by their numbers, ``[m]`` to ``[m, D]`` float32; may be called by several threads.
        n: rows.
        dim: D.
        numbers: ``[m]`` which of the rows these are, in this order; all by default.

    >>> rows = LazyArray(lambda numbers: np.float32([[0, 1], [2, 3], [4, 5]])[numbers], 3, 2)
    >>> np.asarray(rows[1:]).tolist(), np.asarray(rows[:, [1]]).tolist(), rows[1:].shape
    ([[2.0, 3.0], [4.0, 5.0]], [[1.0], [3.0], [5.0]], (2, 2))
    """

    dtype = np.dtype(np.float32)
    ndim = 2

    def __init__(
        self, read: Callable[[RowNumbers], Floats], n: int, dim: int, numbers: RowNumbers | None = None
    ) -> None:
        self._read = read
        self._n = n
        self._dim = dim
        self._numbers = np.arange(n) if numbers is None else numbers

    @classmethod
    def of(cls, stored: Floats, numbers: RowNumbers | None = None) -> "LazyArray":
        """Rows of a memory-mapped array."""
        n, dim = stored.shape
        return cls(partial(_taken, stored), n, dim, numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, D)."""
        return len(self._numbers), self._dim

    @property
    def size(self) -> int:
        """Numbers in all."""
        return prod(self.shape)

    def __getitem__(self, rows: Any) -> "LazyArray":
        """Some rows by numbers, mask or slice; or ``[:, columns]``."""
        if isinstance(rows, tuple):
            rows, columns = rows
            return self[rows].then(partial(_columns, columns), len(np.arange(self._dim)[columns]))
        return LazyArray(self._read, self._n, self._dim, self._numbers[rows])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Floats:
        return np.asarray(self._read(self._numbers), dtype=dtype or self.dtype)

    def then(self, function: Callable[[Floats], Floats], dim: int) -> "LazyArray":
        """What a function makes of the rows, ``[m, D]`` to ``[m, dim]``; it runs when they are read."""
        return LazyArray(partial(_then, self._read, function), self._n, dim, self._numbers)

    def then_by_row(self, function: Callable[[Floats, RowNumbers], Floats], dim: int) -> "LazyArray":
        """The same of a function that is told as well which rows they are of all n."""
        return LazyArray(partial(_then_by_row, self._read, function), self._n, dim, self._numbers)


# Functions of this module, so that rows may be pickled: another process reads them where this one would.


def _taken(stored: Floats, numbers: RowNumbers) -> Floats:
    return np.asarray(stored[numbers])


def _columns(columns: Any, values: Floats) -> Floats:
    return np.asarray(values[:, columns])


def _then(read: Callable[[RowNumbers], Floats], function: Callable[[Floats], Floats], numbers: RowNumbers) -> Floats:
    return function(read(numbers))


def _then_by_row(
    read: Callable[[RowNumbers], Floats], function: Callable[[Floats, RowNumbers], Floats], numbers: RowNumbers
) -> Floats:
    return function(read(numbers), numbers)


Rows2D = NDArray[np.floating] | LazyArray


class ReadOnce:
    """A block of rows that is read when a part of it is first asked for, and kept for all others that ask.

    Args:
        rows: not many.
    """

    def __init__(self, rows: Rows2D) -> None:
        self._rows = rows
        self._read: NDArray[np.floating] | None = None
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, D)."""
        return self._rows.shape

    def __getitem__(self, rows: Any) -> NDArray[np.floating]:
        return np.asarray(self)[rows]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[np.floating]:
        with self._lock:
            if self._read is None:
                self._read = np.asarray(self._rows)
        return np.asarray(self._read, dtype=dtype)


def one_after_another(parts: Sequence[Rows2D | ReadOnce]) -> Rows2D:
    """Rows of several arrays as those of one; read when they are asked for where those of one part are.

    >>> one_after_another([np.zeros((2, 1)), np.ones((1, 1))]).tolist()
    [[0.0], [0.0], [1.0]]
    """
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate([np.asarray(part) for part in parts])
    ends = np.cumsum([len(part) for part in parts])
    return LazyArray(partial(_joined, tuple(parts), ends), int(ends[-1]), parts[0].shape[1])


def _joined(parts: Sequence[Rows2D | ReadOnce], ends: RowNumbers, numbers: RowNumbers) -> Floats:
    found = np.empty((len(numbers), parts[0].shape[1]), dtype=np.float32)
    owner = np.searchsorted(ends, numbers, side="right")
    for index in np.unique(owner):
        own = owner == index
        found[own] = np.asarray(parts[index][numbers[own] - (ends[index] - len(parts[index]))])
    return found
