"""Maximum softmax probability."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.scorers.base import Floats, ScoreInputs, Scorer, Temperature, scaled_logits


def msp_score(logits: ArrayLike, temperature: float = 1.0) -> NDArray[np.float32]:
    """−max softmax(l / T); higher = more OOD.

    Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples", ICLR 2017;
    with T ≠ 1, Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
        logits: [n, C]; −inf for classes that do not apply.
        temperature: T > 0.

    Returns:
        [n] float32 in [−1, −1/C]. Confident rows saturate: beyond a margin of about 17 they all tie at −1.

    Raises:
        InputError: as `scaled_logits`.

    >>> msp_score([[0.0, 0.0], [np.log(3), 0.0], [5.0, -np.inf]]).tolist()
    [-0.5, -0.75, -1.0]
    """
    scaled = scaled_logits(logits, temperature)
    # The largest softmax is 1 / Σ exp(l − max l): its own term is exp(0).
    return np.asarray(-1 / np.exp(scaled - scaled.max(axis=1, keepdims=True)).sum(axis=1), dtype=np.float32)


@dataclass(eq=False)
class MSPScorer(Scorer):
    """`msp_score` with its temperature; nothing to fit."""

    name: ClassVar[str] = "msp"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    follows: ClassVar[frozenset[str]] = frozenset({"temperature"})

    temperature: Temperature = 1.0

    def judge(self, x: ScoreInputs, memory: None) -> Floats:
        """MSP a row, [n]."""
        return msp_score(x.need("logits", self.name), self.temperature)
