"""k for kNN from ID rows alone: one rule for all features, so that no method is tuned more than another."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stages.errors import InputError
from stages.metrics.ranking import auroc
from stages.scorers.inputs import ScoreInputs
from stages.scorers.neighbours.knn import ExpertBanks
from stages.scorers.neighbours.space import RAW, SpaceName
from stages.scorers.neighbours.store import NeighbourStore

K_GRID = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
BY_LEFT_OUT_CLASSES = "best mean AUROC of left-out ID classes against the others"
SMALLEST = "the smallest candidate, for no ID class can be left out and be told from others"
_MAX_CLASS_GROUPS = 5


class SearchFold(NamedTuple):
    """ID rows to search in and ID rows to search for; both with ``features`` and ``labels``, ``expert`` or not."""

    bank: ScoreInputs
    queries: ScoreInputs


def choose_k(
    folds: Sequence[SearchFold],
    grid: Sequence[int] = K_GRID,
    neighbours: NeighbourStore | None = None,
    space: SpaceName = RAW,
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

    Returns:
        k, and the record: the rule, the grid, mean AUROC for each k, how many classes, groups, folds and rows.

    Raises:
        InputError: no folds, no candidate or one below 1, or unknown labels (negative).
    """
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
        found = [
            _pseudo_ood_auroc(fold, classes[group::groups], candidates, neighbours, space)
            for fold in folds
            for group in range(groups)
        ]
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


def _pseudo_ood_auroc(
    fold: SearchFold,
    left_out: np.ndarray,
    candidates: Sequence[int],
    neighbours: NeighbourStore | None,
    space: SpaceName,
) -> tuple[list[float] | None, int]:
    """AUROC for each candidate, from one search; and how many queries an emptied expert's bank could not answer."""
    bank = fold.bank.take(~np.isin(fold.bank.need("labels", "choosing k"), left_out))
    queries = fold.queries
    if queries.expert is not None and bank.expert is not None:  # an expert may have lost all its classes
        queries = queries.take(np.isin(queries.expert, bank.expert))
    dropped = len(fold.queries) - len(queries)
    pseudo_ood = np.isin(queries.need("labels", "choosing k"), left_out)
    if not len(bank) or pseudo_ood.all() or not pseudo_ood.any():
        return None, dropped
    banks, columns = ExpertBanks(bank, space=space), np.asarray(candidates) - 1
    blocks = [banks.distances(block, candidates[-1], neighbours)[:, columns] for block in queries.blocks()]
    distances = np.concatenate(blocks).T
    return [auroc(own[~pseudo_ood], own[pseudo_ood]) for own in distances], dropped
