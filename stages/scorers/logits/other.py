"""The routed expert's own word for it: the odds of its "other"."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from stages.errors import InputError
from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.arrays import scaled_logits


def other_score(logits: ArrayLike, other: ArrayLike) -> Floats:
    """Log odds of "other", o − log Σ_c exp(l_c), at the expert that a row went to; higher = more OOD.

    The group softmax of Huang and Li, "MOS: Towards Scaling Out-of-distribution Detection for Large Semantic Space",
    CVPR 2021, whose score is the smallest probability of "other" over all groups (``mos``); here the router picks the
    group. The probability, 1 / (1 + exp(−this)), has the same order, but rounds to 1 beyond log odds of 17.

    Args:
        logits: [n, C] of the expert's classes; −inf for those outside its group.
        other: [n] logit of its "other".

    Returns:
        [n] float32.

    Raises:
        InputError: not one "other" a row, NaN or inf.

    >>> np.exp(other_score([[0.0, -np.inf], [0.0, 0.0]], [np.log(3), 0.0])).round(4).tolist()  # odds of ¾ and ⅓
    [3.0, 0.5]
    """
    energies, others = logsumexp(scaled_logits(logits, 1.0), axis=1), np.asarray(other, dtype=np.float64)
    if others.shape != energies.shape or not np.isfinite(others).all():
        raise InputError(f'logits of "other": one finite number a row is needed, got shape {others.shape}, NaN or inf')
    return np.asarray(others - energies, dtype=np.float32)


@dataclass(eq=False)
class OtherScorer(Scorer):
    """`other_score`; nothing to set and nothing to fit."""

    name: ClassVar[str] = "other"
    title: ClassVar[str] = "other"
    says: ClassVar[str] = 'log odds of the routed expert\'s "other"'
    paper: ClassVar[str] = "Huang 2021"
    cost: ClassVar[str] = "C"
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "other"})

    def judge(self, x: ScoreInputs, memory: None) -> Floats:
        """Log odds of "other" a row, [n]."""
        return other_score(x.need("logits", self.name), x.need("other", self.name))
