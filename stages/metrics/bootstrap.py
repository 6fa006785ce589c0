"""Bootstrap replicates of metrics: what they would be on other images of the same kind.

They work on *counts*, how often each row was drawn: the same counts given to two methods make their replicates paired,
so that the interval of a difference is the interval of ``a["auroc"] - b["auroc"]``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.errors import InputError
from stages.metrics.ranking import checked_scores


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
    counts = np.empty((replicates, n), dtype=np.uint8)
    for row, drawn in zip(counts, _draws(replicates, n, seed), strict=True):
        row[:] = drawn
    return counts


class Resamples:
    """The counts of `resample_counts` where they are too many to be held: every walk draws them anew, alike.

    Args:
        n: as in `resample_counts`, like all that follows.
        replicates: likewise.
        seed: likewise.

    >>> (np.stack(list(Resamples(4, 2, seed=0))) == resample_counts(4, 2, seed=0)).all()
    np.True_
    """

    def __init__(self, n: int, replicates: int, seed: int) -> None:
        self.shape = (replicates, n)
        self._seed = seed

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """``[n]`` of each replicate."""
        return _draws(*self.shape, self._seed)


Counts = NDArray[np.integer] | Resamples  # [R, n]

_BLOCK = 1 << 16  # counts that are worked on at a time: few enough for a core's cache, many enough for few calls


def _draws(replicates: int, n: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    for _ in range(replicates):
        # A row drawn 256 times does not happen: below 1 in 256!
        yield np.bincount(rng.integers(n, size=n), minlength=n).astype(np.uint8)


def bootstrap_metrics(
    id_scores: ArrayLike, ood_scores: ArrayLike, id_counts: Counts, ood_counts: Counts
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
    id_counts: Counts,
    ood_counts: Sequence[Counts],
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
    size = max(1, _BLOCK // max([len(ids), *(len(each.order) for each in sets)]))
    done = 0
    for counts, *drawn in zip(_blocks(id_counts, size), *(_blocks(own, size) for own in ood_counts), strict=True):
        sums = _running_sums(counts.take(order, axis=1))
        # The ID row whose score admits 95 %: every replicate has as many rows.
        threshold = np.argmax(sums[:, 1:] >= _enough(int(sums[0, -1])), axis=1)
        now = slice(done, done := done + len(counts))
        for each, own, metrics in zip(sets, drawn, found, strict=True):
            metrics["auroc"][now], metrics["fpr95"][now] = each.metrics(own, sums, threshold)
    return found


def _blocks(counts: Counts, size: int) -> Iterator[NDArray[np.integer]]:
    """Some replicates at a time: ``[size, n]``, the last with what is left."""
    if isinstance(counts, np.ndarray):
        yield from (counts[start : start + size] for start in range(0, len(counts), size))
        return
    rows = iter(counts)
    while block := list(islice(rows, size)):
        yield np.stack(block)


@dataclass(frozen=True, eq=False)
class _Resampled:
    """An OOD set in ascending order of its scores, beside the ID rows in theirs.

    Attributes:
        order: [n_ood] rows by score.
        below: [n_ood] how many ID rows score lower than each.
        not_above: [n_ood] how many do not score higher.
        admitted: [n_id] how many OOD rows do not score higher than each ID row.
    """

    order: NDArray[np.intp]
    below: NDArray[np.intp]
    not_above: NDArray[np.intp]
    admitted: NDArray[np.intp]

    @classmethod
    def of(
        cls,
        ids: NDArray[np.float64],
        ood_scores: ArrayLike,
        counts: Counts,
        id_counts: Counts,
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
        return cls(order, below, not_above, np.searchsorted(oods, ids, "right"))

    def metrics(
        self, counts: NDArray[np.integer], id_sums: NDArray[np.int64], threshold: NDArray[np.intp]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """AUROC and FPR95 of some replicates.

        Args:
            counts: [r, n_ood].
            id_sums: [r, n_id + 1] of the ID rows in ascending order.
            threshold: [r] the ID row whose score admits 95 %.
        """
        weights = counts.take(self.order, axis=1)
        sums = _running_sums(weights)
        wins = np.einsum("rn,rn->r", weights, id_sums.take(self.below, axis=1) + id_sums.take(self.not_above, axis=1))
        admitted = np.take_along_axis(sums, self.admitted[threshold][:, None], axis=1)[:, 0]
        return wins / (2 * id_sums[:, -1] * sums[:, -1]), admitted / sums[:, -1]


def _enough(n: int) -> int:
    """The smallest m with m / n ≥ 0.95, the division rounded as everywhere."""
    m = int(0.95 * n)
    return next(rows for rows in range(max(m - 1, 0), m + 3) if rows / n >= 0.95)


def _running_sums(counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """Sums of the first 0, 1, …, n counts of each replicate: [r, n] -> [r, n + 1]."""
    sums = np.zeros((len(counts), counts.shape[1] + 1), dtype=np.int64)
    np.cumsum(counts, axis=1, out=sums[:, 1:])
    return sums
