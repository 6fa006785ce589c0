"""NCI: how a centred feature lies to the weight of its predicted class."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.arrays import scaled_logits
from stages.scorers.shared.moments import Matrix, float64_rows, moments_of


def nci_score(
    features: ArrayLike, logits: ArrayLike, weight: ArrayLike, mean: ArrayLike, alpha: float = 1e-4
) -> Floats:
    """−w_ŷ · (z − μ) / ‖z − μ‖ − α‖z‖₁; higher = more OOD.

    Liu and Qin, "Detecting Out-of-Distribution Through the Lens of Neural Collapse", CVPR 2025.

    Args:
        features: [n, D], any float type; computed in float64.
        logits: [n, C], of a linear head on these features; ŷ is the largest one's class.
        weight: [C, D] of the head.
        mean: [D] of the ID training features.
        alpha: what a unit of the feature's ℓ1 norm counts.

    Returns:
        [n] float32. A row that is the mean has no direction from it, and its first term is 0.

    Raises:
        InputError: another D, NaN or inf.

    >>> nci_score([[3.0, 4.0]], [[1.0, 0.0]], weight=[[5.0, 0.0], [0.0, 1.0]], mean=[0.0, 0.0], alpha=1.0)
    array([-10.], dtype=float32)
    """
    mean = np.asarray(mean, dtype=np.float64)
    rows = float64_rows(features, dim=len(mean))
    predicted = np.asarray(weight, dtype=np.float64)[scaled_logits(logits, 1.0).argmax(axis=1)]
    apart = rows - mean
    length = np.linalg.norm(apart, axis=1)
    along = np.einsum("nd,nd->n", apart, predicted)
    near = np.divide(along, length, out=np.zeros_like(along), where=length > 0)
    return np.asarray(-near - alpha * np.abs(rows).sum(axis=1), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Collapse:
    """The head's weights [C, D] and the mean of the ID training features [D]."""

    weight: Matrix
    mean: Matrix


@dataclass(eq=False)
class NCIScorer(Scorer):
    """`nci_score`.

    Attributes:
        alpha: the paper chooses it on validation sets with OOD rows, which is not done here; the default is OpenOOD's.
    """

    name: ClassVar[str] = "nci"
    title: ClassVar[str] = "NCI"
    says: ClassVar[str] = "angle to the predicted class's weight, less norm"
    paper: ClassVar[str] = "Liu 2025"
    cost: ClassVar[str] = "D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "logits", "head", "bank"})
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({"pytorch-ood": {"alpha": 0.0}})

    alpha: Annotated[float, Field(ge=0)] = 1e-4

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> Collapse:
        """Weights of the head, and the mean feature."""
        weight = np.asarray(train.need_head(self.name).weight, dtype=np.float64)
        return Collapse(weight, moments_of(train, self.name, by_class=False, scatter=False).mean)

    def judge(self, x: ScoreInputs, memory: Collapse) -> Floats:
        """Negative NCI, [n]."""
        features, logits = x.need("features", self.name), x.need("logits", self.name)
        return nci_score(features, logits, memory.weight, memory.mean, self.alpha)
