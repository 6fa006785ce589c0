"""Scores onto one scale, and thresholds: all from the calibration rows, held-out ID that nothing else was fitted on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr

from stages.errors import InputError
from stages.metrics.ranking import checked_scores

_MAD_TO_STD = 1.4826  # the median absolute deviation of a normal distribution is its σ / 1.4826
_PSEUDO_ROWS = 10  # an expert with so many calibration rows weighs its own median and MAD as much as everybody's
_LEVEL = 0.95


@dataclass(frozen=True)
class Standardiser:
    """Mean and standard deviation of a score on the calibration rows; makes scores of different kinds addable."""

    mean: float
    std: float

    @classmethod
    def fit(cls, scores: ArrayLike) -> Self:
        """From calibration scores [n]; a constant score, as one row's, gets std 1: it adds and breaks nothing.

        Raises:
            InputError: no rows, NaN or inf.
        """
        values = checked_scores(scores, "calibration")
        mean, std = float(values.mean()), float(values.std())
        varies = std > np.finfo(np.float32).eps * np.abs(values).max()  # more than the last bit of a float32 score
        return cls(mean, std if varies else 1.0)

    @classmethod
    def remark(cls, n: int) -> str:
        """What to say of a sum that is standardised on n rows; empty for nothing."""
        return "its parts are added in units of their own, for one row tells no deviation" if n < 2 else ""

    def apply(self, scores: ArrayLike) -> NDArray[np.float32]:
        """Scores [n] in standard deviations above the calibration mean, float32."""
        values = np.asarray(scores, dtype=np.float64)
        return np.asarray((values - self.mean) / self.std, dtype=np.float32)


def sum_scores(parts: Sequence[ArrayLike], standardisers: Sequence[Standardiser]) -> NDArray[np.float32]:
    """Sum of several scores of the same rows, each standardised: ``knn+energy`` and the like, [n] float32.

    >>> sum_scores([[1.0, 3.0], [0.0, 10.0]], [Standardiser(1, 2), Standardiser(0, 10)]).tolist()
    [0.0, 2.0]
    """
    scaled = [standardiser.apply(part) for part, standardiser in zip(parts, standardisers, strict=True)]
    return np.asarray(np.sum(scaled, axis=0), dtype=np.float32)


@dataclass(frozen=True)
class ExpertCalibration:
    """Centre and scale of a score for each expert: scores of different experts are not on one scale.

    Median and 1.4826·MAD of the expert's calibration rows, drawn towards those of all rows where it has few:
    with n rows, its own count n / (n + 10). The map is affine, so no two scores of an expert become tied.
    """

    centre: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def fit(cls, scores: ArrayLike, expert: NDArray[np.integer], n_experts: int) -> Self:
        """From calibration scores [n] and the expert that each row was routed to [n].

        Raises:
            InputError: no rows, NaN or inf, or an expert outside 0 … n_experts − 1.
        """
        values = checked_scores(scores, "calibration")
        _check_expert(expert, len(values), n_experts)
        all_centre, all_scale = _median_and_scale(values)
        # Where more than half of all scores tie, MAD is 0: the standard deviation, or 1 where all tie, stands in.
        all_scale = all_scale or float(values.std()) or 1.0
        centres, scales = [], []
        for e in range(n_experts):
            own = values[expert == e]
            centre, scale = _median_and_scale(own) if own.size else (all_centre, all_scale)
            weight = own.size / (own.size + _PSEUDO_ROWS)
            centres.append(weight * centre + (1 - weight) * all_centre)
            scales.append(weight * scale + (1 - weight) * all_scale)
        return cls(tuple(centres), tuple(scales))

    def apply(self, scores: ArrayLike, expert: NDArray[np.integer]) -> NDArray[np.float32]:
        """Scores [n] in units of their expert's scale above its centre, float32."""
        values = np.asarray(scores, dtype=np.float64)
        _check_expert(expert, len(values), len(self.centre))
        centre, scale = np.array(self.centre)[expert], np.array(self.scale)[expert]
        return np.asarray((values - centre) / scale, dtype=np.float32)


def _median_and_scale(values: NDArray[np.float64]) -> tuple[float, float]:
    median = float(np.median(values))
    return median, _MAD_TO_STD * float(np.median(np.abs(values - median)))


def _check_expert(expert: NDArray[np.integer], n: int, n_experts: int) -> None:
    if expert.shape != (n,):
        raise InputError(f"{n} scores, but experts of shape {expert.shape}; one expert a row expected")
    if n and not 0 <= expert.min() <= expert.max() < n_experts:
        raise InputError(f"experts {expert.min()} to {expert.max()} given, there are 0 to {n_experts - 1}")


@dataclass(frozen=True)
class ThresholdEstimate:
    """A score at or below ``threshold`` is admitted as ID.

    Attributes:
        threshold: the ⌈(n + 1) · admit⌉-th smallest calibration score; ``None`` where n rows are too few for it.
        lo: lower end of the 95 % confidence interval of the threshold that admits ``admit`` of all ID;
            ``None`` where n rows are too few to bound it.
        hi: upper end, likewise (``admit`` 0.95 needs 72 rows, 0.99 needs 368).
        n: calibration rows.
        n_needed: fewest of them that give a threshold: 19 for ``admit`` 0.95, 99 for 0.99.
        admit: share of ID to admit.
    """

    threshold: float | None
    lo: float | None
    hi: float | None
    n: int
    n_needed: int
    admit: float

    def decide(self, score: float) -> str:
        """``"ID"`` or ``"OOD"``; ``"unknown"`` without a threshold."""
        if self.threshold is None:
            return "unknown"
        return "ID" if score <= self.threshold else "OOD"

    @property
    def too_few(self) -> str:
        """Why there is no threshold; nothing where there is one."""
        if self.threshold is not None:
            return ""
        return f"{self.admit:.0%} of ID needs {self.n_needed} calibration rows, there are {self.n}"


def threshold_at(scores: ArrayLike, admit: float = 0.95) -> ThresholdEstimate:
    """Threshold that admits ``admit`` of new ID rows, from the calibration scores [n] alone.

    A new row is as likely to be in any place among n others, so that the r-th smallest of their scores admits
    r / (n + 1) of new rows on average, and more where scores are equal: r = ⌈(n + 1) · admit⌉ (Vovk et al.,
    "Algorithmic Learning in a Random World", 2005). What one threshold admits is a draw of Beta(r, n + 1 − r).

    The interval is that of a quantile by order statistics: how many of n rows lie below the true quantile is
    Binomial(n, admit), whatever the distribution of the scores. It is conservative (at least 95 %) and needs no model.

    Raises:
        InputError: no scores, NaN or inf, ``admit`` outside (0, 1).

    >>> threshold_at(range(1, 101), admit=0.9)
    ThresholdEstimate(threshold=91.0, lo=84.0, hi=96.0, n=100, n_needed=9, admit=0.9)
    >>> threshold_at(range(20), admit=0.99).threshold is None
    True
    """
    if not 0 < admit < 1:
        raise InputError(f"admit = {admit} given, must be a share between 0 and 1")
    ordered = np.sort(checked_scores(scores, "calibration"))
    n = len(ordered)
    share = Fraction(str(admit))  # 0.95 as it is written: binary rounding must not move a rank
    rank = math.ceil((n + 1) * share)
    # Ranks r from 1: P(rank r lies above the quantile) = P(Binomial < r), so r_lo is the largest with it at most 2.5 %
    # and r_hi the smallest with P(rank r lies below) = P(Binomial >= r) at most 2.5 %.
    at_most = bdtr(np.arange(n + 1), n, admit)  # P(Binomial <= r); scipy.stats says it too, after a second of import
    lower = int(np.searchsorted(at_most, (1 - _LEVEL) / 2))
    upper = int(np.searchsorted(at_most, (1 + _LEVEL) / 2)) + 1
    return ThresholdEstimate(
        threshold=float(ordered[rank - 1]) if rank <= n else None,
        lo=float(ordered[lower - 1]) if lower >= 1 else None,
        hi=float(ordered[upper - 1]) if upper <= n else None,
        n=n,
        n_needed=math.ceil(share / (1 - share)),
        admit=admit,
    )
