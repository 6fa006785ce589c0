"""Sufficient statistics of ID training features: what Gaussian and subspace scores are fitted from.

Counts, class means and one D × D matrix, gathered from blocks of rows in float64. A million rows of D = 1536 and
C = 1000 classes need a block, the means and that matrix: a few hundred MB, and never rows × classes × D.
"""

from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stages.bank import checked_features
from stages.errors import InputError
from stages.scorers.base import ScoreInputs

# Directions whose variance is below this share of the largest are rounding of the sum over rows: not the data's.
RANK_RTOL = 1e-12
RankTolerance = Annotated[float, Field(ge=0, lt=1)] | Literal["float32"]


class FeatureMoments:
    """Counts, means and scatter of labelled rows, one pass, block by block.

    Blocks are merged as in Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979: only positive terms are added, so that nothing cancels however far from 0 the features lie.

    Args:
        normalise: take every row divided by its Euclidean norm (in float64; a zero row stays zero).
        scatter: False gathers counts and means alone, and does none of the D × D work.

    Attributes:
        classes: [C] labels seen, ascending.
        counts: [C] rows of each.
        class_means: [C, D] float64.
        within: [D, D] float64, Σ (z − μ_class)(z − μ_class)ᵀ over all rows; not divided by their number.

    >>> moments = FeatureMoments().add([[1.0, 0.0], [3.0, 0.0]], np.array([7, 7])).add([[0.0, 4.0]], np.array([9]))
    >>> moments.class_means.tolist(), moments.within.tolist()
    ([[2.0, 0.0], [0.0, 4.0]], [[2.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, normalise: bool = False, scatter: bool = True) -> None:
        self.normalise = normalise
        self.scatter = scatter
        self.classes = np.zeros(0, dtype=np.int64)
        self.counts = np.zeros(0, dtype=np.int64)
        self.class_means = np.zeros((0, 0))
        self.within = np.zeros((0, 0))  # stays empty without scatter

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def dim(self) -> int:
        """D."""
        return int(self.class_means.shape[1])

    @property
    def mean(self) -> NDArray[np.float64]:
        """[D] mean of all rows.

        Raises:
            InputError: no rows.
        """
        if not len(self):
            raise InputError("no ID training rows to take a mean of")
        return self.counts @ self.class_means / len(self)

    @property
    def total(self) -> NDArray[np.float64]:
        """[D, D] Σ (z − μ)(z − μ)ᵀ around the mean μ of all rows; not divided by their number."""
        apart = np.sqrt(self.counts)[:, None] * (self.class_means - self.mean)
        return self.within + apart.T @ apart

    def about(self, origin: NDArray[np.float64]) -> NDArray[np.float64]:
        """[D, D] Σ (z − origin)(z − origin)ᵀ; not divided by the number of rows."""
        offset = self.mean - origin
        return self.total + len(self) * np.outer(offset, offset)

    def add(self, features: ArrayLike, labels: NDArray[np.integer] | None = None) -> Self:
        """Takes rows in, and returns itself.

        Args:
            features: [n, D], any float type; one block: a few thousand rows.
            labels: [n] integers; None counts all rows as of one class, 0.

        Raises:
            InputError: not two-dimensional, another D than before, NaN or inf, or not one label a row.
        """
        rows = float64_rows(features, self.normalise)
        labels = np.zeros(len(rows), dtype=np.int64) if labels is None else np.asarray(labels)
        if labels.shape != (len(rows),):
            raise InputError(f"{len(rows)} ID training features, but labels of shape {labels.shape}")
        if self.dim and rows.shape[1] != self.dim:
            raise InputError(f"ID training features have {rows.shape[1]} columns, those before {self.dim}")
        if len(rows):
            self._make_room(np.unique(labels), rows.shape[1])
            self._merge(rows, labels)
        return self

    def _make_room(self, seen: NDArray[np.integer], dim: int) -> None:
        classes = np.union1d(self.classes, seen)
        at = np.searchsorted(classes, self.classes)
        counts, means = np.zeros(len(classes), dtype=np.int64), np.zeros((len(classes), dim))
        if len(self.classes):
            counts[at], means[at] = self.counts, self.class_means
        elif self.scatter:
            self.within = np.zeros((dim, dim))
        self.classes, self.counts, self.class_means = classes, counts, means

    def _merge(self, rows: NDArray[np.float64], labels: NDArray[np.integer]) -> None:
        order = np.argsort(labels, kind="stable")
        seen, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
        rows = rows[order]
        means = np.add.reduceat(rows, starts, axis=0) / counts[:, None]  # (classes of the block, D)
        at = np.searchsorted(self.classes, seen)
        before = self.counts[at]
        after = before + counts
        step = means - self.class_means[at]
        if self.scatter:
            rows -= np.repeat(means, counts, axis=0)
            self.within += rows.T @ rows
            apart = np.sqrt(before * counts / after)[:, None] * step
            self.within += apart.T @ apart
        self.class_means[at] += (counts / after)[:, None] * step
        self.counts[at] = after


def moments_of(
    train: ScoreInputs, who: str, normalise: bool = False, by_class: bool = True, scatter: bool = True
) -> FeatureMoments:
    """Moments of ID training rows, read block by block.

    Args:
        train: rows with ``features``, and ``labels`` where they are counted by class.
        who: the score that needs them, for messages.
        normalise: as in `FeatureMoments`.
        by_class: False counts all rows as of one class.
        scatter: as in `FeatureMoments`.

    Raises:
        InputError: no labels, a row without one (negative), or NaN or inf in a feature.
    """
    moments = FeatureMoments(normalise, scatter)
    for block in train.blocks():
        moments.add(block.need("features", who), known_labels(block, who) if by_class else None)
    return moments


def known_labels(train: ScoreInputs, who: str) -> NDArray[np.integer]:
    """Labels [n] of ID training rows.

    Raises:
        InputError: no labels, or rows whose label is unknown (negative).
    """
    labels = train.need("labels", who)
    if unknown := int((labels < 0).sum()):
        raise InputError(f"{who} needs the class of every ID training row, {unknown} rows have none")
    return labels


def float64_rows(features: ArrayLike, normalise: bool = False, dim: int | None = None) -> NDArray[np.float64]:
    """A copy of features [n, D] in float64, divided by their Euclidean norms where asked; a zero row stays zero.

    `stages.bank.l2_normalise` rounds to float32, which dividing by a small variance would blow up.

    Raises:
        InputError: not two-dimensional, NaN or inf, or a D that is not ``dim``.
    """
    rows = np.array(checked_dim(features, dim), dtype=np.float64)
    if normalise:
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        np.divide(rows, norms, out=rows, where=norms > 0)
    return rows


def checked_dim(features: ArrayLike, dim: int | None) -> NDArray[np.floating]:
    """Features as a float array [n, D].

    Raises:
        InputError: not two-dimensional, NaN or inf, or a D that is not ``dim``, where that is given.
    """
    rows = checked_features(features, "ID training" if dim is None else "scored")
    if dim is not None and rows.shape[1] != dim:
        raise InputError(f"scored features have {rows.shape[1]} columns, the ID training features {dim}")
    return rows


def squared_distances(rows: NDArray[np.float64], means: NDArray[np.float64]) -> NDArray[np.float64]:
    """‖row − mean‖² of rows [n, r] and means [C, r], [n, C] and at least 0: one matmul, never n × C × r.

    Expanding the square cancels to about 1e-16 of ‖row‖² + ‖mean‖², so take both around a point among them.
    """
    squares = -2 * rows @ means.T
    squares += np.einsum("nr,nr->n", rows, rows)[:, None]
    squares += np.einsum("cr,cr->c", means, means)
    return np.maximum(squares, 0, out=squares)


def whitening(matrix: NDArray[np.float64], rtol: RankTolerance = RANK_RTOL) -> NDArray[np.float64]:
    """W with W·Wᵀ the pseudo-inverse of a symmetric positive semi-definite matrix: rows times W have unit covariance.

    By its eigenvectors, for a full rank and a deficient one alike: D > n is common here, and a Cholesky factor of a
    matrix that is singular up to rounding exists or not by chance.

    Args:
        matrix: [D, D].
        rtol: directions with an eigenvalue of at most this share of the largest are left out; ``"float32"``: D times
            the rounding of float32, as scikit-learn and torch leave them out where the matrix is float32.

    Returns:
        [D, rank] float64.

    Raises:
        InputError: no positive eigenvalue, so nothing to divide by.

    >>> whitening(np.diag([4.0, 0.0, 0.25])).tolist()
    [[0.0, 0.5], [0.0, 0.0], [2.0, 0.0]]
    """
    values, vectors = np.linalg.eigh(matrix)  # ascending
    if not values[-1] > 0:
        raise InputError("the ID training features do not vary: a covariance needs rows that differ")
    share = len(values) * float(np.finfo(np.float32).eps) if rtol == "float32" else rtol
    kept = values > share * values[-1]
    return vectors[:, kept] / np.sqrt(values[kept])
