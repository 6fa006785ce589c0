"""Clusters of ID rows, which stand for classes where images have no labels or are all of one class.

k-means (Lloyd, started as by Arthur and Vassilvitskii, "k-means++", SODA 2007) on features divided by their length, as
kNN compares them. The number of clusters is the one of a grid whose mean silhouette (Rousseeuw, J. Comput. Appl. Math.
20, 1987) is highest, the smallest among equals. Nothing but ID training rows is looked at, and neither names nor the
order of images matter: rows come in the order of the hashes of their images, and what is drawn is drawn from seed 0.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

CLUSTER_GRID = (*range(2, 11), 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96)
CLUSTERED_ROWS = 1024  # that clusters are found on: the first by image hash
SMALLEST_CLUSTER = 5  # of them in a cluster; the rows of smaller ones go to the nearest other
_PER_CLUSTER = 10  # rows, on average, below which a k is not tried, but for the smallest

_Matrix = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Clusters:
    """Centres of clusters, the largest cluster first.

    Attributes:
        centres: ``[k, D]`` means of unit rows.
        silhouette: mean over the rows that they were found on, −1 to 1.
    """

    centres: _Matrix
    silhouette: float

    def __len__(self) -> int:
        return len(self.centres)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the clusters, as those of classes."""
        return tuple(f"cluster-{number}" for number in range(len(self)))

    def of(self, features: NDArray[np.floating]) -> NDArray[np.int32]:
        """``[n]`` the cluster whose centre is nearest to each row ``[n, D]``."""
        return _nearest(unit_rows(features), self.centres)

    @classmethod
    def _from(cls, rows: _Matrix, distances: _Matrix, labels: NDArray[np.int32]) -> Self:
        """Of rows and the cluster of each: those with too few rows are given up, and their rows go to others."""
        counts = np.bincount(labels)
        kept = [number for number in np.argsort(-counts, kind="stable") if counts[number] >= SMALLEST_CLUSTER]
        if len(kept) < 2:
            return cls(rows[:0], -1.0)
        centres = np.stack([rows[labels == number].mean(axis=0) for number in kept])
        return cls(centres, _silhouette(distances, _nearest(rows, centres)))


def find_clusters(
    features: NDArray[np.floating], hashes: NDArray[np.uint8], grid: Sequence[int] = CLUSTER_GRID
) -> Clusters:
    """The clusters of ID rows that are best told apart; fewer than two where rows are too few or too much alike.

    Args:
        features: ``[n, D]``, at most `CLUSTERED_ROWS` of them are wanted.
        hashes: ``[n, 32]`` of the image of each: they alone say in which order rows come.
        grid: numbers of clusters to try.
    """
    rows = unit_rows(features[np.lexsort(hashes.T[::-1])])
    found, most = Clusters(rows[:0], -1.0), max(2, len(rows) // _PER_CLUSTER)
    with threadpool_limits(1):  # sums of several threads round in the order in which these end
        distances = _distances(rows)
        if len(rows) < 2 * SMALLEST_CLUSTER or not distances.any():
            return found
        for k in (k for k in grid if k <= most):
            other = Clusters._from(rows, distances, _k_means(rows, k))
            if other.silhouette > found.silhouette:
                found = other
    return found


def first_by_hash(rows: NDArray[np.int64], hashes: NDArray[np.uint8], most: int = CLUSTERED_ROWS) -> NDArray[np.int64]:
    """Up to so many of some rows, those whose image hashes come first; ascending.

    Args:
        rows: numbers.
        hashes: ``[N, 32]`` of all rows.
        most: how many.
    """
    order = np.lexsort(hashes[rows].T[::-1])
    return np.sort(rows[order[:most]])


def unit_rows(features: NDArray[np.floating]) -> _Matrix:
    """Rows ``[n, D]`` divided by their lengths, in float64; a row of zeros stays one."""
    rows = np.asarray(features, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def _k_means(rows: _Matrix, k: int) -> NDArray[np.int32]:
    from sklearn.cluster import KMeans  # a second, for those alone whose images have no labels
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # rows of fewer than k places make fewer clusters
        labels: NDArray[np.int32] = KMeans(k, n_init=2, random_state=0).fit(rows).labels_.astype(np.int32)
    return labels


def _distances(rows: _Matrix) -> _Matrix:
    """Euclidean, ``[n, n]``."""
    squares = np.einsum("nd,nd->n", rows, rows)
    found = np.sqrt(np.maximum(squares[:, None] + squares - 2 * (rows @ rows.T), 0))
    found[found < 1e-7] = 0  # what cancels in a row's distance to itself
    return np.asarray(found, dtype=np.float64)


def _nearest(rows: _Matrix, centres: _Matrix) -> NDArray[np.int32]:
    away = np.einsum("kd,kd->k", centres, centres) - 2 * (rows @ centres.T)
    return away.argmin(axis=1).astype(np.int32)


def _silhouette(distances: _Matrix, labels: NDArray[np.int32]) -> float:
    """Mean of (b − a) / max(a, b): a to the rows of the own cluster, b to those of the nearest other one."""
    n, k = len(labels), int(labels.max()) + 1
    member = np.zeros((n, k))
    member[np.arange(n), labels] = 1
    counts = member.sum(axis=0)
    sums = distances @ member
    own = sums[np.arange(n), labels] / np.maximum(counts[labels] - 1, 1)
    others = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    others[np.arange(n), labels] = np.inf
    nearest, alone = others.min(axis=1), counts[labels] == 1
    scale = np.maximum(own, nearest)
    values = np.divide(nearest - own, scale, out=np.zeros(n), where=(scale > 0) & ~alone)
    return float(values.mean())
