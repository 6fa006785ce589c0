"""Energy of logits scaled by how much of the features' sum the largest hold."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.logits.energy import energy_score
from stages.scorers.scorer import Scorer
from stages.scorers.shared.shaping import activations, kept_count, mass_ratio


def lts_score(features: ArrayLike, logits: ArrayLike, top: float = 5.0) -> Floats:
    """Energy of l · (s₁ / s₂)²; higher = more OOD.

    Djurisic et al., "Logit Scaling for Out-of-Distribution Detection", 2024. s₁ is the sum of a row's activations and
    s₂ that of its largest, both after a ReLU, as in the paper's code. Made for activations that are not negative; weak
    on a ViT's features.

    Args:
        features: [n, D].
        logits: [n, C]; −inf for classes that do not apply.
        top: share of the activations that s₂ sums, per cent; at least one.

    Returns:
        [n] float32.

    Raises:
        InputError: NaN or inf, and as `scaled_logits`.

    >>> lts_score([[1.0, 1.0]], [[3.0, -np.inf]], top=50).tolist()
    [-12.0]
    """
    z = np.maximum(activations(features, "LTS's"), 0)
    k = kept_count(z.shape[1], 100 - top)
    largest = np.partition(z, -k, axis=1)[:, -k:]
    ratio = mass_ratio(z.sum(axis=1, dtype=np.float64), largest.sum(axis=1, dtype=np.float64))
    return energy_score(np.asarray(logits, dtype=np.float64) * (ratio**2)[:, None])


@dataclass(eq=False)
class LTSScorer(Scorer):
    """`lts_score`; nothing to fit."""

    name: ClassVar[str] = "lts"
    title: ClassVar[str] = "LTS"
    says: ClassVar[str] = "energy of rescaled logits"
    paper: ClassVar[str] = "Djurisic 2024"
    cost: ClassVar[str] = "C + D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "logits"})

    top: Annotated[float, Field(gt=0, le=100)] = 5.0

    def judge(self, x: ScoreInputs, memory: None) -> Floats:
        """Energy of the scaled logits, [n]."""
        return lts_score(x.need("features", self.name), x.need("logits", self.name), self.top)
