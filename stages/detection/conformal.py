"""What calibration scores promise of new ID images: p-values, thresholds, batches.

All rests on one fact. A new ID row is as likely to stand in any place among n rows that were scored as it is, whatever
the distribution of the scores (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005). On average
over calibration rows and new images:

- `conformal_p_values`: p ≤ α of at most a share α of new ID images.
- `threshold_at` flags at most 1 − ``admit`` of new ID images: those with p ≤ 1 − ``admit``.
- `BatchPromise`: of the images of a batch that are flagged by their p-values at most a share ``fdr`` is ID.

What a threshold flags with these very calibration rows is a draw of Beta(n + 1 − r, r), r its rank: `FalseAlarms`.
Equal scores only make false alarms rarer. The promise is exact where calibration rows are scored by the model that
scores new ones, and had no say in it: `stages.detection.detectors.FittedDetector.is_exact`.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, betaincinv, betaln  # scipy.stats says it too, after a second of import

from stages.errors import InputError
from stages.metrics.ranking import checked_scores

_LEVEL = 0.95
_TAILS = ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2)
_HUNDRED = 100  # images of which false alarms are told


def conformal_p_values(scores: ArrayLike, calibration: ArrayLike) -> NDArray[np.float64]:
    """How surprising scores are among those of calibration rows: (1 + #{calibration ≥ score}) / (n + 1).

    Of new ID images at most a share α has p ≤ α, for every α: p ≤ 0.05 says the same as `threshold_at` 0.95. No p is
    below 1 / (n + 1).

    Args:
        scores: ``[m]``, higher = more OOD; m may be 0.
        calibration: ``[n]`` scores of the calibration rows, in any order; sorted ones cost no sorting.

    Returns:
        ``[m]``; small = OOD.

    Raises:
        InputError: no calibration scores, or NaN or inf among either.

    >>> conformal_p_values([0.5, 3.0, 9.0], [1, 2, 3, 4]).tolist()
    [1.0, 0.6, 0.2]
    """
    ordered = np.sort(checked_scores(calibration, "calibration"), kind="stable")
    asked = np.asarray(scores, dtype=np.float64)
    if asked.size:
        checked_scores(asked, "new")
    at_least = len(ordered) - np.searchsorted(ordered, asked, "left")
    return np.asarray((1 + at_least) / (len(ordered) + 1))


@dataclass(frozen=True)
class FalseAlarms:
    """Shares of ID images that a threshold flags.

    Attributes:
        expected: on average over calibration sets of n rows.
        lo: lower end of the 95 % interval of what one such set gives, in the long run.
        hi: upper end.
        of_100_lo: so many of the next 100 ID images are flagged, at least.
        of_100_hi: at most; the two are a 95 % interval as well.
    """

    expected: float
    lo: float
    hi: float
    of_100_lo: int
    of_100_hi: int

    @classmethod
    def of(cls, n: int, admit: float) -> Self | None:
        """Of the threshold that `threshold_at` finds for n calibration rows; None where they are too few for it.

        The rows above rank r of n take a share of all ID that is Beta(n + 1 − r, r), so that how many of the next 100
        are flagged is beta-binomial.

        >>> found = FalseAlarms.of(77, 0.95)
        >>> [round(share, 3) for share in (found.expected, found.lo, found.hi)], found.of_100_lo, found.of_100_hi
        ([0.038, 0.008, 0.091], 0, 11)
        """
        if (rank := _rank(n, admit)) > n:
            return None
        above = n + 1 - rank
        lo, hi = betaincinv(above, rank, _TAILS).tolist()
        flagged = np.arange(_HUNDRED + 1)
        ways = -betaln(_HUNDRED - flagged + 1, flagged + 1) - math.log(_HUNDRED + 1)
        at_most = np.cumsum(np.exp(ways + betaln(flagged + above, _HUNDRED - flagged + rank) - betaln(above, rank)))
        return cls(above / (n + 1), lo, hi, *np.searchsorted(at_most, _TAILS).tolist())

    def words(self, n: int) -> str:
        """In a sentence, of n calibration rows.

        >>> FalseAlarms.of(77, 0.95).words(77)
        'of 100 ID images about 3.8 are flagged; with these 77 rows between 0.8 and 9.1 in the long run, and 0 to 11 \
of the next 100'
        """
        expected, lo, hi = (f"{_HUNDRED * share:.1f}" for share in (self.expected, self.lo, self.hi))
        return (
            f"of {_HUNDRED} ID images about {expected} are flagged; with these {n} rows between {lo} and {hi} in the "
            f"long run, and {self.of_100_lo} to {self.of_100_hi} of the next {_HUNDRED}"
        )


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
        false_alarms: what share of ID it flags; ``None`` without a threshold.
    """

    threshold: float | None
    lo: float | None
    hi: float | None
    n: int
    n_needed: int
    admit: float
    false_alarms: FalseAlarms | None

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

    The r-th smallest of them admits r / (n + 1) of new rows on average, and more where scores are equal:
    r = ⌈(n + 1) · admit⌉. What one threshold admits is a draw of Beta(r, n + 1 − r).

    The interval is that of a quantile by order statistics: how many of n rows lie below the true quantile is
    Binomial(n, admit), whatever the distribution of the scores. It is conservative (at least 95 %) and needs no model.

    Raises:
        InputError: no scores, NaN or inf, ``admit`` outside (0, 1).

    >>> found = threshold_at(range(1, 101), admit=0.9)
    >>> found.threshold, found.lo, found.hi, found.n_needed
    (91.0, 84.0, 96.0, 9)
    >>> threshold_at(range(20), admit=0.99).threshold is None
    True
    """
    ordered = np.sort(checked_scores(scores, "calibration"))
    n = len(ordered)
    rank = _rank(n, admit)
    # Ranks r from 1: P(rank r lies above the quantile) = P(Binomial < r), so r_lo is the largest with it at most 2.5 %
    # and r_hi the smallest with P(rank r lies below) = P(Binomial >= r) at most 2.5 %.
    at_most = bdtr(np.arange(n + 1), n, admit)  # P(Binomial <= r)
    lower = int(np.searchsorted(at_most, _TAILS[0]))
    upper = int(np.searchsorted(at_most, _TAILS[1])) + 1
    return ThresholdEstimate(
        threshold=float(ordered[rank - 1]) if rank <= n else None,
        lo=float(ordered[lower - 1]) if lower >= 1 else None,
        hi=float(ordered[upper - 1]) if upper <= n else None,
        n=n,
        n_needed=rows_for_threshold(admit),
        admit=admit,
        false_alarms=FalseAlarms.of(n, admit),
    )


def rows_for_threshold(admit: float) -> int:
    """Fewest calibration rows that give a threshold.

    >>> rows_for_threshold(0.95), rows_for_threshold(0.99)
    (19, 99)
    """
    share = _as_written(admit, "admit")
    return math.ceil(share / (1 - share))


def _rank(n: int, admit: float) -> int:
    return math.ceil((n + 1) * _as_written(admit, "admit"))


def _as_written(share: float, name: str) -> Fraction:
    """0.95 as it is written: binary rounding must not move a rank."""
    if not 0 < share < 1:
        raise InputError(f"{name} = {share} given, must be a share between 0 and 1")
    return Fraction(str(share))


@dataclass(frozen=True)
class BatchPromise:
    """What `stages.metrics.discoveries.discoveries` can flag in a batch, from its p-values of n calibration rows.

    Of the images that it flags at most a share ``fdr`` is ID, on average over calibration sets and batches: conformal
    p-values of one batch share their calibration rows, which makes them positively dependent (Bates, Candès, Lei,
    Romano and Sesia, "Testing for outliers with conformal p-values", Annals of Statistics 2023). No p is below
    1 / (n + 1), and k of m images are flagged where theirs are at most k · fdr / m.

    Attributes:
        fdr: share of false discoveries, at most.
        images: m.
        n: calibration rows.
        fewest: so many images must look OOD, or none is flagged; None where even all of them do not do.
        n_needed: fewest calibration rows with which one image can be flagged by itself.
    """

    fdr: float
    images: int
    n: int
    fewest: int | None
    n_needed: int

    @classmethod
    def of(cls, n: int, images: int, fdr: float) -> Self:
        """Of a batch of so many images.

        Raises:
            InputError: ``fdr`` outside (0, 1).

        >>> BatchPromise.of(77, images=100, fdr=0.05)
        BatchPromise(fdr=0.05, images=100, n=77, fewest=26, n_needed=1999)
        """
        fewest = math.ceil(images / ((n + 1) * _as_written(fdr, "fdr")))
        return cls(fdr, images, n, fewest if fewest <= images else None, rows_to_flag(1, images, fdr))

    @property
    def too_few(self) -> str:
        """What n rows cannot do; nothing where one image can be flagged by itself."""
        if self.n >= self.n_needed:
            return ""
        rows = f"a false discovery rate of {self.fdr:.0%} needs"
        if self.fewest is None:
            return f"{rows} {rows_to_flag(self.images, self.images, self.fdr)} calibration rows, there are {self.n}"
        return (
            f"{rows} {self.n_needed} calibration rows to flag 1 of {self.images} images, with {self.n} it flags "
            f"{self.fewest} or more or none"
        )


def rows_to_flag(flagged: int, images: int, fdr: float) -> int:
    """Fewest calibration rows with which so many of a batch of images can be flagged.

    Raises:
        InputError: ``fdr`` outside (0, 1).

    >>> rows_to_flag(1, 100, 0.05), rows_to_flag(10, 100, 0.05), rows_to_flag(100, 100, 0.05)
    (1999, 199, 19)
    """
    return math.ceil(images / (flagged * _as_written(fdr, "fdr"))) - 1
