"""Energy of the logits."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.settings import Temperature
from stages.scorers.shared.arrays import scaled_logits


def energy_score(logits: ArrayLike, temperature: float = 1.0) -> NDArray[np.float32]:
    """−T · logsumexp(l / T); higher = more OOD.

    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020.

    Args:
        logits: [n, C]; −inf for classes that do not apply.
        temperature: T > 0.

    Returns:
        [n] float32, between −max l − T·log C and −max l.

    Raises:
        InputError: as `scaled_logits`.

    >>> energy_score([[0.0, 0.0], [10.0, 0.0], [10.0, -np.inf]]).round(4).tolist()
    [-0.6930999755859375, -10.0, -10.0]
    """
    return np.asarray(-temperature * logsumexp(scaled_logits(logits, temperature), axis=1), dtype=np.float32)


@dataclass(eq=False)
class EnergyScorer(Scorer):
    """`energy_score` with its temperature; nothing to fit."""

    name: ClassVar[str] = "energy"
    title: ClassVar[str] = "energy"
    says: ClassVar[str] = "−T·logsumexp(l / T)"
    paper: ClassVar[str] = "Liu 2020"
    cost: ClassVar[str] = "C"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    follows: ClassVar[frozenset[str]] = frozenset({"temperature"})

    temperature: Temperature = 1.0

    def judge(self, x: ScoreInputs, memory: None) -> Floats:
        """Energy a row, [n]."""
        return energy_score(x.need("logits", self.name), self.temperature)
