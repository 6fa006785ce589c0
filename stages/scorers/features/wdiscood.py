"""Distances in the space that tells classes apart and in what is left of the features, both whitened."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.moments import (
    RANK_RTOL,
    Matrix,
    RankTolerance,
    float64_rows,
    moments_of,
    squared_distances,
    whitened,
)
from stages.scorers.shared.shrinkage import ShrinkageRule, shrunk_scatter


@dataclass(frozen=True, eq=False)
class Discriminants:
    """Class means in coordinates where the covariance around them is the identity, and where they differ most.

    Attributes:
        origin: [D] mean of all rows, where these coordinates have their zero.
        whiten: [D, r], rows times which have the identity for their covariance Σ_w around their class means.
        directions: [r, d] orthonormal columns, the discriminant directions.
        means: [C, d] class means along them.
        shrinkage: intensity with which Σ_w was shrunk; None where it is the rows' own.
        remark: what to say of Σ_w, as of `stages.scorers.shared.shrinkage.Shrunk`.
    """

    origin: Matrix
    whiten: Matrix
    directions: Matrix
    means: Matrix
    shrinkage: float | None = None
    remark: str = ""


def wdiscood_score(features: ArrayLike, classes: Discriminants, weight: float = 1.0, normalise: bool = False) -> Floats:
    """min_c ‖g(z) − g(μ_c)‖ + λ·‖h(z) − h(μ)‖; higher = more OOD.

    Chen et al., "WDiscOOD: Out-of-Distribution Detection via Whitened Linear Discriminant Analysis", ICCV 2023.
    Features are whitened by the covariance around class means; g projects them on the directions in which the means of
    classes differ most, h on all that is orthogonal to these, and μ is the mean of all rows.

    Args:
        features: [n, D], any float type; computed in float64.
        classes: means and directions of the training rows.
        weight: λ.
        normalise: take z / ‖z‖.

    Returns:
        [n] float32, at least 0.

    Raises:
        InputError: another D, NaN or inf.

    >>> classes = Discriminants(np.zeros(2), np.eye(2), np.array([[1.0], [0.0]]), np.array([[-2.0], [2.0]]))
    >>> wdiscood_score([[3.0, 4.0]], classes, weight=0.5).tolist()  # 1 from the second mean, and half of 4
    [3.0]
    """
    rows = float64_rows(features, normalise, len(classes.whiten))
    rows -= classes.origin
    rows = whitened(rows, classes.whiten)
    along = rows @ classes.directions
    nearest = np.sqrt(squared_distances(along, classes.means).min(axis=1))
    left = np.linalg.norm(rows - along @ classes.directions.T, axis=1)
    return np.asarray(nearest + weight * left, dtype=np.float32)


@dataclass(eq=False)
class WDiscOODScorer(Scorer):
    """`wdiscood_score`, with the discriminant directions of the ID training rows.

    Attributes:
        normalise: take z / ‖z‖, as the authors do for ViT-B and for contrastive features, and not for their ResNet-50.
        directions: d, how many discriminant directions at most; the authors take 1,000 of 2,048 and, of ViT-B, 512 of
            768 features, for 1,000 classes. None takes two thirds of the features. There are never more than classes
            less one: beyond them the means do not differ, and the authors' are whatever their solver gives.
        weight: λ; 1 is the authors' of ViT-B, of the others they take 5.
        shrinkage: of Σ_w, as in `stages.scorers.shared.shrinkage.shrunk_scatter`.
        rank_rtol: directions whose variance is at most this share of the largest are left out of Σ_w⁺.
    """

    name: ClassVar[str] = "wdiscood"
    title: ClassVar[str] = "WDiscOOD"
    says: ClassVar[str] = "distances in the whitened discriminant space and in the rest"
    paper: ClassVar[str] = "Chen 2023"
    cost: ClassVar[str] = "D² + C·D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "bank", "labels"})

    normalise: bool = True
    directions: Annotated[int, Field(ge=1)] | None = None
    weight: Annotated[float, Field(ge=0)] = 1.0
    shrinkage: ShrinkageRule = "auto"
    rank_rtol: RankTolerance = RANK_RTOL

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> Discriminants:
        """Class means, their covariance, and the directions in which whitened means differ.

        Whitened, the covariance around class means is the identity: what linear discriminant analysis finds there are
        the principal directions of the means around the mean of all, each class counting alike.
        """
        moments = moments_of(train, self.name, self.normalise)
        shrunk = shrunk_scatter(train, self.name, moments, self.shrinkage)
        whiten = shrunk.scatter.whitening(self.rank_rtol) * np.sqrt(len(moments))
        means = (moments.class_means - moments.mean) @ whiten
        _, lengths, found = np.linalg.svd(means, full_matrices=False)
        differ = min(int((lengths > RANK_RTOL * lengths[0]).sum()), len(means) - 1)
        most = self.directions or max(1, 2 * moments.dim // 3)
        directions = np.ascontiguousarray(found[: min(most, differ)].T)
        return Discriminants(moments.mean, whiten, directions, means @ directions, shrunk.intensity, shrunk.remark)

    def judge(self, x: ScoreInputs, memory: Discriminants) -> Floats:
        """Distance to the nearest class mean where classes differ, and to the mean of all where not, [n]."""
        return wdiscood_score(x.need("features", self.name), memory, self.weight, self.normalise)

    def facts(self, memory: Discriminants) -> dict[str, Any]:
        """How many directions, where that is not what was set; rank of Σ_w where it is below D; its shrinkage."""
        (dim, rank), used = memory.whiten.shape, memory.directions.shape[1]
        shrunk = {} if memory.shrinkage is None else {"shrinkage_intensity": memory.shrinkage}
        return (
            ({} if used == self.directions else {"directions_used": used})
            | ({"rank": rank} if rank < dim else {})
            | shrunk
        )

    def remark(self, memory: Discriminants) -> str:
        """Whether Σ_w is not the rows' own."""
        return memory.remark
