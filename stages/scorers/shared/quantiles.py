"""Exact quantiles of more values than fit in memory."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from stages.errors import InputError, NotFiniteError
from stages.id_data.lazy import ReadOnce, Rows2D

_HALF = 1 << 16
_ROWS = 4096  # read at once
_STRIP = 1 << 26  # values at once, where a quantile of every column is taken: 256 MiB as float32


def quantiles(walk: Callable[[], Iterable[NDArray[np.floating]]], shares: Sequence[float]) -> list[float]:
    """Quantiles of all values of some blocks, as `numpy.quantile` of the blocks' values as float32 gives them.

    Two walks: the first counts the upper 16 bits of every value, the second the lower 16 bits of those values whose
    upper bits a quantile has. Memory does not grow with the number of values.

    Args:
        walk: gives the blocks, of any shape, from the start each time that it is called.
        shares: each between 0 and 1.

    Raises:
        InputError: no value, NaN or inf.

    >>> quantiles(lambda: [np.float32([1, 2]), np.float32([[-4]])], [0.5, 0.75])
    [1.0, 1.5]
    """
    upper = np.zeros(_HALF, dtype=np.int64)
    for block in walk():
        upper += np.bincount(_ordered_bits(block) >> 16, minlength=_HALF)
    total = int(upper.sum())
    if not total:
        raise InputError("a quantile of no value was asked for")
    positions = [share * (total - 1) for share in shares]
    ranks = sorted({rank for position in positions for rank in (int(position), min(int(position) + 1, total - 1))})
    ends = np.cumsum(upper)
    bucket = {rank: int(np.searchsorted(ends, rank, side="right")) for rank in ranks}
    lower = {b: np.zeros(_HALF, dtype=np.int64) for b in bucket.values()}
    for block in walk():
        bits = _ordered_bits(block)
        for b, counts in lower.items():
            counts += np.bincount(bits[bits >> 16 == b] & (_HALF - 1), minlength=_HALF)
    value = {}
    for rank, b in bucket.items():
        within = int(np.searchsorted(np.cumsum(lower[b]), rank - (ends[b] - upper[b]), side="right"))
        value[rank] = _value_of((b << 16) + within)
    found = []
    for position in positions:
        low, high = value[int(position)], value[min(int(position) + 1, total - 1)]
        found.append(low + (high - low) * (position - int(position)))
    return found


def _ordered_bits(block: NDArray[np.floating]) -> NDArray[np.uint32]:
    """Bits of float32 values, turned so that they are ordered as the values are, [n]."""
    values = np.ascontiguousarray(block, dtype=np.float32).ravel()
    if not np.isfinite(values).all():
        raise NotFiniteError("features hold NaN or inf: no quantile of them can be taken")
    bits = values.view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _value_of(ordered: int) -> float:
    bits = ordered & ~(1 << 31) if ordered >> 31 else ~ordered & 0xFFFFFFFF
    return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])


def column_quantiles(
    values: Rows2D | ReadOnce, shares: Sequence[float], strip_size: int = _STRIP
) -> NDArray[np.float32]:
    """Quantiles of every column of values [n, D], as many columns at a time as have `strip_size` values.

    Returns:
        [len(shares), D] float32.

    Raises:
        InputError: no row, NaN or inf.

    >>> column_quantiles(np.float32([[0, 1], [2, 1]]), [0.25]).tolist()
    [[0.5, 1.0]]
    """
    n, dim = values.shape
    if not n:
        raise InputError("a quantile of no value was asked for")
    found = np.empty((len(shares), dim), dtype=np.float32)
    step = max(1, min(dim, strip_size // n))
    strip = np.empty((n, step), dtype=np.float32)
    for start in range(0, dim, step):
        width = min(step, dim - start)
        for row in range(0, n, _ROWS):
            strip[row : row + _ROWS, :width] = np.asarray(values[row : row + _ROWS])[:, start : start + width]
        if not np.isfinite(strip[:, :width]).all():
            raise NotFiniteError("features hold NaN or inf: no quantile of them can be taken")
        found[:, start : start + width] = np.quantile(strip[:, :width], shares, axis=0)
    return found
