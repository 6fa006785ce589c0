"""Mahalanobis distances with one covariance: to the nearest class mean, relative to the mean of all, to the mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.moments import (
    RANK_RTOL,
    FeatureMoments,
    Matrix,
    RankTolerance,
    float64_rows,
    moments_of,
    squared_distances,
    whitened,
)
from stages.scorers.shared.shrinkage import ShrinkageRule, Shrunk, shrunk_scatter


@dataclass(frozen=True, eq=False)
class TiedGaussians:
    """Means and the one covariance Σ around them, in coordinates where Σ is the identity.

    Attributes:
        origin: [D] where these coordinates have their zero.
        whiten: [D, r] with whiten · whitenᵀ = Σ⁺, r the rank of Σ.
        means: [C, r] the means in these coordinates.
        shrinkage: intensity with which Σ was shrunk; None where it is the rows' own.
        remark: what to say of Σ, as of `stages.scorers.shared.shrinkage.Shrunk`.
    """

    origin: Matrix
    whiten: Matrix
    means: Matrix
    shrinkage: float | None = None
    remark: str = ""

    @classmethod
    def of(cls, means: ArrayLike, whiten: Matrix, shrinkage: float | None = None, remark: str = "") -> Self:
        """From means [C, D] and `whiten` [D, r]."""
        means = np.asarray(means, dtype=np.float64)
        origin = means.mean(axis=0)
        return cls(origin, whiten, (means - origin) @ whiten, shrinkage, remark)

    def nearest(self, features: ArrayLike, normalise: bool = False) -> NDArray[np.float64]:
        """min_c (z − μ_c)ᵀ Σ⁺ (z − μ_c) of features [n, D], [n] float64.

        Raises:
            InputError: another D, NaN or inf.
        """
        rows = float64_rows(features, normalise, len(self.whiten))
        rows -= self.origin
        return squared_distances(whitened(rows, self.whiten), self.means).min(axis=1)


def mahalanobis_score(features: ArrayLike, classes: TiedGaussians, normalise: bool = False) -> Floats:
    """min_c (z − μ_c)ᵀ Σ⁺ (z − μ_c); higher = more OOD.

    Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks", NeurIPS
    2018. On ℓ2-normalised features Mahalanobis++: Mueller and Hein, "Mahalanobis++: Improving OOD Detection via Feature
    Normalization", ICML 2025; and with one mean for all classes SSD: Sehwag et al., "SSD: A Unified Framework for
    Self-Supervised Outlier Detection", ICLR 2021.

    Args:
        features: [n, D], any float type; computed in float64.
        classes: class means, and the covariance Σ of the training rows around their own class's.
        normalise: take z / ‖z‖.

    Returns:
        [n] float32, at least 0.

    Raises:
        InputError: another D, NaN or inf.

    >>> mahalanobis_score([[3.0, 1.0]], TiedGaussians.of([[1.0, 1.0], [9.0, 0.0]], np.diag([0.5, 1.0])))
    array([1.], dtype=float32)
    """
    return np.asarray(classes.nearest(features, normalise), dtype=np.float32)


def relative_mahalanobis_score(
    features: ArrayLike, classes: TiedGaussians, background: TiedGaussians, normalise: bool = False
) -> Floats:
    """min_c (z − μ_c)ᵀ Σ⁺ (z − μ_c) − (z − μ)ᵀ Σ₀⁺ (z − μ); higher = more OOD.

    Ren et al., "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", arXiv 2106.09022; on
    ℓ2-normalised features relative Mahalanobis++ (Mueller and Hein, ICML 2025).

    Args:
        features: [n, D], any float type; computed in float64.
        classes: as in `mahalanobis_score`.
        background: the mean of all training rows, and their covariance Σ₀ around it.
        normalise: take z / ‖z‖.

    Returns:
        [n] float32, of either sign.

    Raises:
        InputError: another D, NaN or inf.

    >>> classes, background = TiedGaussians.of([[1.0], [9.0]], np.eye(1)), TiedGaussians.of([[5.0]], np.eye(1) / 2)
    >>> relative_mahalanobis_score([[3.0]], classes, background)
    array([3.], dtype=float32)
    """
    distance = classes.nearest(features, normalise) - background.nearest(features, normalise)
    return np.asarray(distance, dtype=np.float32)


@dataclass(eq=False)
class _TiedScorer(Scorer):
    """What the scores of this module share.

    Attributes:
        shrinkage: of Σ, as in `stages.scorers.shared.shrinkage.shrunk_scatter`; ``"auto"`` is ``"none"`` with a ridge.
        rank_rtol: directions whose variance is at most this share of the largest are left out of Σ⁺. ``"float32"``: D
            times the rounding of float32, which is what OpenOOD leaves out: scikit-learn's pseudo-inverse, of a float32
            covariance. A narrow spectrum loses nothing by it, a ViT's of D = 1536 all that is below 2e-4.
        ridge: added to the diagonal of the scatter n · Σ before it is inverted; with it nothing is left out.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"features", "bank", "labels"})
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
        {"openood": {"shrinkage": "none", "rank_rtol": "float32"}, "pytorch-ood": {"shrinkage": "none", "ridge": 1e-6}}
    )
    normalise: ClassVar[bool] = False

    shrinkage: ShrinkageRule = "auto"
    rank_rtol: RankTolerance = RANK_RTOL
    ridge: Annotated[float, Field(ge=0)] = 0.0

    def _moments(self, train: ScoreInputs, by_class: bool = True) -> FeatureMoments:
        return moments_of(train, self.name, self.normalise, by_class)

    def _shrunk(self, train: ScoreInputs, moments: FeatureMoments) -> Shrunk:
        rule = "none" if self.ridge and self.shrinkage == "auto" else self.shrinkage
        return shrunk_scatter(train, self.name, moments, rule)

    def _gaussians(self, means: Matrix, shrunk: Shrunk, n: int) -> TiedGaussians:
        scatter, rtol = shrunk.scatter, self.rank_rtol
        if self.ridge:
            scatter, rtol = scatter.plus(np.sqrt(self.ridge) * np.eye(means.shape[1])), 0.0
        return TiedGaussians.of(means, scatter.whitening(rtol) * np.sqrt(n), shrunk.intensity, shrunk.remark)

    def facts(self, memory: TiedGaussians | tuple[TiedGaussians, TiedGaussians]) -> dict[str, Any]:
        """Intensity of the shrinkage; rank of Σ where it is below D: other directions are not looked at."""
        tied = memory[0] if isinstance(memory, tuple) else memory
        dim, rank = tied.whiten.shape
        shrunk = {} if tied.shrinkage is None else {"shrinkage_intensity": tied.shrinkage}
        return ({"rank": rank} if rank < dim else {}) | shrunk

    def remark(self, memory: TiedGaussians | tuple[TiedGaussians, TiedGaussians]) -> str:
        """Whether Σ is not the rows' own."""
        return (memory[0] if isinstance(memory, tuple) else memory).remark


@dataclass(eq=False)
class MahalanobisScorer(_TiedScorer):
    """`mahalanobis_score`, by the covariance of the ID training rows around their class means.

    pytorch-ood's is this times ½ / n, for it does not divide the scatter by n.
    """

    name: ClassVar[str] = "mahalanobis"
    title: ClassVar[str] = "Mahalanobis"
    says: ClassVar[str] = "distance to the nearest class mean, one covariance"
    paper: ClassVar[str] = "Lee 2018"
    cost: ClassVar[str] = "D² + C·D"

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> TiedGaussians:
        """Class means and their covariance."""
        moments = self._moments(train)
        return self._gaussians(moments.class_means, self._shrunk(train, moments), len(moments))

    def judge(self, x: ScoreInputs, memory: TiedGaussians) -> Floats:
        """Squared distance to the nearest class mean, [n]."""
        return mahalanobis_score(x.need("features", self.name), memory, self.normalise)


@dataclass(eq=False)
class MahalanobisPPScorer(MahalanobisScorer):
    """Mahalanobis++: the same on ℓ2-normalised features."""

    name: ClassVar[str] = "mahalanobis-pp"
    title: ClassVar[str] = "Mahalanobis++"
    says: ClassVar[str] = "the same as Mahalanobis, normalised features"
    paper: ClassVar[str] = "Mueller 2025"
    normalise: ClassVar[bool] = True


@dataclass(eq=False)
class RelativeMahalanobisScorer(_TiedScorer):
    """`relative_mahalanobis_score`; pytorch-ood's is this divided by n."""

    name: ClassVar[str] = "relative-mahalanobis"
    title: ClassVar[str] = "relative Mahalanobis"
    says: ClassVar[str] = "Mahalanobis less the distance to the mean of all"
    paper: ClassVar[str] = "Ren 2021"
    cost: ClassVar[str] = "D² + C·D"

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> tuple[TiedGaussians, TiedGaussians]:
        """Class means with their covariance, and the mean of all rows with its own.

        Both are of one estimate, shrunk or not: the covariance of all is that around the class means plus that of the
        means. Shrunk apart, they would differ outside of the ID rows' plane, where no row tells one from the other.
        """
        moments = self._moments(train)
        shrunk = self._shrunk(train, moments)
        of_all = shrunk._replace(scatter=shrunk.scatter.plus(moments.between))
        return (
            self._gaussians(moments.class_means, shrunk, len(moments)),
            self._gaussians(moments.mean[None], of_all, len(moments)),
        )

    def judge(self, x: ScoreInputs, memory: tuple[TiedGaussians, TiedGaussians]) -> Floats:
        """Squared distance to the nearest class mean less that to the mean of all, [n]."""
        return relative_mahalanobis_score(x.need("features", self.name), *memory, self.normalise)


@dataclass(eq=False)
class RelativeMahalanobisPPScorer(RelativeMahalanobisScorer):
    """Relative Mahalanobis++: the same on ℓ2-normalised features."""

    name: ClassVar[str] = "relative-mahalanobis-pp"
    title: ClassVar[str] = "relative Mahalanobis++"
    says: ClassVar[str] = "the same as relative Mahalanobis, normalised features"
    paper: ClassVar[str] = "Mueller 2025"
    normalise: ClassVar[bool] = True


@dataclass(eq=False)
class SSDScorer(_TiedScorer):
    """SSD: `mahalanobis_score` of ℓ2-normalised features to the mean of all; no labels are read."""

    name: ClassVar[str] = "ssd"
    title: ClassVar[str] = "SSD"
    says: ClassVar[str] = "distance to the mean of all, normalised features"
    paper: ClassVar[str] = "Sehwag 2021"
    cost: ClassVar[str] = "D²"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "bank"})
    normalise: ClassVar[bool] = True

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> TiedGaussians:
        """The mean of all rows and their covariance."""
        moments = self._moments(train, by_class=False)  # all of one class, whose mean is that of all
        return self._gaussians(moments.class_means, self._shrunk(train, moments), len(moments))

    def judge(self, x: ScoreInputs, memory: TiedGaussians) -> Floats:
        """Squared distance to the mean, [n]."""
        return mahalanobis_score(x.need("features", self.name), memory, self.normalise)
