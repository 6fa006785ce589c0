"""Sufficient statistics of ID training features: what Gaussian and subspace scores are fitted from.

Counts, class means and one D × D matrix, gathered from blocks of rows in float64. A million rows of D = 1536 and
C = 1000 classes need a block, the means and that matrix: a few hundred MB, and never rows × classes × D.
"""

from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.linalg import blas, lapack

from stages.errors import InputError
from stages.scorers.inputs import ScoreInputs
from stages.scorers.shared.arrays import checked_features

Matrix = NDArray[np.float64]

# Directions whose variance is below this share of the largest are rounding of the sum over rows: not the data's.
RANK_RTOL = 1e-12
RankTolerance = Annotated[float, Field(ge=0, lt=1)] | Literal["float32"]


class Scatter:
    """A sum of outer products Σ rᵀr of rows r: kept as the rows while they are few, as the D × D matrix from there on.

    Few rows of many features are common here (an expert's own, or a small set), and the spectrum of m rows costs m³
    and not D³.

    Args:
        dim: D.

    >>> Scatter(2).add(np.array([[1.0, 2.0]])).matrix.tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """

    def __init__(self, dim: int) -> None:
        self._rows: NDArray[np.float64] | None = np.zeros((0, dim))
        self._matrix = np.zeros((0, 0))  # once there are no rows
        self._whitenings: dict[RankTolerance, NDArray[np.float64]] = {}  # that were asked for

    @property
    def matrix(self) -> NDArray[np.float64]:
        """[D, D] float64."""
        return self._matrix if self._rows is None else self._rows.T @ self._rows

    @property
    def dim(self) -> int:
        """D."""
        return len(self._matrix) if self._rows is None else self._rows.shape[1]

    def trace(self) -> float:
        """Sum of the diagonal."""
        return float(np.trace(self._matrix) if self._rows is None else np.square(self._rows).sum())

    def squared_norm(self) -> float:
        """Sum of the squares of all elements: of few rows r, Σ (rᵢ·rⱼ)²."""
        small = self._matrix if self._rows is None else self._rows @ self._rows.T
        return float(np.vdot(small, small))

    def add(self, rows: NDArray[np.float64]) -> Self:
        """Takes rows [n, D] in, and returns itself."""
        self._whitenings.clear()
        if self._rows is not None and 2 * (len(self._rows) + len(rows)) <= self._rows.shape[1]:
            self._rows = np.concatenate([self._rows, rows])
            return self
        if self._rows is not None:
            self._matrix, self._rows = self._rows.T @ self._rows, None
        self._matrix += rows.T @ rows
        return self

    def plus(self, rows: NDArray[np.float64]) -> "Scatter":
        """This with rows [n, D] added; this stays as it is."""
        if self._rows is not None:
            return Scatter(self._rows.shape[1]).add(np.concatenate([self._rows, rows]))
        both = Scatter(len(self._matrix))
        both._rows, both._matrix = None, self._matrix + rows.T @ rows
        return both

    def over(self, scale: NDArray[np.float64]) -> "Scatter":
        """That of the rows with each feature divided by ``scale`` [D]."""
        divided = Scatter(len(scale))
        if self._rows is not None:
            return divided.add(self._rows / scale)
        divided._rows, divided._matrix = None, self._matrix / np.outer(scale, scale)
        return divided

    def shrunk(self, intensity: float) -> "Scatter":
        """(1 − intensity) of this, and as much of the identity that the trace stays.

        >>> Scatter(2).add(np.array([[2.0, 0.0]])).shrunk(0.5).matrix.tolist()
        [[3.0, 0.0], [0.0, 1.0]]
        """
        mixed = Scatter(self.dim)
        mixed._rows, mixed._matrix = None, (1 - intensity) * self.matrix
        mixed._matrix[np.diag_indices(self.dim)] += intensity * self.trace() / self.dim
        return mixed

    def spectrum(self, rtol: RankTolerance = RANK_RTOL) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Eigenvalues and eigenvectors of the matrix, the largest first, without those that count as 0.

        Args:
            rtol: eigenvalues of at most this share of the largest count as 0. ``"float32"``: D times the rounding of
                float32, which is what scikit-learn and torch leave out of the pseudo-inverse of a float32 matrix.

        Returns:
            [r] and [D, r], orthonormal columns.

        Raises:
            InputError: no positive eigenvalue.
        """
        if self._rows is None:
            values, vectors = np.linalg.eigh(self._matrix)  # ascending
        else:
            values, small = np.linalg.eigh(self._rows @ self._rows.T)
            vectors = self._rows.T @ small  # still to be divided by their lengths, the roots of the values
        if not len(values) or not values[-1] > 0:
            raise InputError("the ID training features do not vary: a covariance needs rows that differ")
        kept = np.flatnonzero(values > _share(rtol, len(vectors)) * values[-1])[::-1]
        values, vectors = values[kept], vectors[:, kept]
        return values, vectors if self._rows is None else vectors / np.sqrt(values)

    def whitening(self, rtol: RankTolerance = RANK_RTOL) -> NDArray[np.float64]:
        """W with W·Wᵀ the pseudo-inverse of the matrix: rows times W have the unit matrix for their scatter.

        The inverse of a Cholesky factor where nothing is left out, and else by eigenvectors: D > n is common here, and
        a Cholesky factor of a matrix that is singular up to rounding exists or not by chance.

        Args:
            rtol: as in `spectrum`.

        Returns:
            [D, rank] float64, read-only.

        Raises:
            InputError: no positive eigenvalue, so nothing to divide by.

        >>> Scatter(3).add(np.diag([2.0, 0.0, 0.5])).whitening().tolist()
        [[0.5, 0.0], [0.0, 0.0], [0.0, 2.0]]
        """
        if rtol not in self._whitenings:
            whiten = None if self._rows is not None else _triangular_whitening(self._matrix, rtol)
            if whiten is None:
                values, vectors = self.spectrum(rtol)
                whiten = vectors / np.sqrt(values)
            whiten.flags.writeable = False
            self._whitenings[rtol] = whiten
        return self._whitenings[rtol]


def _share(rtol: RankTolerance, dim: int) -> float:
    return dim * float(np.finfo(np.float32).eps) if rtol == "float32" else float(rtol)


def _triangular_whitening(matrix: NDArray[np.float64], rtol: RankTolerance) -> NDArray[np.float64] | None:
    """The inverse transpose of the matrix's Cholesky factor; None where an eigenvalue might count as 0."""
    factor, failed = lapack.dpotrf(matrix, lower=1)
    if failed:
        return None
    # LAPACK's estimate is within a small factor of the condition in the 1-norm, which bounds that of the eigenvalues.
    reciprocal_condition, _ = lapack.dpocon(factor, np.abs(matrix).sum(axis=0).max(), uplo="L")
    if reciprocal_condition <= 10 * _share(rtol, len(matrix)):
        return None
    return lapack.dtrtri(factor, lower=1)[0].T


class FeatureMoments:
    """Counts, means and scatter of labelled rows, one pass, block by block.

    Blocks are merged as in Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979: only positive terms are added, so that nothing cancels however far from 0 the features lie.

    Args:
        normalise: power of its Euclidean norm that every row is divided by, as in `float64_rows`.
        scatter: False gathers counts and means alone, and does none of the D × D work.

    Attributes:
        classes: [C] labels seen, ascending.
        counts: [C] rows of each.
        class_means: [C, D] float64.
        within: Σ (z − μ_class)(z − μ_class)ᵀ over all rows; not divided by their number.

    >>> moments = FeatureMoments().add([[1.0, 0.0], [3.0, 0.0]], np.array([7, 7])).add([[0.0, 4.0]], np.array([9]))
    >>> moments.class_means.tolist(), moments.within.matrix.tolist()
    ([[2.0, 0.0], [0.0, 4.0]], [[2.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, normalise: float = False, scatter: bool = True) -> None:
        self.normalise = normalise
        self.scatter = scatter
        self.classes = np.zeros(0, dtype=np.int64)
        self.counts = np.zeros(0, dtype=np.int64)
        self.class_means = np.zeros((0, 0))
        self.within = Scatter(0)  # stays empty without scatter

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
    def total(self) -> Scatter:
        """Σ (z − μ)(z − μ)ᵀ around the mean μ of all rows; not divided by their number."""
        return self.within.plus(self.between)

    @property
    def between(self) -> NDArray[np.float64]:
        """[C, D] the class means around the mean of all, each times the root of its rows: their scatter's rows."""
        between: NDArray[np.float64] = np.sqrt(self.counts)[:, None] * (self.class_means - self.mean)
        return between

    def about(self, origin: NDArray[np.float64]) -> Scatter:
        """Σ (z − origin)(z − origin)ᵀ; not divided by the number of rows."""
        return self.total.plus(np.sqrt(len(self)) * (self.mean - origin)[None])

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
            self.within = Scatter(dim)
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
            known = before > 0
            apart = np.sqrt(before * counts / after)[known, None] * step[known]
            self.within.add(rows).add(apart)
        self.class_means[at] += (counts / after)[:, None] * step
        self.counts[at] = after


def moments_of(
    train: ScoreInputs, who: str, normalise: float = False, by_class: bool = True, scatter: bool = True
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

    def gathered() -> FeatureMoments:
        moments = FeatureMoments(normalise, scatter)
        for block in train.blocks():
            moments.add(block.need("features", who), known_labels(block, who) if by_class else None)
        return moments

    return train.remembered((FeatureMoments, float(normalise), by_class, scatter), gathered)


def fourth_moment(train: ScoreInputs, who: str, moments: FeatureMoments) -> float:
    """Σ ‖z − μ_class‖⁴ of ID training rows, read block by block once their means are known.

    Args:
        train: the rows that the moments are of.
        who: the score that needs it, for messages.
        moments: their means; of one class, rows are measured from the mean of all, whatever their labels.
    """
    total = 0.0
    for block in train.blocks():
        rows = float64_rows(block.need("features", who), moments.normalise)
        alone = len(moments.classes) == 1
        rows -= moments.class_means[0 if alone else np.searchsorted(moments.classes, known_labels(block, who))]
        total += float(np.square(np.einsum("nd,nd->n", rows, rows)).sum())
    return total


def known_labels(train: ScoreInputs, who: str) -> NDArray[np.integer]:
    """Labels [n] of ID training rows.

    Raises:
        InputError: no labels, or rows whose label is unknown (negative).
    """
    labels = train.need("labels", who)
    if unknown := int((labels < 0).sum()):
        raise InputError(f"{who} needs the class of every ID training row, {unknown} rows have none")
    return labels


def float64_rows(features: ArrayLike, normalise: float = False, dim: int | None = None) -> NDArray[np.float64]:
    """A copy of features [n, D] in float64, divided by their Euclidean norms where asked; a zero row stays zero.

    `stages.scorers.neighbours.bank.l2_normalise` rounds to float32, which dividing by a small variance would blow up.

    Args:
        features: [n, D], any float type.
        normalise: power of its norm that a row is divided by: True, 1, makes all norms 1; False, 0, leaves the rows.
        dim: the D that they must have.

    Raises:
        InputError: not two-dimensional, NaN or inf, or a D that is not ``dim``.
    """
    rows = np.array(checked_dim(features, dim), dtype=np.float64)
    if normalise:
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        if normalise != 1:
            np.power(norms, normalise, out=norms, where=norms > 0)
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


def whitened(rows: NDArray[np.float64], whiten: NDArray[np.float64]) -> NDArray[np.float64]:
    """``rows @ whiten`` of rows [n, D], in half the work where ``whiten`` is of a Cholesky factor."""
    if whiten.shape[0] != whiten.shape[1] or not _is_triangular(whiten):
        return rows @ whiten
    product: NDArray[np.float64] = blas.dtrmm(1.0, whiten.T, rows.T, side=0, lower=1)  # column-major, as BLAS has it
    return product.T


def _is_triangular(matrix: NDArray[np.float64], strip: int = 64) -> bool:
    """Whether all that is below the diagonal is 0; strips of rows, for a look at each takes longer than the look."""
    return not any(
        matrix[top : top + strip, :top].any() or np.tril(matrix[top : top + strip, top : top + strip], -1).any()
        for top in range(0, len(matrix), strip)
    )


def squared_distances(rows: NDArray[np.float64], means: NDArray[np.float64]) -> NDArray[np.float64]:
    """‖row − mean‖² of rows [n, r] and means [C, r], [n, C] and at least 0: one matmul, never n × C × r.

    Expanding the square cancels to about 1e-16 of ‖row‖² + ‖mean‖², so take both around a point among them.
    """
    squares = rows @ (-2 * means.T)
    squares += np.einsum("nr,nr->n", rows, rows)[:, None]
    squares += np.einsum("cr,cr->c", means, means)
    return np.maximum(squares, 0, out=squares)
