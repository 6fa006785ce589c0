"""Generalised entropy of the largest probabilities."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.softmax import ALONE, Softmax, finite_log, log_sum


def gen_score(logits: ArrayLike, gamma: float = 0.1, top: int | None = 100, floor: float = 0.0) -> Floats:
    """log(Σ p^γ (1 − p)^γ) over the M largest of p = softmax(l); higher = more OOD.

    Liu et al., "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection", CVPR 2023, whose score is the
    sum: the logarithm keeps the order where the sum itself is too small for float32. pytorch-ood gives the mean over
    the M, the sum divided by M.

    Args:
        logits: [n, C]; −inf for classes that do not apply.
        gamma: γ > 0.
        top: M; None, and a number above C, takes all classes.
        floor: p is clipped into [floor, 1 − floor] first.

    Returns:
        [n] float32; −36.7 γ where one class alone applies.

    Raises:
        InputError: as `scaled_logits`.

    >>> np.exp(gen_score([[0.0, 0.0], [40.0, 0.0]], gamma=0.5)).round(4).tolist()
    [1.0, 0.0]
    """
    softmax = Softmax.of(logits)
    log_p, log_rest = -softmax.surprise, softmax.log_rest
    if floor:
        log_p, log_rest = (each.clip(np.log(floor), np.log1p(-floor)) for each in (log_p, log_rest))
    if top is not None and top < log_p.shape[1]:
        largest = np.argpartition(log_p, -top, axis=1)[:, -top:]
        log_p, log_rest = (np.take_along_axis(each, largest, axis=1) for each in (log_p, log_rest))
    return finite_log(log_sum(gamma * (log_p + log_rest)), gamma * ALONE)


@dataclass(eq=False)
class GENScorer(Scorer):
    """`gen_score`; nothing to fit.

    The paper's γ and M are its choice for ImageNet (``benchmark.py`` of github.com/XixiLiu95/GEN), and OpenOOD's.
    """

    name: ClassVar[str] = "gen"
    title: ClassVar[str] = "GEN"
    says: ClassVar[str] = "log of the generalised entropy of the largest probabilities"
    paper: ClassVar[str] = "Liu 2023"
    cost: ClassVar[str] = "C"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    profiles: ClassVar = {"pytorch-ood": {"top": None, "floor": 1e-7}}

    gamma: Annotated[float, Field(gt=0)] = 0.1
    top: Annotated[int, Field(ge=1)] | None = 100
    floor: Annotated[float, Field(ge=0, lt=0.5)] = 0.0

    def judge(self, x: ScoreInputs, memory: None) -> Floats:
        """GEN a row, [n]."""
        return gen_score(x.need("logits", self.name), self.gamma, self.top, self.floor)
