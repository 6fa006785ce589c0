"""FeatureBank: ℓ2-normalised ID training features and the exact distances to their nearest neighbours.

Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022. The only module that imports faiss.
"""

from typing import Literal

import faiss
import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.errors import InputError

# faiss's last bits depend on how many queries it is given, so it is always given blocks of one size. Below a few
# hundred queries it leaves BLAS and takes about eight times as long a query: small rests are then quicker unpadded.
_BLOCK = 1024
_SMALL = 128
# 2 − 2·cos cancels for near neighbours: a float32 cosine is good to 1.5e-7, which is 1e-6 in the distance at 0.15 and
# 4e-4 at 0. Neighbours nearer than this are measured again, from the difference of the two vectors.
_NEAR = 0.2
_PAIRS = 1 << 15  # of them at once


def l2_normalise(features: ArrayLike) -> NDArray[np.float32]:
    """Every row divided by its Euclidean norm; a zero row stays zero.

    Args:
        features: [n, D], any float type.

    Returns:
        [n, D] float32, C-contiguous, a new array.

    >>> l2_normalise([[3.0, 4.0], [0.0, 0.0]]).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    rows = np.asarray(features)
    # In float64: the squares of float16 and float32 values neither overflow nor vanish.
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))[:, None]
    unit = np.zeros(rows.shape, dtype=np.float32)
    np.divide(rows, norms, out=unit, where=norms > 0, casting="same_kind")
    return unit


class FeatureBank:
    """Exact nearest neighbours by cosine among ID features; the distance is √(2 − 2·cos), that of the unit vectors.

    Args:
        features: [n, D], any float type; normalised here.
        device: ``"auto"`` takes a GPU where faiss sees one, ``"cpu"`` never.

    Raises:
        InputError: no rows, not two-dimensional, or NaN or inf in a row.

    >>> bank = FeatureBank([[1.0, 0.0], [0.0, 2.0]])
    >>> distances, rows = bank.search([[5.0, 0.0]], k=2)
    >>> distances.round(3).tolist(), rows.tolist()
    ([[0.0, 1.4140000343322754]], [[0, 1]])
    """

    def __init__(self, features: ArrayLike, device: Literal["auto", "cpu"] = "auto") -> None:
        self._unit = l2_normalise(checked_features(features, "bank"))
        if not self._unit.size:
            raise InputError(f"a bank of shape {self._unit.shape} has no features to compare with")
        self._index: faiss.Index = faiss.IndexFlatIP(self.dim)
        if device == "auto" and faiss.get_num_gpus() > 0:
            self._index = faiss.index_cpu_to_all_gpus(self._index)
        self._index.add(self._unit)

    def __len__(self) -> int:
        return len(self._unit)

    @property
    def dim(self) -> int:
        """D, the length of a feature."""
        return int(self._unit.shape[1])

    def search(
        self, queries: ArrayLike, k: int, exclude_self: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The ``k`` nearest rows of the bank for each query.

        Args:
            queries: [n, D], any float type; normalised here.
            k: neighbours, at most the bank's rows. All smaller k stand in the columns before.
            exclude_self: leave-one-out. The queries are the bank's own rows, in order; none is its own neighbour.

        Returns:
            Distances [n, k] float32, ascending, in [0, 2], exact to 1e-6; and row numbers [n, k] int64.

        Raises:
            InputError: ``k`` outside 1 … rows, another D, NaN or inf in a query.
        """
        unit = l2_normalise(checked_features(queries, "query"))
        available = len(self) - exclude_self
        if not 1 <= k <= available:
            raise InputError(f"k = {k} asked of a bank with {available} rows to search; give 1 to {available}")
        if unit.shape[1] != self.dim:
            raise InputError(f"queries have {unit.shape[1]} features a row, the bank {self.dim}")
        if exclude_self and len(unit) != len(self):
            raise InputError(f"exclude_self needs the bank's own {len(self)} rows as queries, {len(unit)} given")

        distances = np.empty((len(unit), k + exclude_self), dtype=np.float32)
        rows = np.empty(distances.shape, dtype=np.int64)
        for start in range(0, len(unit), _BLOCK):
            block = slice(start, start + _BLOCK)
            distances[block], rows[block] = self._search_block(unit[block], k + exclude_self)
        if not exclude_self:
            return distances, rows
        own = rows == np.arange(len(rows))[:, None]
        own[:, -1] |= ~own.any(axis=1)  # among more than k duplicates it may be missing: drop the farthest instead
        return distances[~own].reshape(-1, k), rows[~own].reshape(-1, k)

    def _search_block(self, unit: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        padded = unit
        if _SMALL < len(unit) < _BLOCK:
            padded = np.concatenate([unit, np.zeros((_BLOCK - len(unit), self.dim), dtype=np.float32)])
        cosine, rows = self._index.search(padded, k)
        rows = rows[: len(unit)]
        distances = np.sqrt(np.maximum(0, 2 - 2 * cosine[: len(unit)]))
        query, column = np.nonzero(distances < _NEAR)
        for start in range(0, len(query), _PAIRS):
            at = query[start : start + _PAIRS], column[start : start + _PAIRS]
            gap = unit[at[0]] - self._unit[rows[at]]  # (pairs, D)
            distances[at] = np.sqrt(np.einsum("pd,pd->p", gap, gap))
        order = np.argsort(distances, axis=1, kind="stable")  # measuring again may swap near ties
        return np.take_along_axis(distances, order, axis=1), np.take_along_axis(rows, order, axis=1)


def checked_features(features: ArrayLike, which: str) -> NDArray[np.floating]:
    """``features`` as a float array [n, D], or an `InputError` that says what is wrong with the ``which`` rows."""
    array = np.asarray(features)
    if array.ndim != 2:
        raise InputError(f"{which} features have shape {array.shape}; rows and columns expected")
    if not np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        raise InputError(f"{bad.size} of {len(array)} {which} features hold NaN or inf, row {bad[0]} first")
    return array
