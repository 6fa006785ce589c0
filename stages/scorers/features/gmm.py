"""Density of one Gaussian for each class."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.linalg import LinAlgError, cholesky, solve_triangular
from scipy.special import logsumexp

from stages.errors import InputError
from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.moments import (
    FeatureMoments,
    Matrix,
    float64_rows,
    known_labels,
    moments_of,
    squared_distances,
)
from stages.scorers.shared.shrinkage import (
    FEW_ROWS,
    ShrinkageRule,
    Shrunk,
    is_scarce,
    shrunk_scatter,
    shrunk_towards,
    varies,
)

_JITTERS = (0.0, *(10.0**exponent for exponent in range(-12, 1)))  # in units of the mean variance
_BLOCK = 4096  # rows of a class at once
_MAX_BYTES = 2 << 30  # of the class covariances, and as much of their factors


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """One Gaussian a class, weighted by the share of rows that the class has.

    Attributes:
        shares: [C] π_c, adding up to 1.
        means: [C, D].
        factors: [C, D, D] lower Cholesky factors of the covariances, or [1, D, D] of the one that all classes share.
        jitter: what was added to the diagonals of the covariances.
        n_shrunk: how many covariances are shrunk.
        remark: what to say of them, as of `stages.scorers.shared.shrinkage.Shrunk`.
    """

    shares: Matrix
    means: Matrix
    factors: Matrix
    jitter: float
    n_shrunk: int = 0
    remark: str = ""

    @classmethod
    def of(cls, shares: ArrayLike, means: ArrayLike, covariances: ArrayLike, jitter: float | None = None) -> Self:
        """From covariances.

        Args:
            shares: [C].
            means: [C, D].
            covariances: [C, D, D], or [1, D, D] of all classes together.
            jitter: added to the diagonal of every one. None takes, of 0 and 1e-12 to 1 times the mean variance, the
                first with which all have their full rank in float64.

        Raises:
            InputError: a covariance that is singular all the same.
        """
        covariances = np.asarray(covariances, dtype=np.float64)
        variance = float(np.trace(covariances, axis1=1, axis2=2).mean()) / covariances.shape[1]
        for tried in [share * variance for share in _JITTERS] if jitter is None else [jitter]:
            factors = _factors(covariances, tried, full_rank=jitter is None)
            if factors is not None:
                return cls(np.asarray(shares, np.float64), np.asarray(means, np.float64), factors, tried)
        raise InputError(
            f"a covariance of the ID training features is singular, with {tried:g} on its diagonal: give more jitter"
        )

    def log_density(self, rows: Matrix) -> NDArray[np.float64]:
        """The log of Σ_c π_c N(z; μ_c, Σ_c) of rows [n, D], [n]."""
        log_determinants = 2 * np.log(np.diagonal(self.factors, axis1=1, axis2=2)).sum(axis=1)  # (C,) or (1,)
        densities = -0.5 * (self._squares(rows) + log_determinants + rows.shape[1] * np.log(2 * np.pi))
        return logsumexp(densities, b=self.shares, axis=1)

    def _squares(self, rows: Matrix) -> Matrix:
        """Squared Mahalanobis distances to the classes, [n, C]."""
        if len(self.factors) == 1:
            origin = self.means.mean(axis=0)
            white, means = _whitened(self.factors[0], rows - origin), _whitened(self.factors[0], self.means - origin)
            return squared_distances(white, means)
        whites = (_whitened(factor, rows - mean) for factor, mean in zip(self.factors, self.means, strict=True))
        return np.stack([np.square(white).sum(axis=1) for white in whites], axis=1)


def _whitened(factor: Matrix, rows: Matrix) -> Matrix:
    """Rows [n, D] in coordinates where the covariance is the identity."""
    return solve_triangular(factor, rows.T, lower=True, check_finite=False).T


def _factors(covariances: Matrix, jitter: float, full_rank: bool) -> Matrix | None:
    """Their lower Cholesky factors with ``jitter`` on the diagonals; None where one is singular."""
    factors = np.empty_like(covariances)
    diagonal = np.arange(covariances.shape[1])
    for factor, covariance in zip(factors, covariances, strict=True):
        factor[...] = covariance
        factor[diagonal, diagonal] += jitter
        try:
            factor[...] = cholesky(factor, lower=True, check_finite=False)
        except LinAlgError:
            return None
        pivots = np.square(factor[diagonal, diagonal])
        # A singular matrix may have a factor by the luck of its rounding; its pivots show it.
        if full_rank and pivots.min() <= len(pivots) * np.finfo(np.float64).eps * pivots.max():
            return None
    return factors


def gmm_score(features: ArrayLike, mixture: GaussianMixture) -> Floats:
    """−log Σ_c π_c N(z; μ_c, Σ_c); higher = more OOD.

    Mukhoti et al., "Deep Deterministic Uncertainty: A New Simple Baseline", CVPR 2023: Gaussian discriminant analysis
    on the features of a classifier.

    Args:
        features: [n, D], any float type; computed in float64.
        mixture: of the ID training rows.

    Returns:
        [n] float32.

    Raises:
        InputError: another D, NaN or inf.

    >>> mixture = GaussianMixture.of([0.5, 0.5], [[0.0], [1.0]], [[[1.0]], [[4.0]]])
    >>> gmm_score([[0.0]], mixture).round(4).tolist()  # −log(0.3989 / 2 + 0.1760 / 2)
    [1.2466000318527222]
    """
    rows = float64_rows(features, dim=mixture.means.shape[1])
    return np.asarray(-mixture.log_density(rows), dtype=np.float32)


@dataclass(eq=False)
class GMMScorer(Scorer):
    """`gmm_score`, by the covariances of the ID training rows (divided by n).

    Attributes:
        covariance: ``"class"`` gives each class its own, C × D × D numbers and as much work a row; ``"shared"`` one to
            all of them.
        shrinkage: ``"auto"`` moves a class's covariance that has few rows towards the one around all class means, and
            that one, where it has few too, towards a multiple of the identity (`stages.scorers.shared.shrinkage`);
            ``"none"``, and a given jitter, leave them.
        jitter: added to the diagonals; None takes the smallest that does, as the paper's code tries them.
    """

    name: ClassVar[str] = "gmm"
    title: ClassVar[str] = "GMM"
    says: ClassVar[str] = "minus the log density of one Gaussian a class"
    paper: ClassVar[str] = "Mukhoti 2023"
    cost: ClassVar[str] = "C·D²"
    costly: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"features", "bank", "labels"})
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
        {"pytorch-ood": {"shrinkage": "none", "jitter": 1e-6}}
    )

    covariance: Literal["class", "shared"] = "class"
    shrinkage: Literal["auto", "none"] = "auto"
    jitter: Annotated[float, Field(ge=0)] | None = None

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> GaussianMixture:
        """Shares, means and covariances of the classes.

        Raises:
            InputError: class covariances that take more than 2 GiB.
        """
        if self.covariance == "class":
            return self._of_classes(train)
        tied = moments_of(train, self.name)
        shrunk = shrunk_scatter(train, self.name, tied, self._rule)
        mixture = GaussianMixture.of(
            tied.counts / len(tied), tied.class_means, shrunk.scatter.matrix[None] / len(tied), self.jitter
        )
        return mixture if shrunk.intensity is None else replace(mixture, n_shrunk=1, remark=shrunk.remark)

    @property
    def _rule(self) -> ShrinkageRule:
        return self.shrinkage if self.jitter is None else "none"

    def check_size(self, n_classes: int, dim: int) -> None:
        """Refuse class covariances that take more than 2 GiB: known before there are rows.

        Raises:
            InputError: of C classes and D features they would.
        """
        taken = 8 * n_classes * dim * dim
        if self.covariance != "shared" and taken > _MAX_BYTES:
            raise InputError(
                f"gmm: covariances of {n_classes} classes and {dim} features take {taken / 2**30:.1f} GiB, "
                f'{_MAX_BYTES >> 30} are allowed: set score.params.gmm.covariance = "shared"'
            )

    def _of_classes(self, train: ScoreInputs) -> GaussianMixture:
        features, classes = train.need_unread(self.name), known_labels(train, self.name)
        seen, counts = np.unique(classes, return_counts=True)
        self.check_size(len(seen), features.shape[1])
        shape = len(seen), features.shape[1], features.shape[1]
        means, covariances, n_shrunk = np.empty(shape[:2]), np.empty(shape), 0
        target: Shrunk | None = None
        for index, label in enumerate(seen):
            moments = FeatureMoments()
            rows = np.flatnonzero(classes == label)
            for start in range(0, len(rows), _BLOCK):
                moments.add(np.asarray(features[rows[start : start + _BLOCK]]))
            means[index], covariances[index] = moments.mean, moments.within.matrix / len(moments)
            if self._rule == "auto" and (is_scarce(len(rows), 1, shape[1]) or not varies(moments.within, moments)):
                target = target or shrunk_scatter(train, self.name, moments_of(train, self.name))
                of_all, own = target.scatter.matrix / len(train), ScoreInputs(features=features[rows])
                covariances[index] = shrunk_towards(of_all, covariances[index], own, self.name, moments)
                n_shrunk += 1
        mixture = GaussianMixture.of(counts / len(train), means, covariances, self.jitter)
        return mixture if target is None else replace(mixture, n_shrunk=n_shrunk, remark=target.remark or FEW_ROWS)

    def judge(self, x: ScoreInputs, memory: GaussianMixture) -> Floats:
        """Negative log density, [n]."""
        return gmm_score(x.need("features", self.name), memory)

    def facts(self, memory: GaussianMixture) -> dict[str, Any]:
        """What was added to the diagonals, where that was chosen, and how many covariances were shrunk."""
        shrunk = {"covariances_shrunk": memory.n_shrunk} if memory.n_shrunk else {}
        return ({"jitter_used": memory.jitter} if self.jitter is None else {}) | shrunk

    def remark(self, memory: GaussianMixture) -> str:
        """Whether the covariances are not the rows' own."""
        return memory.remark
