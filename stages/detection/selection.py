"""k for kNN from ID rows alone: one rule for all features, so that no method is tuned more than another."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.errors import InputError
from stages.id_data.lazy import Floats
from stages.metrics.ranking import auroc
from stages.progress import MOMENT, SILENT, Progress
from stages.scorers.inputs import ScoreInputs
from stages.scorers.neighbours.knn import ExpertBanks
from stages.scorers.neighbours.space import RAW, SpaceName
from stages.scorers.neighbours.store import NeighbourStore

K_GRID = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
BY_LEFT_OUT_CLASSES = "best mean AUROC of left-out ID classes against the others"
SMALLEST = "the smallest candidate, for no ID class can be left out and be told from others"
_MAX_CLASS_GROUPS = 5
_ROWS_TO_RANK = 512
MOST_QUERIES = 10_000  # of a fold: more say the same of k, at the price of as many searches


class SearchFold(NamedTuple):
    """ID rows to search in and ID rows to search for; both with ``features`` and ``labels``, ``expert`` or not."""

    bank: ScoreInputs
    queries: ScoreInputs


def choose_k(
    folds: Sequence[SearchFold],
    grid: Sequence[int] = K_GRID,
    neighbours: NeighbourStore | None = None,
    space: SpaceName = RAW,
    most_queries: int = MOST_QUERIES,
    progress: Progress = SILENT,
) -> tuple[int, dict[str, Any]]:
    """The k that best tells left-out ID classes from the others.

    The classes are dealt, in sorted order, into min(5, C // 2) groups, at least 2. Each group in turn plays OOD: its
    rows leave the bank, its queries are pseudo-OOD and the other queries pseudo-ID. The k with the best AUROC, averaged
    over groups and folds, wins; the smallest among equals. No OOD row is ever looked at.

    Where that leaves nothing to compare, as where a group has all classes of an expert, every class is a group of its
    own; and where that does not help, as where each expert has one class, all k are equal: the smallest is taken.

    Args:
        folds: one for a held-out set; several where cross-fitting replaces it.
        grid: candidates; those above half of the smallest bank are dropped, for they would be clipped.
        neighbours: remembers what was searched.
        space: where to search; fitted on the rows that are searched in, without those of the group that plays OOD.
        most_queries: of a fold that has more rows to search for, so many are drawn, the same at every call.
        progress: counts rows that were searched for, once a group.

    Returns:
        k, and the record: the rule, the grid, mean AUROC for each k, how many classes, groups, folds and rows.

    Raises:
        InputError: no folds, no candidate or one below 1, or unknown labels (negative).
    """
    folds = [SearchFold(fold.bank, _some(fold.queries, most_queries)) for fold in folds]
    if not folds or min(grid, default=0) < 1:
        raise InputError(f"choosing k needs a fold and candidates of at least 1, got {len(folds)} and {tuple(grid)}")
    classes = np.unique(np.concatenate([fold.bank.need("labels", "choosing k") for fold in folds]))
    if len(classes) and classes[0] < 0:
        raise InputError(f"choosing k needs known ID classes, got labels {classes[:5].tolist()}; give a number")
    smallest = min(_smallest_bank(fold.bank) for fold in folds)
    candidates = sorted({k for k in grid if k <= smallest // 2} or {min(grid)})
    record: dict[str, Any] = {
        "classes": len(classes),
        "folds": len(folds),
        "queries": sum(len(fold.queries) for fold in folds),
    }
    for groups in dict.fromkeys((max(2, min(_MAX_CLASS_GROUPS, len(classes) // 2)), len(classes))):
        progress.start(groups * record["queries"], "row", "choose k", MOMENT)
        search = _Search(candidates, neighbours, space, progress)
        found = [curve for fold in folds for curve in _pseudo_ood_aurocs(fold, classes, groups, search)]
        progress.close()
        curves = [curve for curve, _ in found if curve is not None]
        if curves:
            means = np.mean(curves, axis=0)
            k = candidates[int(np.argmax(means))]  # argmax takes the first, the smallest k, among equals
            auroc_of_k = {str(candidate): float(mean) for candidate, mean in zip(candidates, means, strict=True)}
            return k, {"rule": BY_LEFT_OUT_CLASSES, "k": k, "auroc": auroc_of_k, "class_groups": groups} | record | {
                "queries_without_bank": sum(dropped for _, dropped in found)
            }
    return candidates[0], {"rule": SMALLEST, "k": candidates[0], "auroc": {}} | record


def _smallest_bank(train: ScoreInputs) -> int:
    return len(train) if train.expert is None else int(np.unique(train.expert, return_counts=True)[1].min())


def _some(queries: ScoreInputs, most: int) -> ScoreInputs:
    """At most so many of them, drawn at random once and for all."""
    if len(queries) <= most:
        return queries
    return queries.take(np.sort(np.random.default_rng(0).permutation(len(queries))[:most]))


_Curve = tuple[list[float] | None, int]  # AUROC for each candidate; how many queries no bank could answer


class _Search(NamedTuple):
    """How is searched; see `choose_k`."""

    candidates: Sequence[int]  # ascending
    neighbours: NeighbourStore | None
    space: SpaceName
    progress: Progress

    def distances(self, banks: ExpertBanks, queries: ScoreInputs, k: int) -> Floats:
        """``[n, k]`` of the nearest, ascending."""
        found = []
        for block in queries.blocks():
            found.append(banks.distances(block, k, self.neighbours))
            self.progress.advance(len(block))
        return np.concatenate(found)


def _pseudo_ood_aurocs(fold: SearchFold, classes: NDArray[np.integer], groups: int, search: _Search) -> list[_Curve]:
    """A curve for each group that plays OOD."""
    alike = (fold.bank.expert is None) == (fold.queries.expert is None)
    if search.space == RAW and groups <= _MAX_CLASS_GROUPS and alike:
        dealt = _DealtBank(fold, classes, groups, search)
        return [dealt.curve(group) for group in range(groups)]
    return [_pseudo_ood_auroc(fold, classes[group::groups], search) for group in range(groups)]


class _DealtBank:
    """A fold whose bank is searched once for all groups: each group's rows, of each expert, are a bank of their own.

    The neighbours in the bank without a group are the nearest of those found among the others.

    Args:
        fold: as `choose_k` takes it, in the space of the features.
        classes: all of them, ascending; dealt to groups in turn.
        groups: few: the distances to the nearest of each are held.
        search: in the space of the features.
    """

    def __init__(self, fold: SearchFold, classes: NDArray[np.integer], groups: int, search: _Search) -> None:
        self._candidates = search.candidates
        self._query_group = _group_of(fold.queries, classes, groups)
        self._query_expert = _expert_of(fold.queries)
        bank_expert, group = _expert_of(fold.bank), _group_of(fold.bank, classes, groups)
        self._sizes: dict[tuple[int, int], int] = {}  # rows by expert and group
        self._nearest: dict[tuple[int, int], Floats] = {}  # of the expert's queries
        for expert in np.unique(self._query_expert).tolist():
            queries = fold.queries.only("features").take(np.flatnonzero(self._query_expert == expert))
            for own in range(groups):
                rows = np.flatnonzero((bank_expert == expert) & (group == own))
                if not len(rows):
                    search.progress.advance(len(queries))
                    continue
                banks = ExpertBanks(fold.bank.only("features").take(rows))
                self._sizes[expert, own] = len(rows)
                k = min(search.candidates[-1], len(rows))
                self._nearest[expert, own] = search.distances(banks, queries, k)

    def curve(self, left_out: int) -> _Curve:
        """AUROC for each candidate where a group plays OOD."""
        distances = np.full((len(self._query_expert), len(self._candidates)), np.nan, dtype=np.float32)
        for expert in np.unique(self._query_expert).tolist():
            others = [key for key in self._sizes if key[0] == expert and key[1] != left_out]
            if others:
                n = sum(self._sizes[key] for key in others)
                columns = [min(k, n) - 1 for k in self._candidates]
                distances[self._query_expert == expert] = _ranked([self._nearest[key] for key in others], columns)
        known = ~np.isnan(distances[:, 0])
        distances, pseudo_ood = distances[known], self._query_group[known] == left_out
        dropped = int(np.count_nonzero(~known))
        if pseudo_ood.all() or not pseudo_ood.any():
            return None, dropped
        return [auroc(own[~pseudo_ood], own[pseudo_ood]) for own in distances.T], dropped


def _ranked(nearest: Sequence[Floats], columns: Sequence[int]) -> Floats:
    """Columns of what the rows of several ``[n, k]`` together are in ascending order."""
    found = []
    for start in range(0, len(nearest[0]), _ROWS_TO_RANK):
        together = np.concatenate([own[start : start + _ROWS_TO_RANK] for own in nearest], axis=1)
        found.append(np.partition(together, columns, axis=1)[:, columns])
    return np.concatenate(found)


def _expert_of(rows: ScoreInputs) -> NDArray[np.integer]:
    return np.zeros(len(rows), dtype=np.int64) if rows.expert is None else rows.expert


def _group_of(rows: ScoreInputs, classes: NDArray[np.integer], groups: int) -> NDArray[np.integer]:
    """Group of each row's class; −1 of a class that is none of them."""
    labels = rows.need("labels", "choosing k")
    place = np.searchsorted(classes, labels)
    known = np.isin(labels, classes)
    return np.where(known, place % groups, -1)


def _pseudo_ood_auroc(fold: SearchFold, left_out: np.ndarray, search: _Search) -> _Curve:
    """AUROC for each candidate, from one search; and how many queries an emptied expert's bank could not answer."""
    bank = fold.bank.take(~np.isin(fold.bank.need("labels", "choosing k"), left_out))
    queries = fold.queries
    if queries.expert is not None and bank.expert is not None:  # an expert may have lost all its classes
        queries = queries.take(np.isin(queries.expert, bank.expert))
    dropped = len(fold.queries) - len(queries)
    search.progress.advance(dropped)
    pseudo_ood = np.isin(queries.need("labels", "choosing k"), left_out)
    if not len(bank) or pseudo_ood.all() or not pseudo_ood.any():
        search.progress.advance(len(queries))
        return None, dropped
    banks, columns = ExpertBanks(bank, space=search.space), np.asarray(search.candidates) - 1
    distances = search.distances(banks, queries, search.candidates[-1])[:, columns].T
    return [auroc(own[~pseudo_ood], own[pseudo_ood]) for own in distances], dropped
