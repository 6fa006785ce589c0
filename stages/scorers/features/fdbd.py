"""fDBD: distance to the decision boundaries of the linear head."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.arrays import scaled_logits
from stages.scorers.shared.moments import Matrix, float64_rows, moments_of

_NEAREST = 1e-8  # a row that is the mean has no direction from it: pytorch-ood's bound


def fdbd_score(
    features: ArrayLike, logits: ArrayLike, weight_distances: ArrayLike, mean: ArrayLike, average: bool = True
) -> Floats:
    """−mean over c ≠ ŷ of (l_ŷ − l_c) / ‖w_ŷ − w_c‖, divided by ‖z − μ‖; higher = more OOD.

    Liu and Qin, "Fast Decision Boundary based Out-of-Distribution Detector", ICML 2024.

    Args:
        features: [n, D], any float type; computed in float64.
        logits: [n, C], of a linear head on these features; ŷ is the largest one's class.
        weight_distances: [C, C] ‖w_p − w_c‖. Where two classes have one weight there is no boundary between them, and
            they are left out of the mean.
        mean: [D] of the ID training features.
        average: False sums over the classes, as OpenOOD: C − 1 times as much.

    Returns:
        [n] float32, at most 0; 0 where there is but one class.

    Raises:
        InputError: another D, NaN or inf.

    >>> fdbd_score([[3.0, 4.0]], [[5.0, 1.0, 2.0]], [[0, 2, 1], [2, 0, 1], [1, 1, 0]], mean=[0.0, 0.0])
    array([-0.5], dtype=float32)
    """
    mean, logits = np.asarray(mean, dtype=np.float64), scaled_logits(logits, 1.0)
    from_mean = np.linalg.norm(float64_rows(features, dim=len(mean)) - mean, axis=1)
    largest = logits.argmax(axis=1)
    between = np.asarray(weight_distances, dtype=np.float64)[largest]  # (n, C); 0 for the class itself
    gaps = logits.max(axis=1, keepdims=True) - logits
    there = between > 0
    distances = np.divide(gaps, between, out=np.zeros_like(gaps), where=there).sum(axis=1)
    if average:
        distances /= np.maximum(there.sum(axis=1), 1)
    return np.asarray(-distances / np.maximum(from_mean, _NEAREST), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Boundaries:
    """Distances between the classes' weights [C, C], and the mean of the ID training features [D]."""

    weight_distances: Matrix
    mean: Matrix


@dataclass(eq=False)
class FDBDScorer(Scorer):
    """`fdbd_score`.

    Attributes:
        reduction: ``"mean"`` over the other classes, or their ``"sum"``.
    """

    name: ClassVar[str] = "fdbd"
    title: ClassVar[str] = "fDBD"
    says: ClassVar[str] = "minus the distance to the decision boundaries"
    paper: ClassVar[str] = "Liu 2024"
    cost: ClassVar[str] = "C + D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "logits", "head", "bank"})
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({"openood": {"reduction": "sum"}})

    reduction: Literal["mean", "sum"] = "mean"

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> Boundaries:
        """Distances between the weights, and the mean feature."""
        weight = np.asarray(train.need_head(self.name).weight, dtype=np.float64)
        mean = moments_of(train, self.name, by_class=False, scatter=False).mean
        return Boundaries(cdist(weight, weight), mean)

    def judge(self, x: ScoreInputs, memory: Boundaries) -> Floats:
        """Negative distance to the boundaries, [n]."""
        features, logits = x.need("features", self.name), x.need("logits", self.name)
        return fdbd_score(features, logits, memory.weight_distances, memory.mean, self.reduction == "mean")
