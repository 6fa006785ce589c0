"""Mahalanobis distances with one covariance: to the nearest class mean, relative to the mean of all, to the mean.

Features are as they are, divided by their norms, or by a power of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stages.id_data.lazy import Floats
from stages.metrics.ranking import auroc
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.moments import (
    RANK_RTOL,
    FeatureMoments,
    Matrix,
    RankTolerance,
    float64_rows,
    known_labels,
    moments_of,
    squared_distances,
    whitened,
)
from stages.scorers.shared.pairs import seeded_share
from stages.scorers.shared.shrinkage import ShrinkageRule, Shrunk, shrunk_scatter

BETA_GRID = (0.0, 0.5, 1.0, 1.5, 2.0)
_ROWS_TO_CHOOSE = 16384  # a beta by


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

    def distances(self, features: ArrayLike, normalise: float = False) -> NDArray[np.float64]:
        """(z − μ_c)ᵀ Σ⁺ (z − μ_c) of features [n, D] and every class, [n, C] float64.

        Raises:
            InputError: another D, NaN or inf.
        """
        rows = float64_rows(features, normalise, len(self.whiten))
        rows -= self.origin
        return squared_distances(whitened(rows, self.whiten), self.means)

    def nearest(self, features: ArrayLike, normalise: float = False) -> NDArray[np.float64]:
        """The least of `distances` over the classes, [n] float64."""
        return self.distances(features, normalise).min(axis=1)


def mahalanobis_score(features: ArrayLike, classes: TiedGaussians, normalise: float = False) -> Floats:
    """min_c (z − μ_c)ᵀ Σ⁺ (z − μ_c); higher = more OOD.

    Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks", NeurIPS
    2018. On ℓ2-normalised features Mahalanobis++: Mueller and Hein, "Mahalanobis++: Improving OOD Detection via Feature
    Normalization", ICML 2025; between and beyond the two, on z / ‖z‖^β, Janiak et al., "A Geometry-Based View of
    Mahalanobis OOD Detection", arXiv 2510.15202. With one mean for all classes SSD: Sehwag et al., "SSD: A Unified
    Framework for Self-Supervised Outlier Detection", ICLR 2021.

    Args:
        features: [n, D], any float type; computed in float64.
        classes: class means, and the covariance Σ of the training rows around their own class's.
        normalise: take z / ‖z‖; a number β: z / ‖z‖^β.

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

    def _tied(self, train: ScoreInputs, normalise: float) -> TiedGaussians:
        """Class means and their covariance."""
        moments = moments_of(train, self.name, normalise)
        return self._gaussians(moments.class_means, self._shrunk(train, moments), len(moments))

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
        return self._tied(train, self.normalise)

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


class RadialGaussians(NamedTuple):
    """Gaussians of features divided by a power of their norm.

    Attributes:
        gaussians: of z / ‖z‖^β.
        beta: β.
        auroc: by which it was chosen; None where it was given, or where there was nothing to choose it by.
    """

    gaussians: TiedGaussians
    beta: float
    auroc: float | None


@dataclass(eq=False)
class RadialMahalanobisScorer(_TiedScorer):
    """`mahalanobis_score` of z / ‖z‖^β; β = 0 is `MahalanobisScorer`, β = 1 `MahalanobisPPScorer`.

    Attributes:
        beta: β. ``"auto"`` chooses one of `BETA_GRID` by ID training rows alone, as `chosen_beta` does.
    """

    name: ClassVar[str] = "mahalanobis-radial"
    title: ClassVar[str] = "radial Mahalanobis"
    says: ClassVar[str] = "the same as Mahalanobis, features divided by a power of their norm"
    paper: ClassVar[str] = "Janiak 2025"
    cost: ClassVar[str] = "D² + C·D"

    beta: Annotated[float, Field(ge=0, le=2)] | Literal["auto"] = "auto"

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> RadialGaussians:
        """β, and class means and covariance of the features that it gives."""
        beta, area = self.chosen_beta(train) if self.beta == "auto" else (float(self.beta), None)
        return RadialGaussians(self._tied(train, beta), beta, area)

    def chosen_beta(self, train: ScoreInputs) -> tuple[float, float | None]:
        """The β that best tells rows of a class that is left out from rows whose class is there, and its AUROC.

        Every second row of each class is fitted on; each of the others plays ID by its distance to the nearest class
        mean, and OOD by that to the nearest of another class. The best AUROC wins, the β nearest to 1 among equals; 1
        where no two classes have a row to fit on, or none has a second row. No OOD row is looked at. The paper chooses
        β by the geometry of ID rows too; its rule is not in its abstract, and no code of its authors was found.
        """
        labels = known_labels(train, self.name)
        some = np.arange(len(labels))
        if len(labels) > _ROWS_TO_CHOOSE:
            some = seeded_share(len(labels), _ROWS_TO_CHOOSE / len(labels))
        second = _second_of_class(labels[some])
        fitted, asked, classes = some[~second], some[second], np.unique(labels[some])
        if len(classes) < 2 or not len(asked):
            return 1.0, None
        half = ScoreInputs(features=train.take(fitted).need("features", self.name), labels=labels[fitted])
        features, own = train.take(asked).need("features", self.name), np.searchsorted(classes, labels[asked])
        areas: dict[float, float] = {}
        for beta in BETA_GRID:
            distances = self._tied(half, beta).distances(features, beta)
            inside = distances.min(axis=1)
            distances[np.arange(len(own)), own] = np.inf
            areas[beta] = auroc(inside, distances.min(axis=1))
        best = max(areas, key=lambda beta: (areas[beta], -abs(beta - 1)))
        return best, areas[best]

    def judge(self, x: ScoreInputs, memory: RadialGaussians) -> Floats:
        """Squared distance to the nearest class mean, [n]."""
        return mahalanobis_score(x.need("features", self.name), memory.gaussians, memory.beta)

    def facts(self, memory: Any) -> dict[str, Any]:
        """What those of the family have, and β with its AUROC where it was to be chosen."""
        chosen = {} if self.beta != "auto" else {"beta_used": memory.beta}
        return super().facts(memory.gaussians) | chosen | ({} if memory.auroc is None else {"beta_auroc": memory.auroc})

    def remark(self, memory: Any) -> str:
        """Whether Σ is not the rows' own, and whether there was a β to choose."""
        nothing = "beta is 1, for no ID class can be left out and be told from others"
        unchosen = nothing if self.beta == "auto" and memory.auroc is None else ""
        return "; ".join(said for said in (super().remark(memory.gaussians), unchosen) if said)


def _second_of_class(labels: NDArray[np.integer]) -> NDArray[np.bool_]:
    """[n] whether a row is the second, fourth, … of its class."""
    order = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    second = np.empty(len(labels), dtype=bool)
    second[order] = (np.arange(len(labels)) - np.repeat(starts, counts)) % 2 == 1
    return second


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
