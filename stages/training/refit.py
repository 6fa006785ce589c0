"""Heads that score: fitted anew on refined features. Those that train the experts are saturated, and taught "other"."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.heads.choose import FITS, STRENGTHS, ChosenHead, FitRows, FittedHeads, HeadRows, choose_head
from stages.heads.summing import HERE, Summing
from stages.id_data.lazy import LazyArray, Rows2D
from stages.id_data.rows import IdData
from stages.id_data.split import Rows
from stages.mixture.model import MixtureOfFeatureExperts
from stages.mixture.refined import PartBank, Refined, part_bank
from stages.progress import MOMENT, SILENT, Progress


class RefinedRuns(NamedTuple):
    """What the trained mixtures make of ID rows, by the name of the run.

    Attributes:
        bank: of id-train.
        held_out: of the held-out set.
        left_out: of each fold's calibrate rows as its bank would have them; none without cross-fitting.
    """

    bank: Mapping[str, Refined]
    held_out: Mapping[str, Refined]
    left_out: Mapping[str, Refined]


def refit_heads(
    data: IdData,
    mixtures: Mapping[str, MixtureOfFeatureExperts],
    refined: RefinedRuns,
    summing: Summing = HERE,
    progress: Progress = SILENT,
) -> dict[str, FittedHeads]:
    """Heads by their kinds: ``refit``, and ``refit-group-<e>`` for each expert.

    Args:
        data: whose rows these are.
        mixtures: trained, by the name of the run.
        refined: what they make of the rows.
        summing: who sums over rows for a head.
        progress: counts fits.
    """
    names = [name for name, _ in data.runs()]
    parts = [
        part_bank(data.split, part, refined.bank[names[part.fold]], refined.left_out[names[part.fold]])
        for part in data.split.parts
    ]
    groups = {name: mixtures[name].group.numpy() for name in data.train_rows()}
    n_heads = [1 + int(group.max()) + 1 for group in groups.values()]  # of all rows, and of each expert's
    progress.start(FITS * sum(n_heads) + len(parts) * n_heads[-1], "fit", "heads refit", MOMENT)
    runs = [
        _heads_of_run(data, groups[name], rows, refined.bank[name], refined.held_out[name], summing, progress)
        for name, rows in data.train_rows().items()
    ]
    # A fold with fewer groups than the final model has no row of the others.
    experts = {"refit": None} | {f"refit-group-{expert}": expert for expert in range(len(runs[-1]) - 1)}
    heads = {
        kind: FittedHeads.of(
            [run.get(kind, run["refit"]) for run in runs],
            data.n_classes,
            [_rows_of_head(data, part, expert) for part in parts],
            summing,
            progress,
        )
        for kind, expert in experts.items()
    }
    progress.close()
    return heads


def _rows_of_head(data: IdData, part: PartBank, expert: int | None) -> FitRows:
    """What is left without a part of the rows of an expert, or of all where it has none."""
    own = np.ones(len(part.rows), dtype=bool) if expert is None else part.expert == expert
    own = own if own.any() else ~own
    return part.features[own], data.train_labels[part.rows[own]]


def _heads_of_run(
    data: IdData,
    group: NDArray[np.int64],
    train: Rows,
    bank: Refined,
    held_out: Refined,
    summing: Summing,
    progress: Progress,
) -> dict[str, ChosenHead]:
    """The heads of one model by their kinds."""
    select = data.split.select
    rows = head_rows(data, bank.features, held_out.features, train, select)
    refit = choose_head(rows, data.n_classes, summing=summing, progress=progress)
    heads = {"refit": refit}
    for expert in range(group.max() + 1):
        own = train[bank.expert[train] == expert]
        # Judged on select rows that the router sent to the right expert: only they can be classified at all.
        right = select[(held_out.expert[select] == expert) & (group[data.held_out_labels[select]] == expert)]
        rows = head_rows(data, bank.features, held_out.features, own, right)
        strengths = STRENGTHS if len(right) else [refit.strength]
        heads[f"refit-group-{expert}"] = choose_head(rows, data.n_classes, strengths, summing, progress)
    return heads


def head_rows(data: IdData, train: Rows2D, held_out: Rows2D, rows: Rows, select: Rows) -> HeadRows:
    """Rows that a head is fitted on and judged by.

    Args:
        data: whose labels they have.
        train: ``[N, D]`` features of id-train.
        held_out: ``[N', D]`` of the held-out set.
        rows: to fit on.
        select: to judge by.
    """
    return HeadRows(
        _taken(train, rows), data.train_labels[rows], _taken(held_out, select), data.held_out_labels[select]
    )


def _taken(features: Rows2D, rows: Rows) -> LazyArray:
    """Some rows of a memory-mapped or lazy array, not read yet."""
    return features[rows] if isinstance(features, LazyArray) else LazyArray.of(features, rows)
