"""Norm of the last layer's gradient, in closed form."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from stages.errors import InputError
from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.arrays import checked_features
from stages.scorers.shared.softmax import Softmax


def gradnorm_score(features: ArrayLike, logits: ArrayLike) -> Floats:
    """−‖z‖₁ · ‖1 − C·p‖₁, p = softmax(l); higher = more OOD.

    Huang et al., "On the Importance of Gradients for Detecting Distributional Shifts in the Wild", NeurIPS 2021: minus
    the ℓ1 norm of the gradient of Σ_c −log p_c with respect to the last layer's weights, which is the outer product of
    (C·p − 1) and z. pytorch-ood, with its ``param_filter`` on those weights, takes the mean over classes: this / C.

    Args:
        features: [n, D], the last layer's input.
        logits: [n, C]; −inf for classes that do not apply, which count in nothing.

    Returns:
        [n] float32, at most 0.

    Raises:
        InputError: NaN or inf, other numbers of rows, and as `scaled_logits`.

    >>> gradnorm_score([[1.0, -2.0], [1.0, -2.0]], [[0.0, 0.0], [np.log(3), 0.0]]).round(4).tolist()
    [-0.0, -3.0]
    """
    z, p = checked_features(features, "GradNorm's"), Softmax.of(logits).p
    if len(z) != len(p):
        raise InputError(f"GradNorm needs as many rows of features as of logits, got {len(z)} and {len(p)}")
    applies = ~np.isneginf(np.asarray(logits))
    classes = applies.sum(axis=1, keepdims=True)
    pull = np.abs(1 - classes * p).sum(axis=1, where=applies)
    return np.asarray(-np.abs(z).sum(axis=1, dtype=np.float64) * pull, dtype=np.float32)


@dataclass(eq=False)
class GradNormScorer(Scorer):
    """`gradnorm_score`; nothing to set and nothing to fit."""

    name: ClassVar[str] = "gradnorm"
    title: ClassVar[str] = "GradNorm"
    says: ClassVar[str] = "minus the gradient of the last layer"
    paper: ClassVar[str] = "Huang 2021"
    cost: ClassVar[str] = "C + D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "logits"})

    def judge(self, x: ScoreInputs, memory: None) -> Floats:
        """Minus the gradient's norm a row, [n]."""
        return gradnorm_score(x.need("features", self.name), x.need("logits", self.name))
