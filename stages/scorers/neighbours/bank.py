"""FeatureBank: ℓ2-normalised ID training features and the distances to their nearest neighbours.

Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022. The only module that imports faiss.

    flat   every row is compared, exact; on all GPUs that faiss sees. A bank that is too large to be held is searched by
           blocks with a running top-k: the same neighbours up to ties, the same distances to 1e-6
    ivf    rows of the nearest of about 4·√n k-means cells (inverted file); approximate
    hnsw   rows that a walk through a graph meets (Malkov and Yashunin, TPAMI 2020); approximate
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import faiss
import numpy as np
from numpy.typing import ArrayLike, NDArray

from cache.fingerprint import canonical_json, pieces_sha256
from stages.errors import InputError
from stages.id_data.lazy import LazyArray, Rows2D
from stages.scorers.shared.arrays import checked_features, l2_normalise, refuse_not_finite

# [n, k] of queries: cosines or distances, and rows of the bank.
RowsFound = tuple[NDArray[np.float32], NDArray[np.int64]]
IndexKind = Literal["flat", "ivf", "hnsw"]

# faiss's last bits depend on how many queries it is given, so it is always given blocks of one size. Below a few
# hundred queries it leaves BLAS and takes about eight times as long a query: small rests are then quicker unpadded.
QUERY_BLOCK = 1024
_SMALL = 128
_BANK_BLOCK = 1 << 16  # rows
HELD_BYTES = 4 << 30  # of unit vectors; a larger bank is read anew for every search
_PROBES = 32  # cells
_LINKS, _BREADTH, _BREADTH_OF_BUILD = 32, 256, 200  # HNSW's M, efSearch, efConstruction
# 2 − 2·cos cancels for near neighbours: a float32 cosine is good to 1.5e-7, which is 1e-6 in the distance at 0.15 and
# 4e-4 at 0. Neighbours nearer than this are measured again, from the difference of the two vectors.
_NEAR = 0.2
_PAIRS = 1 << 15  # of them at once
# Cosines of neighbours that are measured again, and a little more. Which of several rows that tie for the last place is
# taken is then seen in the distance; blocks of a bank must agree on it.
_NEAR_COSINE = 0.9799
_SPARE, _MOST_TIED = 16, 4096  # rows that are looked at beyond the last place, at first and at most
_THREADS = 4  # that normalise and measure again beside a GPU, which takes half as long for a query as one of them


@dataclass(frozen=True, eq=False)
class BankParts:
    """A bank as it is stored: the features as they were given, ``[n, D]``, and how they are searched."""

    features: NDArray[np.floating]
    device: Literal["auto", "cpu"]
    index: IndexKind


class FeatureBank:
    """Nearest neighbours by cosine among ID features; the distance is √(2 − 2·cos), that of the unit vectors.

    Args:
        features: [n, D], any float type; normalised here. May be memory-mapped or lazy, and larger than memory.
        device: ``"auto"`` takes a GPU where faiss sees one, ``"cpu"`` never.
        index: ``"flat"`` is exact; ``"ivf"`` and ``"hnsw"`` may miss neighbours, see `recall`.
        held_bytes: largest size of the unit vectors that are kept in memory.
        block_rows: of a bank that is not held, how many are read, normalised and searched together.
        probes: cells that a query of ``"ivf"`` looks into.

    Raises:
        InputError: no rows, not two-dimensional, or NaN or inf in a row; an approximate index of what is not held.

    >>> bank = FeatureBank([[1.0, 0.0], [0.0, 2.0]])
    >>> distances, rows = bank.search([[5.0, 0.0]], k=2)
    >>> distances.round(3).tolist(), rows.tolist()
    ([[0.0, 1.4140000343322754]], [[0, 1]])
    """

    def __init__(
        self,
        features: ArrayLike | LazyArray,
        device: Literal["auto", "cpu"] = "auto",
        index: IndexKind = "flat",
        held_bytes: int = HELD_BYTES,
        block_rows: int = _BANK_BLOCK,
        probes: int = _PROBES,
    ) -> None:
        self._features = _checked_bank(features)
        if not self._features.size:
            raise InputError(f"a bank of shape {self._features.shape} has no features to compare with")
        self._device: Literal["auto", "cpu"] = device
        self.index = index
        self._block_rows, self._probes = block_rows, probes
        self._is_held = 4 * self._features.size <= held_bytes
        if index != "flat" and not self._is_held:
            raise InputError(
                f"a bank of {len(self)} rows is too large to be held, as {index} needs it: take index = flat, or "
                "a share of its rows (bank = 0.5)"
            )

    def __len__(self) -> int:
        return len(self._features)

    @property
    def dim(self) -> int:
        """D, the length of a feature."""
        return int(self._features.shape[1])

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the features and what is searched with: equal banks give equal distances."""
        about = [self.index, self._features.dtype.str, self._features.shape, self._probes, _LINKS, _BREADTH]
        blocks = (np.ascontiguousarray(block).reshape(-1).view(np.uint8).data for _, block in self._blocks())
        return pieces_sha256(piece for part in ([canonical_json(about)], blocks) for piece in part)

    def _blocks(self) -> Iterator[tuple[int, NDArray[np.floating]]]:
        """First row and rows of each block."""
        starts = range(0, len(self), self._block_rows)
        return ((start, np.asarray(self._features[start : start + self._block_rows])) for start in starts)

    @cached_property
    def _unit(self) -> NDArray[np.float32]:
        unit = np.empty(self._features.shape, dtype=np.float32)
        for start, block in self._blocks():
            unit[start : start + len(block)] = l2_normalise(block)
        return unit

    @cached_property
    def _built(self) -> Any:
        """The faiss index that is searched, built at the first search; None where the bare rows are."""
        index: Any
        if self.index == "flat":
            if self._device == "cpu" or not self._is_held or faiss.get_num_gpus() == 0:
                return None
            index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(self.dim))
        elif self.index == "ivf":
            cells = max(1, min(int(4 * len(self) ** 0.5), len(self) // 39))  # faiss wants 39 rows a cell to train on
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(self.dim), self.dim, cells, faiss.METRIC_INNER_PRODUCT)
            index.nprobe = self._probes
            index.train(self._unit)
        else:
            index = faiss.IndexHNSWFlat(self.dim, _LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction, index.hnsw.efSearch = _BREADTH_OF_BUILD, _BREADTH
            with _one_thread():
                index.add(self._unit)
            return index
        index.add(self._unit)
        return index

    def parts(self) -> "BankParts":
        """What it is stored as, see `stages.files.packing`."""
        return BankParts(np.asarray(self._features), self._device, self.index)

    @classmethod
    def of_parts(cls, parts: "BankParts") -> Self:
        """The same bank again; an index is built anew."""
        return cls(parts.features, parts.device, parts.index)

    def prepare(self) -> None:
        """Do now what the first search would do before it: normalise what is held, build an index."""
        if self._is_held and self._built is None:
            _ = self._unit

    def recall(self, queries: ArrayLike, k: int) -> float:
        """Share of the k exact neighbours that `search` finds, over some queries; 1 for a flat index."""
        if self.index == "flat":
            return 1.0
        features = checked_features(queries, "query")
        exact, _ = self._search_in_blocks(features, k, exact=True)
        found, _ = self._search_in_blocks(features, k)
        return float((found <= exact[:, -1:] + 1e-6).mean())

    @property
    def features(self) -> Rows2D:
        """[n, D] as they were given; perhaps not read yet."""
        return self._features

    @property
    def in_blocks(self) -> bool:
        """Whether blocks of it can be searched apart, see `top_rows`: it is exact, and no GPU searches it."""
        return self.index == "flat" and self._built is None

    def measured(
        self, unit: NDArray[np.float32], cosine: NDArray[np.float32], rows: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Distances [n, k] of what `top_rows` found for queries [n, D] of length 1, as `search` gives them."""
        return self._measured(unit, cosine, rows)[0]

    def by_blocks(self, queries: NDArray[np.floating], k: int) -> NDArray[np.float32]:
        """Distances [n, k] as `search` gives them, of which those of near neighbours depend on no block of the bank.

        Args:
            queries: [n, D], any float type; normalised here.
            k: neighbours, at most the bank's rows.
        """
        if not self.in_blocks:
            return self.search(queries, k)[0]
        features = checked_features(queries, "query")
        asked = [l2_normalise(features[start : start + QUERY_BLOCK]) for start in range(0, len(features), QUERY_BLOCK)]
        if self._is_held:
            found = [self.measured(unit, *top_rows(unit, k, self._unit)) for unit in asked]
        else:
            best: list[list[RowsFound]] = [[] for _ in asked]
            for start, read in self._blocks():
                some = l2_normalise(read)
                for unit, own in zip(asked, best, strict=True):
                    cosine, rows = top_rows(unit, min(k, len(some)), some)
                    own[:] = [merged_rows([*own, (cosine, rows + start)], k)]
            found = [self.measured(unit, *own[0]) for unit, own in zip(asked, best, strict=True)]
        return np.concatenate([np.empty((0, k), np.float32), *found])

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
        features = checked_features(queries, "query")
        available = len(self) - exclude_self
        if not 1 <= k <= available:
            raise InputError(f"k = {k} asked of a bank with {available} rows to search; give 1 to {available}")
        if features.shape[1] != self.dim:
            raise InputError(f"queries have {features.shape[1]} features a row, the bank {self.dim}")
        if exclude_self and len(features) != len(self):
            raise InputError(f"exclude_self needs the bank's own {len(self)} rows as queries, {len(features)} given")

        distances, rows = self._search_in_blocks(features, k + exclude_self)
        if not exclude_self:
            return distances, rows
        own = rows == np.arange(len(rows))[:, None]
        own[:, -1] |= ~own.any(axis=1)  # among more than k duplicates it may be missing: drop the farthest instead
        return distances[~own].reshape(-1, k), rows[~own].reshape(-1, k)

    def _search_in_blocks(
        self, features: NDArray[np.floating], k: int, exact: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        distances = np.empty((len(features), k), dtype=np.float32)
        rows = np.empty(distances.shape, dtype=np.int64)
        blocks = [slice(start, start + QUERY_BLOCK) for start in range(0, len(features), QUERY_BLOCK)]
        if not self._is_held:
            self._search_anew(features, blocks, distances, rows)
            return distances, rows
        index = None if exact else self._built
        in_turn = threading.Lock()  # a GPU's index is for one thread

        def search(block: slice) -> None:
            unit = l2_normalise(features[block])
            with in_turn:
                cosine, found = _nearest(unit, k, self._unit, index)
            distances[block], rows[block] = self._measured(unit, cosine, found)

        if index is not None and self.index == "flat":  # on a GPU, which the host would keep waiting
            with ThreadPoolExecutor(_THREADS) as pool:
                deque(pool.map(search, blocks), maxlen=0)
        else:  # faiss takes all cores
            deque(map(search, blocks), maxlen=0)
        return distances, rows

    def _search_anew(
        self,
        features: NDArray[np.floating],
        blocks: list[slice],
        distances: NDArray[np.float32],
        rows: NDArray[np.int64],
    ) -> None:
        """Fill in what is found in a bank that is not held, which is read once for all blocks of queries."""
        unit, k = l2_normalise(features), distances.shape[1]
        heaps = [faiss.ResultHeap(len(unit[block]), k, keep_max=True) for block in blocks]
        for start, read in self._blocks():
            some = l2_normalise(read)
            for block, heap in zip(blocks, heaps, strict=True):
                cosine, found = _nearest(unit[block], min(k, len(some)), some)
                heap.add_result(cosine, found + start)
        for block, heap in zip(blocks, heaps, strict=True):
            heap.finalize()
            distances[block], rows[block] = self._measured(unit[block], heap.D, heap.I)

    def _measured(
        self, unit: NDArray[np.float32], cosine: NDArray[np.float32], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Distances from cosines, those of near neighbours measured again, ascending."""
        distances = np.sqrt(np.maximum(0, 2 - 2 * cosine))
        query, column = np.nonzero(distances < _NEAR)
        for start in range(0, len(query), _PAIRS):
            at = query[start : start + _PAIRS], column[start : start + _PAIRS]
            own = rows[at]
            gap = unit[at[0]] - (self._unit[own] if self._is_held else l2_normalise(self._features[own]))  # (pairs, D)
            distances[at] = np.sqrt(np.einsum("pd,pd->p", gap, gap))
        order = np.argsort(distances, axis=1, kind="stable")  # measuring again may swap near ties
        return np.take_along_axis(distances, order, axis=1), np.take_along_axis(rows, order, axis=1)


def top_rows(unit: NDArray[np.float32], k: int, bank: NDArray[np.float32]) -> RowsFound:
    """The k largest cosines of queries with rows of a bank, descending, and these rows; all have length 1.

    Where the k-th is a near neighbour, the rows that tie with it are taken by their numbers: the same of a whole bank,
    and of the best of its blocks (`merged_rows`). Blocks of a multiple of 1024 rows give a whole bank's cosines to the
    bit, for faiss multiplies so many at a time.

    Args:
        unit: [n, D], at most `QUERY_BLOCK`.
        k: at most the bank's rows.
        bank: [m, D].
    """
    asked = min(k + _SPARE, len(bank))
    cosine, rows = _nearest(unit, asked, bank)
    while (
        k < asked < min(len(bank), _MOST_TIED)
        and ((cosine[:, k - 1] > _NEAR_COSINE) & (cosine[:, k - 1] == cosine[:, -1])).any()
    ):
        asked = min(4 * asked, len(bank))
        cosine, rows = _nearest(unit, asked, bank)
    near = np.flatnonzero(cosine[:, k - 1] > _NEAR_COSINE)
    order = np.lexsort((rows[near], -cosine[near]), axis=1)
    cosine[near] = np.take_along_axis(cosine[near], order, axis=1)
    rows[near] = np.take_along_axis(rows[near], order, axis=1)
    return cosine[:, :k], rows[:, :k]


def merged_rows(found: Sequence[RowsFound], k: int) -> RowsFound:
    """The k best of what `top_rows` found in blocks of a bank, by cosine and row, with rows counted in the bank."""
    cosine = np.concatenate([each[0] for each in found], axis=1)
    rows = np.concatenate([each[1] for each in found], axis=1)
    order = np.lexsort((rows, -cosine), axis=1)[:, :k]
    return np.take_along_axis(cosine, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _nearest(
    unit: NDArray[np.float32], k: int, bank: NDArray[np.float32], index: Any = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k largest cosines, descending, and their rows; by an index of the bank where there is one."""
    padded = unit
    if _SMALL < len(unit) < QUERY_BLOCK:
        padded = np.concatenate([unit, np.zeros((QUERY_BLOCK - len(unit), unit.shape[1]), dtype=np.float32)])
    if index is None:
        cosine, rows = faiss.knn(padded, bank, k, metric=faiss.METRIC_INNER_PRODUCT)
    else:
        cosine, rows = index.search(padded, k)
    cosine, rows = cosine[: len(unit)], rows[: len(unit)]
    if len(short := np.flatnonzero((rows < 0).any(axis=1))):  # an approximate index met fewer than k: compare with all
        cosine[short], rows[short] = _nearest(unit[short], k, bank)
    return cosine, rows


@contextmanager
def _one_thread() -> Iterator[None]:
    """A graph that several threads build depends on who comes first."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def _checked_bank(features: ArrayLike | LazyArray) -> Rows2D:
    if not isinstance(features, LazyArray):
        return checked_features(features, "bank")
    refuse_not_finite(features, "bank")
    return features
