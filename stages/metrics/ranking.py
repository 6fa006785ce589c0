"""Metrics of out-of-distribution detection, from the scores of an ID and an OOD set: `METRICS` says which there are.

Higher score = more OOD, everywhere. Ties are whole: no threshold separates equal scores, and they count half in AUROC.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.errors import InputError


@dataclass(frozen=True)
class OODMetrics:
    """Metrics of one ID set against one OOD set, as `METRICS` says what they are; fractions, not per cent."""

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
    return OODMetrics(curve.n_id, curve.n_ood, **{name: metric.formula(curve) for name, metric in METRICS.items()})


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


class Metric(NamedTuple):
    """What a metric is called, and which way is better.

    Attributes:
        name: its column in tables; a field of `OODMetrics`.
        title: as the field writes it.
        higher_is_better: the direction.
        positive: the class that it takes as positive; empty where that makes no difference.
        formula: it, of all that a threshold can do.
        compared: whether it has an interval, and a paired difference between two methods.
    """

    name: str
    title: str
    higher_is_better: bool
    positive: Literal["", "ID", "OOD"]
    formula: Callable[[_Curve], float]
    compared: bool = False

    @property
    def arrow(self) -> str:
        """``↑`` where higher is better, ``↓`` where lower is."""
        return "↑" if self.higher_is_better else "↓"

    @property
    def heading(self) -> str:
        """Title and direction, as over a column: ``AUROC ↑``."""
        return f"{self.title} {self.arrow}"

    def best(self, values: Iterable[float]) -> float:
        """The best of several values of it, at least one."""
        return max(values) if self.higher_is_better else min(values)


METRICS: Mapping[str, Metric] = MappingProxyType({
    metric.name: metric
    for metric in (
        # P(OOD scores higher than ID), ties half.
        Metric("auroc", "AUROC", True, "", _Curve.auroc, compared=True),
        # OOD admitted by the threshold that admits 95 % of ID: the paper, its code, most papers.
        Metric("fpr95", "FPR95", False, "ID", _Curve.fpr95, compared=True),
        # ID flagged by the threshold that flags 95 % of OOD: OpenOOD v1.5, pytorch-ood.
        Metric("fpr95_ood", "FPR95", False, "OOD", _Curve.fpr95_ood),
        # Area under precision-recall by trapezoid, which is not scikit-learn's average precision.
        Metric("aupr_in", "AUPR", True, "ID", _Curve.aupr_in),
        Metric("aupr_out", "AUPR", True, "OOD", _Curve.aupr_out),
    )
})  # fmt: skip


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
