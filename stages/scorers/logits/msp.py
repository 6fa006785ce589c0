"""Maximum softmax probability."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.settings import Temperature
from stages.scorers.shared.softmax import Softmax, finite_log


def msp_score(logits: ArrayLike, temperature: float = 1.0) -> NDArray[np.float32]:
    """log(1 − max p), p = softmax(l / T); higher = more OOD.

    Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples", ICLR 2017;
    with T ≠ 1, Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. Their score is −max p, which rounds
    to −1 for every row whose margin passes 17 in float32, 37 in float64. This is an increasing function of it,
    −max p = exp(this) − 1: the same order and the same metrics, without the ties.

    Args:
        logits: [n, C]; −inf for classes that do not apply.
        temperature: T > 0.

    Returns:
        [n] float32, at most log(1 − 1/C); about minus the margin for confident rows. −36.7 where one class alone
        applies: p is 1 there whatever the row.

    Raises:
        InputError: as `scaled_logits`.

    >>> np.expm1(msp_score([[0.0, 0.0], [np.log(3), 0.0], [5.0, -np.inf]])).round(4).tolist()
    [-0.5, -0.75, -1.0]
    >>> msp_score([[500.0, 0.0], [1000.0, 0.0]]).tolist()
    [-500.0, -1000.0]
    """
    return finite_log(Softmax.of(logits, temperature).log_doubt)


@dataclass(eq=False)
class MSPScorer(Scorer):
    """`msp_score` with its temperature; nothing to fit."""

    name: ClassVar[str] = "msp"
    title: ClassVar[str] = "MSP"
    says: ClassVar[str] = "log(1 − max p), p = softmax(l / T)"
    paper: ClassVar[str] = "Hendrycks 2017"
    cost: ClassVar[str] = "C"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    follows: ClassVar[frozenset[str]] = frozenset({"temperature"})

    temperature: Temperature = 1.0

    def judge(self, x: ScoreInputs, memory: None) -> Floats:
        """MSP a row, [n]."""
        return msp_score(x.need("logits", self.name), self.temperature)
