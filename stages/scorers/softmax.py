"""Softmax that keeps what float arithmetic would round away beside a probability near 1."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.scorers.base import scaled_logits


class Softmax(NamedTuple):
    """Probabilities and what is lost in them when one is near 1; all float64.

    Attributes:
        p: [n, C] probabilities; 0 where a class does not apply.
        rest: [n, C] 1 − p, exact for the largest as well.
        surprise: [n, C] −log p; +inf where a class does not apply.
    """

    p: NDArray[np.float64]
    rest: NDArray[np.float64]
    surprise: NDArray[np.float64]


def softmax_of(logits: ArrayLike, temperature: float = 1.0) -> Softmax:
    """Softmax of each row of logits [n, C]; −inf where a class does not apply.

    1 − p of the largest is the sum of the others, and −log p a sum of terms that are not negative: saturated rows keep
    their order.

    Raises:
        InputError: as `scaled_logits`.

    >>> one = softmax_of([[50.0, 0.0]])
    >>> float(one.rest[0, 0]), float(1 - one.p[0, 0])
    (1.9287498479639178e-22, 0.0)
    """
    scaled = scaled_logits(logits, temperature)
    rows = np.arange(len(scaled))
    largest = scaled.argmax(axis=1)
    below = scaled[rows, largest][:, None] - scaled  # how far each logit is below the largest
    others = np.exp(-below)
    others[rows, largest] = 0
    mass = others.sum(axis=1)  # of all but the largest, whose own is 1
    p = others / (1 + mass)[:, None]
    p[rows, largest] = 1 / (1 + mass)
    rest = 1 - p
    rest[rows, largest] = mass / (1 + mass)
    return Softmax(p, rest, below + np.log1p(mass)[:, None])
