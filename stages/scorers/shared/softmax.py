"""Softmax that keeps what float arithmetic would round away beside a probability near 1."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.scorers.shared.arrays import scaled_logits

# Logarithm of 1 − p where no other class applies, so that p = 1 whatever the row: there p rounds to 1 in float64.
# Minus infinity is what it is, but that cannot be averaged, standardised or stored in a table.
ALONE = float(np.log(np.finfo(np.float64).eps / 2))


@dataclass(frozen=True, eq=False)
class Softmax:
    """Softmax of rows of logits, by how far each logit is below the largest of its row; all float64.

    1 − p of the largest is the sum of the others, and −log p a sum of terms that are not negative: saturated rows keep
    their order, in logarithms whatever their margin.

    Attributes:
        below: [n, C]; +inf where a class does not apply.
        largest: [n] the first class with the largest logit.
        log_mass: [n] log of the sum of exp(−below) of all but that one; −inf where no other class applies.

    >>> one = Softmax.of([[50.0, 0.0]])
    >>> float(one.rest[0, 0]), float(1 - one.p[0, 0])
    (1.9287498479639178e-22, 0.0)
    """

    below: NDArray[np.float64]
    largest: NDArray[np.intp]
    log_mass: NDArray[np.float64]

    @classmethod
    def of(cls, logits: ArrayLike, temperature: float = 1.0) -> Self:
        """Of logits [n, C]; −inf where a class does not apply.

        Raises:
            InputError: as `scaled_logits`.
        """
        scaled = scaled_logits(logits, temperature)
        rows = np.arange(len(scaled))
        largest = scaled.argmax(axis=1)
        below = scaled[rows, largest][:, None] - scaled
        below[rows, largest] = np.inf  # left out of the sum
        log_mass = log_sum(-below)
        below[rows, largest] = 0
        return cls(below, largest, log_mass)

    @cached_property
    def _log_total(self) -> NDArray[np.float64]:
        """[n] log of the sum over all classes, −log p of the largest."""
        return np.logaddexp(0, self.log_mass)

    def _with_largest(self, values: NDArray[np.float64], largest: NDArray[np.float64]) -> NDArray[np.float64]:
        values[np.arange(len(values)), self.largest] = largest
        return values

    @property
    def p(self) -> NDArray[np.float64]:
        """[n, C] probabilities; 0 where a class does not apply."""
        return np.exp(-self.surprise)

    @property
    def rest(self) -> NDArray[np.float64]:
        """[n, C] 1 − p, exact for the largest as well."""
        return self._with_largest(1 - self.p, np.exp(self.log_doubt))

    @property
    def surprise(self) -> NDArray[np.float64]:
        """[n, C] −log p; +inf where a class does not apply."""
        return self.below + self._log_total[:, None]

    @property
    def log_rest(self) -> NDArray[np.float64]:
        """[n, C] log(1 − p); −inf for the only class that applies."""
        with np.errstate(divide="ignore"):  # of the largest, which is put in its place
            return self._with_largest(np.log1p(-self.p), self.log_doubt)

    @property
    def log_doubt(self) -> NDArray[np.float64]:
        """[n] log(1 − p) of the largest; −inf where no other class applies."""
        return -np.logaddexp(0, -self.log_mass)

    @property
    def log_surprise(self) -> NDArray[np.float64]:
        """[n, C] log(−log p); +inf where a class does not apply."""
        with np.errstate(divide="ignore"):  # of the largest, which is put in its place
            return self._with_largest(np.log(self.surprise), log_of_log1p(self.log_mass))


def finite_log(values: NDArray[np.float64], alone: float = ALONE) -> NDArray[np.float32]:
    """Logarithms as scores, [n] float32: where one class alone applies, minus infinity becomes ``alone``."""
    return np.asarray(np.where(np.isneginf(values), alone, values), dtype=np.float32)


def log_sum(terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of the sum of exp(terms) of each row [n, C], [n]; −inf where all are."""
    largest = terms.max(axis=1)
    origin = np.where(np.isfinite(largest), largest, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(terms - origin[:, None]).sum(axis=1)) + origin


def log_of_log1p(log_x: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(log(1 + x)) by the log of x; log x itself where x is below the rounding of 1, which does not underflow."""
    small = log_x < ALONE
    return np.where(small, log_x, np.log(np.logaddexp(0, np.where(small, 0.0, log_x))))
