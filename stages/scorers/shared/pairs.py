"""Every row to score with every ID training row, by blocks of both: for scores that look at all pairs."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs

_QUERIES = 1024
_BANK = 4096


def query_blocks(*arrays: Floats) -> Iterator[tuple[slice, list[Floats]]]:
    """Rows of arrays [n, …], `_QUERIES` at a time, the last block filled up with zero rows.

    The last bits of a float32 matmul depend on its shape: blocks of one shape give a row the same score in any company.
    """
    n = len(arrays[0])
    for start in range(0, n, _QUERIES):
        block = slice(start, min(start + _QUERIES, n))
        yield block, [_filled(array[block]) for array in arrays]


def _filled(rows: Floats) -> Floats:
    missing = np.zeros((_QUERIES - len(rows), rows.shape[1]), dtype=np.float32)
    return np.concatenate([rows, missing]) if len(missing) else np.ascontiguousarray(rows)


def bank_blocks(train: ScoreInputs) -> Iterator[ScoreInputs]:
    """ID training rows, read as they are needed: they may be larger than memory."""
    return train.blocks(_BANK)


def keep_largest(found: Floats, products: Floats) -> Floats:
    """The k largest of ``found`` [b, k] and ``products`` [b, m] in each row, ascending, [b, k]."""
    k = found.shape[1]
    if products.shape[1] > k:
        products = np.partition(products, products.shape[1] - k, axis=1)[:, -k:]
    return np.sort(np.concatenate([found, products], axis=1), axis=1)[:, -k:]


def seeded_share(n: int, share: float) -> NDArray[np.intp]:
    """A share of ``range(n)``, at least one, the same at every call; ascending."""
    size = max(1, int(n * share))
    return np.sort(np.random.default_rng(0).permutation(n)[:size])
