"""Generalised entropy of the largest probabilities."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from stages.scorers.base import Floats, ScoreInputs, Scorer
from stages.scorers.softmax import softmax_of


def gen_score(logits: ArrayLike, gamma: float = 0.1, top: int | None = 100, floor: float = 0.0) -> Floats:
    """Σ p^γ (1 − p)^γ over the M largest of p = softmax(l); higher = more OOD.

    Liu et al., "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection", CVPR 2023. pytorch-ood gives
    the mean over the M, which is this divided by M.

    Args:
        logits: [n, C]; −inf for classes that do not apply.
        gamma: γ > 0.
        top: M; None, and a number above C, takes all classes.
        floor: p is clipped into [floor, 1 − floor] first.

    Returns:
        [n] float32.

    Raises:
        InputError: as `scaled_logits`.

    >>> gen_score([[0.0, 0.0], [40.0, 0.0]], gamma=0.5).round(4).tolist()
    [1.0, 0.0]
    """
    p, rest, _ = softmax_of(logits)
    if floor:
        p, rest = p.clip(floor, 1 - floor), rest.clip(floor, 1 - floor)
    if top is not None and top < p.shape[1]:
        largest = np.argpartition(p, -top, axis=1)[:, -top:]
        p, rest = np.take_along_axis(p, largest, axis=1), np.take_along_axis(rest, largest, axis=1)
    return np.asarray(((p * rest) ** gamma).sum(axis=1), dtype=np.float32)


@dataclass(eq=False)
class GENScorer(Scorer):
    """`gen_score`; nothing to fit.

    The paper's γ and M are its choice for ImageNet (``benchmark.py`` of github.com/XixiLiu95/GEN), and OpenOOD's.
    """

    name: ClassVar[str] = "gen"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    profiles: ClassVar = {"pytorch-ood": {"top": None, "floor": 1e-7}}

    gamma: Annotated[float, Field(gt=0)] = 0.1
    top: Annotated[int, Field(ge=1)] | None = 100
    floor: Annotated[float, Field(ge=0, lt=0.5)] = 0.0

    def judge(self, x: ScoreInputs, memory: None) -> Floats:
        """GEN a row, [n]."""
        return gen_score(x.need("logits", self.name), self.gamma, self.top, self.floor)
