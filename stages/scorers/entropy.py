"""Entropy of the softmax."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from stages.scorers.base import Floats, ScoreInputs, Scorer
from stages.scorers.softmax import softmax_of


def entropy_score(logits: ArrayLike) -> Floats:
    """−Σ p log p of p = softmax(l), in nats; higher = more OOD.

    Chan et al., "Entropy Maximization and Meta Classification for Out-of-Distribution Detection in Semantic
    Segmentation", ICCV 2021. pytorch-ood clips p at 1e-7 first, which adds up to 1.6e-6 a class; here a saturated row
    has its own small entropy.

    Args:
        logits: [n, C]; −inf for classes that do not apply.

    Returns:
        [n] float32 in [0, log C].

    Raises:
        InputError: as `scaled_logits`.

    >>> entropy_score([[0.0, 0.0], [1.0, -np.inf]]).round(4).tolist()
    [0.6930999755859375, 0.0]
    """
    p, _, surprise = softmax_of(logits)
    return np.asarray(np.multiply(p, surprise, out=np.zeros_like(p), where=p > 0).sum(axis=1), dtype=np.float32)


@dataclass(eq=False)
class EntropyScorer(Scorer):
    """`entropy_score`; nothing to set and nothing to fit."""

    name: ClassVar[str] = "entropy"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def judge(self, x: ScoreInputs, memory: None) -> Floats:
        """Entropy a row, [n]."""
        return entropy_score(x.need("logits", self.name))
