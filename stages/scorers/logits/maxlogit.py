"""Largest logit."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.arrays import scaled_logits


def max_logit_score(logits: ArrayLike) -> Floats:
    """−max l; higher = more OOD.

    Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022.

    Args:
        logits: [n, C]; −inf for classes that do not apply.

    Returns:
        [n] float32.

    Raises:
        InputError: as `scaled_logits`.

    >>> max_logit_score([[0.5, 2.0], [-1.0, -np.inf]]).tolist()
    [-2.0, 1.0]
    """
    return np.asarray(-scaled_logits(logits, 1.0).max(axis=1), dtype=np.float32)


@dataclass(eq=False)
class MaxLogitScorer(Scorer):
    """`max_logit_score`; nothing to set and nothing to fit."""

    name: ClassVar[str] = "max-logit"
    title: ClassVar[str] = "max-logit"
    says: ClassVar[str] = "−max l"
    paper: ClassVar[str] = "Hendrycks 2022"
    cost: ClassVar[str] = "C"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def judge(self, x: ScoreInputs, memory: None) -> Floats:
        """Minus the largest logit a row, [n]."""
        return max_logit_score(x.need("logits", self.name))
