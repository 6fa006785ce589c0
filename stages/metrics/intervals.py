"""How far a metric or a difference may be off: intervals that hold for small and for well separated sets.

| of | interval | at the ends |
|---|---|---|
| FPR95 | order statistics of the ID threshold (mid-p) and Wilson's for the OOD rows, put together by MOVER | [0, > 0] |
| AUROC | DeLong's variance on the logit scale, or Newcombe's method 5, whichever reaches farther | [< 1, 1] |
| paired difference | bootstrap, bias-corrected; seeds are drawn as well as images | |

The percentile bootstrap covers 50 % where 50 OOD images have a true FPR95 of 0.9 %, and [0, 0] where none was admitted:
no resample holds what no image shows. ``python -m tests.bench.bench_intervals`` measures the coverages.

DeLong, DeLong and Clarke-Pearson, Biometrics 1988; Newcombe, Statistics in Medicine 2006 (method 5); Wilson, JASA 1927;
MOVER: Zou and Donner, Statistics in Medicine 2008; bias correction: Efron, JASA 1987; m - 1 of m seeds: Rao and Wu,
JASA 1988; false discovery rate: Benjamini and Hochberg, JRSS B 1995.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, expit, logit, ndtr, ndtri

from stages.metrics.discoveries import discoveries
from stages.metrics.ranking import admitting_threshold, checked_scores

LEVEL = 0.95
_Z = float(ndtri((1 + LEVEL) / 2))
_ADMIT = 0.95  # of FPR95

# With fewer rows no verdict is given: fewer than 59 ID rows bound the threshold of FPR95 on one side alone, and a share
# of fewer than 30 OOD rows moves by more than 3 points with each.
LEAST_ID, LEAST_OOD = 60, 30


class Interval(NamedTuple):
    """Ends of a 95 % interval."""

    lo: float
    hi: float


class SetParts(NamedTuple):
    """What the intervals of one OOD set's metrics, and of averages over sets, are made of.

    Attributes:
        auroc, fpr95: the metrics.
        n_ood: OOD rows.
        id_wins: ``[n_id]`` share of the OOD rows that score higher than each ID row, ties half (DeLong's placements);
            ID rows by ascending score, so alike for all sets.
        ood_variance: of the AUROC, from the OOD rows; NaN for one row.
        admitted: share of the OOD rows that the ends of the threshold's interval admit.
    """

    auroc: float
    fpr95: float
    n_ood: int
    id_wins: NDArray[np.float64]
    ood_variance: float
    admitted: Interval

    @classmethod
    def of(cls, id_scores: ArrayLike, ood_scores: ArrayLike) -> Self:
        """Of one OOD set, see `of_each`."""
        return cls.of_each(id_scores, [ood_scores])[0]

    @classmethod
    def of_each(cls, id_scores: ArrayLike, ood_scores: Sequence[ArrayLike]) -> list[Self]:
        """From scores ``[n_id]``, and ``[n_ood]`` of each OOD set; higher = more OOD.

        Raises:
            InputError: a side is empty, not one-dimensional, or holds NaN or inf.
        """
        ids = np.sort(checked_scores(id_scores, "ID"))
        low, high = quantile_ranks(len(ids), _ADMIT)
        thresholds = (
            ids[low - 1] if low >= 1 else -np.inf,
            ids[high - 1] if high <= len(ids) else np.inf,
            admitting_threshold(ids, _ADMIT),
        )
        return [cls._of(ids, np.sort(checked_scores(scores, "OOD")), thresholds) for scores in ood_scores]

    @classmethod
    def _of(cls, ids: NDArray[np.float64], oods: NDArray[np.float64], thresholds: tuple[float, float, float]) -> Self:
        """Of sorted scores; thresholds at the ends of their interval, and the one of FPR95."""
        ood_wins = (np.searchsorted(ids, oods, "left") + np.searchsorted(ids, oods, "right")) / (2 * len(ids))
        id_wins = 1 - (np.searchsorted(oods, ids, "left") + np.searchsorted(oods, ids, "right")) / (2 * len(oods))
        lo, hi, at = (np.searchsorted(oods, thresholds, "right") / len(oods)).tolist()
        variance = float(ood_wins.var(ddof=1) / len(oods)) if len(oods) > 1 else np.nan
        return cls(float(ood_wins.mean()), at, len(oods), id_wins, variance, Interval(lo, hi))


def fpr95_interval(sets: Sequence[SetParts]) -> Interval:
    """Of the unweighted mean of FPR95 (ID positive) over OOD sets that one ID set is compared with.

    The threshold is that of the same ID rows for all of them, so what it moves is added up; OOD rows of different sets
    are independent, so what they move is added in squares.
    """
    n = len(sets)
    mean = float(np.mean([one.fpr95 for one in sets]))
    ends = Interval(*(float(np.mean([one.admitted[side] for one in sets])) for side in (0, 1)))
    shares = [wilson(one.fpr95, one.n_ood) for one in sets]
    below = np.hypot(mean - ends.lo, _root([(one.fpr95 - own.lo) / n for one, own in zip(sets, shares, strict=True)]))
    above = np.hypot(ends.hi - mean, _root([(own.hi - one.fpr95) / n for one, own in zip(sets, shares, strict=True)]))
    return Interval(max(mean - float(below), 0.0), min(mean + float(above), 1.0))


def auroc_interval(sets: Sequence[SetParts]) -> Interval:
    """Of the unweighted mean of AUROC over OOD sets that one ID set is compared with."""
    n, n_id = len(sets), len(sets[0].id_wins)
    mean = float(np.mean([one.auroc for one in sets]))
    scores = [newcombe(one.auroc, n_id, one.n_ood) for one in sets]
    lo = mean - _root([(one.auroc - own.lo) / n for one, own in zip(sets, scores, strict=True)])
    hi = mean + _root([(own.hi - one.auroc) / n for one, own in zip(sets, scores, strict=True)])
    if n_id > 1 and 0 < mean < 1:
        id_variance = np.mean([one.id_wins for one in sets], axis=0).var(ddof=1) / n_id
        variance = id_variance + sum(one.ood_variance for one in sets) / n**2
        if np.isfinite(variance):
            reach = _Z * np.sqrt(variance) / (mean * (1 - mean))
            lo, hi = min(lo, float(expit(logit(mean) - reach))), max(hi, float(expit(logit(mean) + reach)))
    return Interval(max(lo, 0.0), min(hi, 1.0))


def _root(parts: Sequence[float]) -> float:
    return float(np.sqrt(np.sum(np.square(parts))))


@lru_cache
def quantile_ranks(n: int, share: float) -> tuple[int, int]:
    """Ranks, from 1, of the order statistics that hold a quantile with 95 % confidence; 0 or n + 1 where none does.

    How many of n rows lie below the quantile is Binomial(n, share). Mid-p: half of the probability of the rank itself
    counts, since whole ranks are conservative by that much.

    >>> quantile_ranks(100, 0.95)
    (91, 99)
    """
    below = bdtr(np.arange(n + 1), n, share)  # P(Binomial ≤ r)
    middle = (np.concatenate([[0.0], below[:-1]]) + below) / 2  # P(Binomial < r) + P(Binomial = r) / 2, r = 0 … n
    tail = (1 - LEVEL) / 2
    # Rank r lies above the quantile with P(Binomial < r), below it with P(Binomial ≥ r).
    low = int(np.searchsorted(middle[:n], tail, "right"))
    high = int(np.searchsorted(middle[1:], 1 - tail)) + 1
    return low, high


def wilson(share: float, n: int) -> Interval:
    """Wilson's score interval of a share of n rows.

    >>> lo, hi = wilson(0.0, 50)
    >>> round(lo, 4), round(hi, 4)
    (0.0, 0.0713)
    """
    scale = 1 + _Z**2 / n
    centre = (share + _Z**2 / (2 * n)) / scale
    reach = _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / scale
    return Interval(max(float(centre - reach), 0.0), min(float(centre + reach), 1.0))


@lru_cache
def newcombe(auroc: float, n_id: int, n_ood: int) -> Interval:
    """Interval of an AUROC from its value and sizes alone (method 5): all θ with |AUROC − θ| ≤ z·√V(θ).

    V is Hanley and McNeil's variance with (n_id + n_ood) / 2 for both sizes in its last terms. It does not collapse
    where the sets are perfectly separated.

    >>> lo, hi = newcombe(1.0, 50, 50)
    >>> round(lo, 3), hi
    (0.96, 1.0)
    """
    pairs, mean_size = n_id * n_ood, (n_id + n_ood) / 2

    def inside(theta: float) -> bool:
        dispersion = 1 + (mean_size - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (auroc - theta) ** 2 <= _Z**2 * theta * (1 - theta) * dispersion / pairs

    ends = []
    for outside in (0.0, 1.0):
        within = auroc
        for _ in range(50):  # bisection, to the last bit that matters
            middle = (within + outside) / 2
            within, outside = (middle, outside) if inside(middle) else (within, middle)
        ends.append(within)
    return Interval(*ends)


class Difference(NamedTuple):
    """Of two methods' means over seeds, with its 95 % interval.

    Attributes:
        mean: the difference.
        lo, hi: ends of the interval.
        p: two-sided p-value of no difference; the interval excludes 0 where it is below 0.05.
        one_seed: whether it is known for one seed alone of a method that has seeds.
        few: whether there are too few rows for a verdict.
    """

    mean: float
    lo: float
    hi: float
    p: float
    one_seed: bool
    few: bool

    @classmethod
    def of(
        cls,
        own: tuple[Sequence[float], ArrayLike],
        other: tuple[Sequence[float], ArrayLike],
        seeded: bool,
        n_id: int,
        n_ood: int,
    ) -> Self:
        """A metric of a method minus that of another.

        Args:
            own: the metric for each of S seeds, and its bootstrap replicates ``[S, R]``.
            other: the same of the other method, for the same seeds in their order, or for one that has none.
            seeded: whether one of the methods has seeds.
            n_id: ID rows.
            n_ood: OOD rows, of all sets in an average.
        """
        mean = float(np.mean(own[0]) - np.mean(other[0]))
        drawn = _over_seeds(np.asarray(own[1])) - _over_seeds(np.asarray(other[1]))
        few = n_id < LEAST_ID or n_ood < LEAST_OOD
        return cls(mean, *_bias_corrected(mean, drawn), seeded and max(len(own[0]), len(other[0])) == 1, few)


def _over_seeds(replicates: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[R]`` mean over seeds, drawn anew for each replicate: S - 1 of S, whose mean varies as that of S new ones."""
    n_seeds, n = replicates.shape
    if n_seeds == 1:
        return replicates[0]
    means: NDArray[np.float64] = replicates[_drawn_seeds(n_seeds, n), np.arange(n)[:, None]].mean(axis=1)
    return means


@lru_cache
def _drawn_seeds(n_seeds: int, n: int) -> NDArray[np.int64]:
    """``[n, S - 1]`` of S seeds, alike for all methods."""
    return np.random.default_rng(0).integers(n_seeds, size=(n, n_seeds - 1))


def _bias_corrected(value: float, replicates: NDArray[np.float64]) -> tuple[float, float, float]:
    """Ends of the bias-corrected interval and the p-value that belongs to it."""
    n, deviation = len(replicates), float(replicates.std())
    if deviation == 0:
        return value, value, 1.0 if value == 0 else 0.0

    def score(threshold: float) -> float:  # ties half; kept off 0 and 1, which no finite number of replicates shows
        below, up_to = np.count_nonzero(replicates < threshold), np.count_nonzero(replicates <= threshold)
        share = (below / n + up_to / n) / 2
        return float(ndtri(min(max(share, 0.5 / n), 1 - 0.5 / n)))

    bias = score(value)
    lo, hi = np.quantile(replicates, ndtr([2 * bias - _Z, 2 * bias + _Z]))
    z = abs(score(0.0) - 2 * bias)
    if not replicates.min() < 0 < replicates.max():  # farther off than replicates can tell
        z = max(z, abs(value) / deviation)
    return float(min(lo, value)), float(max(hi, value)), float(2 * ndtr(-z))


def verdicts(differences: Sequence[Difference], higher_is_better: Sequence[bool]) -> list[str]:
    """What each of many differences that are read together says, the false discovery rate held at 5 %.

    Returns:
        ``gain``, ``loss``, ``no difference`` or ``too few images``; the first two with ``for this seed`` where another
        seed may say otherwise.
    """
    told = [index for index, difference in enumerate(differences) if not difference.few]
    found = ["too few images"] * len(differences)
    discovered = discoveries([differences[index].p for index in told], 1 - LEVEL)
    for index, real in zip(told, discovered, strict=True):
        difference = differences[index]
        if not real or difference.lo <= 0 <= difference.hi:
            found[index] = "no difference"
        else:
            word = "gain" if (difference.mean > 0) == higher_is_better[index] else "loss"
            found[index] = f"{word} for this seed" if difference.one_seed else word
    return found
