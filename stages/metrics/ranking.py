"""Metrics of out-of-distribution detection, from the scores of an ID and an OOD set.

Higher score = more OOD, everywhere. Ties are whole: no threshold separates equal scores, and they count half in AUROC.

| metric | positive | what it says |
|---|---|---|
| `auroc` | | P(OOD scores higher than ID), ties half |
| `fpr95` | ID | OOD admitted by the threshold that admits 95 % of ID (the paper, its code, most papers) |
| `fpr95_ood` | OOD | ID flagged by the threshold that flags 95 % of OOD (OpenOOD v1.5, pytorch-ood) |
| `aupr_in`, `aupr_out` | ID / OOD | area under precision-recall by trapezoid (not scikit-learn's average precision) |

The bootstrap works on *counts*, how often each row was drawn: the same counts given to two methods make their
replicates paired, so that the interval of a difference is the interval of ``a["auroc"] - b["auroc"]``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.errors import InputError


@dataclass(frozen=True)
class OODMetrics:
    """Metrics of one ID set against one OOD set; fractions, not per cent."""

    n_id: int
    n_ood: int
    auroc: float
    fpr95: float
    fpr95_ood: float
    aupr_in: float
    aupr_out: float


def ood_metrics(id_scores: ArrayLike, ood_scores: ArrayLike) -> OODMetrics:
    """All metrics of the table.

    Args:
        id_scores: scores of the ID test rows, [n_id].
        ood_scores: scores of the OOD rows, [n_ood]; higher = more OOD.

    Raises:
        InputError: a side is empty, not one-dimensional, or holds NaN or inf.

    >>> ood_metrics([0.1, 0.2, 0.3], [0.25, 0.9])
    OODMetrics(n_id=3, n_ood=2, auroc=0.8333333333333334, fpr95=0.5, fpr95_ood=0.3333333333333333, \
aupr_in=0.9027777777777777, aupr_out=0.7916666666666666)
    """
    curve = _curve(id_scores, ood_scores)
    return OODMetrics(
        n_id=curve.n_id,
        n_ood=curve.n_ood,
        auroc=curve.auroc(),
        fpr95=curve.fpr95(),
        fpr95_ood=curve.fpr95_ood(),
        aupr_in=curve.aupr_in(),
        aupr_out=curve.aupr_out(),
    )


def auroc(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Probability that an OOD row scores higher than an ID row; ties count half. Higher is better.

    >>> auroc([1, 2, 2], [2, 3])
    0.8333333333333334
    """
    return _curve(id_scores, ood_scores).auroc()


def fpr95(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """FPR95, **ID positive**: the fraction of OOD that the threshold admitting 95 % of ID admits. Lower is better."""
    return _curve(id_scores, ood_scores).fpr95()


def fpr95_ood(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """FPR95, **OOD positive**: the fraction of ID that the threshold flagging 95 % of OOD flags. Lower is better."""
    return _curve(id_scores, ood_scores).fpr95_ood()


def aupr_in(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Area under the precision-recall curve, **ID positive**. Higher is better."""
    return _curve(id_scores, ood_scores).aupr_in()


def aupr_out(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Area under the precision-recall curve, **OOD positive**. Higher is better."""
    return _curve(id_scores, ood_scores).aupr_out()


@dataclass(frozen=True, eq=False)
class _Curve:
    """All that a threshold can do: at each distinct score t, ascending, how many rows of a side have s ≤ t."""

    id_admitted: NDArray[np.int64]
    ood_admitted: NDArray[np.int64]

    @property
    def n_id(self) -> int:
        return int(self.id_admitted[-1])

    @property
    def n_ood(self) -> int:
        return int(self.ood_admitted[-1])

    def auroc(self) -> float:
        below = np.concatenate([[0], self.id_admitted[:-1]])
        wins = int(np.diff(self.ood_admitted, prepend=0) @ (below + self.id_admitted))  # in halves: a tie is one
        return wins / (2 * self.n_id * self.n_ood)

    def fpr95(self) -> float:
        # A division rounds correctly, so 19 / 20 >= 0.95 holds; 0.95 * n >= rank would fail for some n.
        return float(self.ood_admitted[np.argmax(self.id_admitted / self.n_id >= 0.95)] / self.n_ood)

    def fpr95_ood(self) -> float:
        id_flagged, ood_flagged = self._flagged()
        return float(id_flagged[np.argmax(ood_flagged / self.n_ood >= 0.95)] / self.n_id)

    def aupr_in(self) -> float:
        return _area(self.id_admitted, self.ood_admitted)

    def aupr_out(self) -> float:
        id_flagged, ood_flagged = self._flagged()
        return _area(ood_flagged, id_flagged)

    def _flagged(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many rows of a side have s ≥ t, from the largest t down."""
        sides = (self.id_admitted, self.ood_admitted)
        id_flagged, ood_flagged = ((side[-1] - np.concatenate([[0], side[:-1]]))[::-1] for side in sides)
        return id_flagged, ood_flagged


def _area(true: NDArray[np.int64], false: NDArray[np.int64]) -> float:
    """Under precision over recall by trapezoid, one point a distinct score, from (recall 0, precision 1)."""
    recall = np.concatenate([[0.0], true / true[-1]])
    precision = np.concatenate([[1.0], true / (true + false)])
    return float(np.trapezoid(precision, recall))


def _curve(id_scores: ArrayLike, ood_scores: ArrayLike) -> _Curve:
    ids, oods = np.sort(checked_scores(id_scores, "ID")), np.sort(checked_scores(ood_scores, "OOD"))
    both = np.concatenate([ids, oods])
    order = np.argsort(both, kind="stable")  # merges the two sorted runs
    ordered = both[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # of each distinct score
    ood_admitted = np.cumsum(order >= len(ids), dtype=np.int64)[last]
    return _Curve(last + 1 - ood_admitted, ood_admitted)


def fpr_at_tpr(positive: ArrayLike, negative: ArrayLike, tpr: float = 0.95) -> float:
    """Fraction of ``negative`` at or below the smallest positive score t with P_positive(s ≤ t) ≥ ``tpr``.

    Positives score *low* here, as ID rows do; whoever wants OOD positive negates both sides.

    >>> fpr_at_tpr([1, 2, 3, 3], [3, 3, 4], tpr=0.75)  # ties are whole: t = 3 admits both OOD rows at 3
    0.6666666666666666
    """
    negatives = checked_scores(negative, "negative")
    return float(np.mean(negatives <= admitting_threshold(positive, tpr)))


def admitting_threshold(scores: ArrayLike, admit: float) -> float:
    """Smallest observed t with P(s ≤ t) ≥ ``admit``.

    Raises:
        InputError: no scores, NaN or inf among them, or ``admit`` outside (0, 1].

    >>> admitting_threshold([4, 1, 3, 2], 0.75)
    3.0
    """
    if not 0 < admit <= 1:
        raise InputError(f"admit = {admit} is not a fraction in (0, 1]")
    ordered = np.sort(checked_scores(scores, "positive"))
    # A division rounds correctly, so 19 / 20 >= 0.95 holds; 0.95 * n >= rank would fail for some n.
    share = np.arange(1, len(ordered) + 1) / len(ordered)
    return float(ordered[np.argmax(share >= admit)])


def resample_counts(n: int, replicates: int, seed: int) -> NDArray[np.uint8]:
    """How often each of ``n`` rows is drawn in each bootstrap replicate.

    Args:
        n: rows to draw from; each replicate draws n of them with replacement.
        replicates: R.
        seed: the same seed gives the same counts, whatever else was drawn before.

    Returns:
        [R, n] uint8; each row sums to n.

    >>> resample_counts(4, replicates=2, seed=0).sum(axis=1).tolist()
    [4, 4]
    """
    if n < 1 or replicates < 1:
        raise InputError(f"{replicates} bootstrap replicates of {n} rows asked; both must be at least 1")
    rng = np.random.default_rng(seed)
    counts = np.empty((replicates, n), dtype=np.uint8)  # a row drawn 256 times does not happen: below 1 in 256!
    for row in counts:
        row[:] = np.bincount(rng.integers(n, size=n), minlength=n)
    return counts


def bootstrap_metrics(
    id_scores: ArrayLike, ood_scores: ArrayLike, id_counts: NDArray[np.integer], ood_counts: NDArray[np.integer]
) -> dict[str, NDArray[np.float64]]:
    """AUROC and FPR95 (ID positive) of every bootstrap replicate, from one sort.

    Args:
        id_scores: [n_id].
        ood_scores: [n_ood].
        id_counts: [R, n_id] from `resample_counts`; the same array for every method to be compared.
        ood_counts: [R, n_ood].

    Returns:
        ``{"auroc": [R], "fpr95": [R]}``, what `auroc` and `fpr95` give on the repeated rows.

    Raises:
        InputError: scores as in `ood_metrics`, or counts that do not fit them.
    """
    return bootstrap_each(id_scores, [ood_scores], id_counts, [ood_counts])[0]


def bootstrap_each(
    id_scores: ArrayLike,
    ood_scores: Sequence[ArrayLike],
    id_counts: NDArray[np.integer],
    ood_counts: Sequence[NDArray[np.integer]],
) -> list[dict[str, NDArray[np.float64]]]:
    """`bootstrap_metrics` against each of several OOD sets: the ID side, which is mostly the larger, is done once.

    Args:
        id_scores: [n_id].
        ood_scores: [n_ood] of each OOD set.
        id_counts: [R, n_id].
        ood_counts: [R, n_ood] of each OOD set.

    Raises:
        InputError: as `bootstrap_metrics`.
    """
    ids = checked_scores(id_scores, "ID")
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    sets = [
        _Resampled.of(ids, scores, counts, id_counts) for scores, counts in zip(ood_scores, ood_counts, strict=True)
    ]
    replicates = len(id_counts)
    found = [{"auroc": np.empty(replicates), "fpr95": np.empty(replicates)} for _ in sets]
    for replicate, counts in enumerate(id_counts):
        sums = _running_sum(counts[order])
        n_id = int(sums[-1])
        threshold = int(np.searchsorted(sums[1:], _enough(n_id)))  # the ID row whose score admits 95 %
        for each, metrics in zip(sets, found, strict=True):
            weights = each.counts[replicate][each.order]
            ood_sums = _running_sum(weights)
            n_ood = int(ood_sums[-1])
            wins = int(np.einsum("n,n->", weights, sums[each.below] + sums[each.not_above]))
            metrics["auroc"][replicate] = wins / (2 * n_id * n_ood)
            metrics["fpr95"][replicate] = ood_sums[each.admitted[threshold]] / n_ood
    return found


@dataclass(frozen=True, eq=False)
class _Resampled:
    """An OOD set in ascending order of its scores, beside the ID rows in theirs.

    Attributes:
        counts: [R, n_ood] how often each row is drawn.
        order: [n_ood] rows by score.
        below: [n_ood] how many ID rows score lower than each.
        not_above: [n_ood] how many do not score higher.
        admitted: [n_id] how many OOD rows do not score higher than each ID row.
    """

    counts: NDArray[np.integer]
    order: NDArray[np.intp]
    below: NDArray[np.intp]
    not_above: NDArray[np.intp]
    admitted: NDArray[np.intp]

    @classmethod
    def of(
        cls,
        ids: NDArray[np.float64],
        ood_scores: ArrayLike,
        counts: NDArray[np.integer],
        id_counts: NDArray[np.integer],
    ) -> Self:
        oods = checked_scores(ood_scores, "OOD")
        if id_counts.shape[1:] != ids.shape or counts.shape[1:] != oods.shape or len(id_counts) != len(counts):
            raise InputError(
                f"bootstrap counts of shape {id_counts.shape} and {counts.shape} do not fit "
                f"{len(ids)} ID and {len(oods)} OOD scores"
            )
        order = np.argsort(oods, kind="stable")
        oods = oods[order]
        below, not_above = np.searchsorted(ids, oods, "left"), np.searchsorted(ids, oods, "right")
        return cls(counts, order, below, not_above, np.searchsorted(oods, ids, "right"))


def _enough(n: int) -> int:
    """The smallest m with m / n ≥ 0.95, the division rounded as everywhere."""
    m = int(0.95 * n)
    return next(rows for rows in range(max(m - 1, 0), m + 3) if rows / n >= 0.95)


def _running_sum(counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """Sums of the first 0, 1, …, n counts: [n] -> [n + 1]."""
    sums = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=sums[1:])
    return sums


def checked_scores(scores: ArrayLike, which: str) -> NDArray[np.float64]:
    """``scores`` as float64 [n], or an `InputError` that says what is wrong with the ``which`` scores."""
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise InputError(
            f"the {which} scores have shape {array.shape}; one score for each of at least one row expected"
        )
    if bad := int(np.count_nonzero(~np.isfinite(array))):
        raise InputError(f"{bad} of {len(array)} {which} scores are NaN or inf; look at the features they come from")
    return array
