"""Entropy of the softmax."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.softmax import Softmax, finite_log, log_sum


def entropy_score(logits: ArrayLike) -> Floats:
    """log(−Σ p log p) of p = softmax(l), in nats; higher = more OOD.

    Chan et al., "Entropy Maximization and Meta Classification for Out-of-Distribution Detection in Semantic
    Segmentation", ICCV 2021, whose score is the entropy H = −Σ p log p: its logarithm keeps the order where H is too
    small for float32, at margins above 100. pytorch-ood clips p at 1e-7 first, which adds up to 1.6e-6 a class to H.

    Args:
        logits: [n, C]; −inf for classes that do not apply.

    Returns:
        [n] float32, at most log log C. −36.7 where one class alone applies: H is 0 there whatever the row.

    Raises:
        InputError: as `scaled_logits`.

    >>> np.exp(entropy_score([[0.0, 0.0], [1.0, -np.inf]])).round(4).tolist()
    [0.6930999755859375, 0.0]
    """
    softmax = Softmax.of(logits)
    surprise = softmax.surprise
    applies = np.isfinite(surprise)
    terms = np.subtract(softmax.log_surprise, surprise, out=np.full_like(surprise, -np.inf), where=applies)
    return finite_log(log_sum(terms))


@dataclass(eq=False)
class EntropyScorer(Scorer):
    """`entropy_score`; nothing to set and nothing to fit."""

    name: ClassVar[str] = "entropy"
    title: ClassVar[str] = "entropy"
    says: ClassVar[str] = "log of the softmax's entropy"
    paper: ClassVar[str] = "Chan 2021"
    cost: ClassVar[str] = "C"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def judge(self, x: ScoreInputs, memory: None) -> Floats:
        """Entropy a row, [n]."""
        return entropy_score(x.need("logits", self.name))
