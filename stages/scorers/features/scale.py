"""Energy of features scaled by how much of their sum the largest hold."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from stages.heads.affine import LinearHead
from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.logits.energy import energy_score
from stages.scorers.scorer import Scorer
from stages.scorers.shared.shaping import activations, kept_count, mass_ratio


def scale_score(features: ArrayLike, head: LinearHead, percentile: float = 85.0) -> Floats:
    """Energy of the head on z · exp(s₁ / s₂); higher = more OOD.

    Xu et al., "Scaling for Training Time and Post-hoc Out-of-distribution Detection Enhancement", ICLR 2024. s₁ is the
    sum of a row's activations, s₂ that of those above its percentile; nothing is pruned. Made for activations that are
    not negative; weak on a ViT's features.

    Args:
        features: [n, D].
        head: weights and bias on them.
        percentile: share of each row's activations that s₂ leaves out, per cent.

    Returns:
        [n] float32.

    Raises:
        InputError: NaN or inf, or another D than the head's.

    >>> head = LinearHead(np.eye(2), np.zeros(2))
    >>> scale_score([[2.0, 2.0]], head, 50).round(4).tolist() == energy_score([[2 * np.e**2] * 2]).round(4).tolist()
    True
    """
    z = activations(features, "SCALE's")
    k = kept_count(z.shape[1], percentile)
    largest = np.partition(z, -k, axis=1)[:, -k:]
    ratio = mass_ratio(z.sum(axis=1, dtype=np.float64), largest.sum(axis=1, dtype=np.float64))
    return energy_score(head.logits(z * np.exp(ratio)[:, None].astype(np.float32)))


@dataclass(eq=False)
class SCALEScorer(Scorer):
    """`scale_score`; nothing to fit but the head.

    The paper's percentile is that of ``configs/postprocessors/scale.yml`` in github.com/kai422/SCALE, and OpenOOD's.
    """

    name: ClassVar[str] = "scale"
    title: ClassVar[str] = "SCALE"
    says: ClassVar[str] = "energy of rescaled features"
    paper: ClassVar[str] = "Xu 2024"
    cost: ClassVar[str] = "C·D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "head"})
    profiles: ClassVar = {"pytorch-ood": {"percentile": 65.0}}

    percentile: Annotated[float, Field(ge=0, lt=100)] = 85.0

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> LinearHead:
        """The head."""
        return train.need_head(self.name)

    def judge(self, x: ScoreInputs, memory: LinearHead) -> Floats:
        """Energy of the scaled row, [n]."""
        return scale_score(x.need("features", self.name), memory, self.percentile)
