"""Pseudo-OOD of ID rows: folds in which ID rows play both sides, for the choice of a score without any OOD set.

::

    near       rows of classes that are left out of everything that is fitted in the fold, dealt over all of them
    far        the same of classes that are like each other: what is left is less like them
    images     of the select rows, cut up, blurred, mixed, drawn over, ...: `stages.inputs.images.pseudo_ood` has them
    shuffled   rows of the others, every feature from another of them: where there are no such images

Images are made and extracted once, with the study's own. Where there are none, as of features that came as arrays and
of what experts make, shuffled rows stand in: scores that fail on these are broken, which is all that they say.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stages.detection.subject import SetRows, Subject, logits_by_head
from stages.heads.affine import LinearHead
from stages.heads.choose import fit_head
from stages.heads.logistic import ROUGH
from stages.id_data.lazy import Floats, LazyArray, one_after_another
from stages.mixture.grouping import group_classes
from stages.scorers import FROZEN
from stages.scorers.shared.arrays import l2_normalise

OF_CLASSES = ("near", "far")  # kinds of classes that are left out; the others are of what is no ID row
SHUFFLED = "shuffled"
_GROUPS = 5  # that classes are dealt into
DIVISIONS = 2  # of each way of dealing: another one may give another choice
_SELECTING = 0.2  # share of the rows to fit on that scores choose their settings by
FITTED_ROWS, _JUDGED_ROWS = 20_000, 4_000  # of a fold at most: a choice is to be cheap however many rows there are
_FEWEST = 10  # rows that play a side, below which a fold says nothing
FEWEST_CLASSES = 4  # with fewer, what is left has one class, and no score of logits can be judged


@dataclass(frozen=True, eq=False)
class PseudoFold:
    """Rows of one fold.

    Attributes:
        bank: to fit on, with heads that were fitted on it alone.
        select: training rows of the same classes, for scores that choose settings: rows that play have no say.
        id: rows that play ID.
        ood: rows that play OOD, by kind.
        judging: the heads, as rows are judged by them.
    """

    bank: SetRows
    select: SetRows
    id: SetRows
    ood: dict[str, SetRows]
    judging: Mapping[str, LinearHead]


def pseudo_folds(
    subject: Subject, strengths: Mapping[str, float], seed: int = 0
) -> Iterator[tuple[PseudoFold, PseudoFold]]:
    """Folds over classes, each with a model of the split in turn; none where ID rows are too few.

    The classes are put into min(5, C // 2) groups in two ways: dealt at random, so that what is left is like what is
    left out, and by likeness, so that it is not; each twice. Each group of all is left out once. Rows that play are
    those that the split's model has not seen: its select rows, and where rows are cross-fitted its calibrate rows
    as well; of features without experts the training rows of the classes that are left out, too. What calibrates the
    final model alone is never looked at.

    Args:
        subject: choice of features; of a mixture with its frozen rows beside.
        strengths: of the heads that scores read, by name; ``frozen:`` before those of the frozen rows beside.
        seed: of groups, of what is shuffled, and of what is left out of more rows than are needed.

    Yields:
        A fold with a group of the dealt ones left out, whose kinds are all but ``far``, and one with a group of like
        ones, whose kind is that.
    """
    classes = np.unique(subject.bank.labels)
    if len(classes) < FEWEST_CLASSES or classes[0] < 0:
        return
    groups = _n_groups(len(classes))
    for division in range(DIVISIONS):
        of_class = np.random.default_rng((seed, division)).permutation(np.arange(len(classes)) % groups)
        alike = _like_classes(subject.bank, classes, groups, seed + division)
        for group in range(groups):
            run = subject.runs[group % len(subject.runs)]
            rows = [run.select, run.calibrate] if len(subject.runs) > 1 else [run.select]
            rng = np.random.default_rng((seed, division, group))
            bank = _some(run.bank, rng, FITTED_ROWS)
            dealt = _fold(bank, rows, classes[of_class == group], strengths, rng)
            far = _fold(bank, rows, classes[alike == group], strengths, rng)
            if dealt is not None and far is not None:
                others = _images(subject, dealt, rng) or {SHUFFLED: _shuffled(dealt.id, dealt.judging, rng)}
                yield replace(dealt, ood=dealt.ood | others), replace(far, ood={"far": far.ood["near"]})


def n_folds(n_classes: int) -> int:
    """How many pairs of folds there are at most.

    >>> n_folds(3), n_folds(6), n_folds(1000)
    (0, 6, 10)
    """
    return 0 if n_classes < FEWEST_CLASSES else DIVISIONS * _n_groups(n_classes)


def _n_groups(n_classes: int) -> int:
    return min(_GROUPS, n_classes // 2)


def _like_classes(bank: SetRows, classes: NDArray[np.integer], groups: int, seed: int) -> NDArray[np.int64]:
    """Group of each class, of equal sizes, by the means of its rows of length 1."""
    rows = bank if bank.frozen is None else bank.frozen
    means = np.zeros((len(classes), rows.features.shape[1]))
    for some in np.array_split(np.arange(len(rows)), max(1, len(rows) // FITTED_ROWS)):
        features = l2_normalise(np.asarray(rows.features[some]))
        np.add.at(means, np.searchsorted(classes, rows.labels[some]), features)
    names = tuple(map(str, classes))
    return np.asarray(group_classes(l2_normalise(means), groups, "balanced", names, seed))


def _fold(
    bank: SetRows,
    judged: list[SetRows],
    left_out: NDArray[np.integer],
    strengths: Mapping[str, float],
    rng: np.random.Generator,
) -> PseudoFold | None:
    numbers = rng.permutation(np.flatnonzero(~np.isin(bank.labels, left_out)))
    n_select = int(_SELECTING * len(numbers))
    kept, select = bank.take(np.sort(numbers[n_select:])), bank.take(np.sort(numbers[:n_select]))
    heads = _refitted(kept, strengths, int(bank.labels.max()) + 1)
    queries = _rows_of(_together([_some(rows, rng, _JUDGED_ROWS) for rows in judged]), heads)
    if queries.expert is not None and kept.expert is not None:  # an expert may have lost all its classes
        queries = queries.take(np.flatnonzero(np.isin(queries.expert, kept.expert)))
    queries = _some(queries, rng, _JUDGED_ROWS)
    out = np.isin(queries.labels, left_out)
    own, near = queries.take(np.flatnonzero(~out)), queries.take(np.flatnonzero(out))
    if bank.expert is None:  # features that nothing was trained on: training rows are as new as any
        unused = _rows_of(_together([bank.take(np.flatnonzero(np.isin(bank.labels, left_out)))]), heads)
        near = _rows_of(_together([near, _some(unused, rng, _JUDGED_ROWS)]), heads)
    if min(len(own), len(near)) < _FEWEST:
        return None
    return PseudoFold(_with_heads(kept, heads), _rows_of(_together([select]), heads), own, {"near": near}, heads)


def _images(subject: Subject, fold: PseudoFold, rng: np.random.Generator) -> dict[str, SetRows]:
    """Images that play OOD, with the logits of a fold's heads."""
    most = _JUDGED_ROWS // max(1, len(subject.pseudo))
    kinds = {kind: _some(rows, rng, most) for kind, rows in subject.pseudo.items() if len(rows) >= _FEWEST}
    return {kind: _rows_of(_together([rows]), fold.judging) for kind, rows in kinds.items()}


def _some(rows: SetRows, rng: np.random.Generator, most: int) -> SetRows:
    return rows if len(rows) <= most else rows.take(np.sort(rng.permutation(len(rows))[:most]))


def _refitted(bank: SetRows, strengths: Mapping[str, float], n_classes: int) -> dict[str, LinearHead]:
    """Heads that never saw the classes that are left out, as strong as those of the study."""
    found = {}
    for name, strength in strengths.items():
        rows = bank if not name.startswith(FROZEN) else bank.frozen
        assert rows is not None
        found[name] = fit_head(np.asarray(rows.features), rows.labels, n_classes, strength, ROUGH)
    return found


def _with_heads(bank: SetRows, heads: Mapping[str, LinearHead]) -> SetRows:
    """Rows to fit on, whose heads are these alone."""
    own, beside = _by_subject(heads)
    frozen = None if bank.frozen is None else replace(bank.frozen, heads=_raw(beside), logits={})
    return replace(bank, heads=_raw(own), logits={}, frozen=frozen)


def _raw(heads: Mapping[str, LinearHead]) -> dict[str, "LinearHead | tuple[LinearHead, ...]"]:
    return {name: head.on_raw_features() for name, head in heads.items()}


def _by_subject(heads: Mapping[str, LinearHead]) -> tuple[dict[str, LinearHead], dict[str, LinearHead]]:
    """Heads of the features themselves, and of the frozen ones beside."""
    own = {name: head for name, head in heads.items() if not name.startswith(FROZEN)}
    return own, {name.removeprefix(FROZEN): head for name, head in heads.items() if name not in own}


def _together(rows: list[SetRows]) -> SetRows:
    """Rows of several, their features read and nothing else kept."""
    expert = None if rows[0].expert is None else np.concatenate([np.asarray(each.expert) for each in rows])
    frozen = [each.frozen for each in rows if each.frozen is not None]
    return SetRows(
        np.asarray(one_after_another([each.features for each in rows])),
        np.concatenate([each.labels for each in rows]),
        expert=expert,
        frozen=_together(frozen) if frozen else None,
    )


def _rows_of(rows: SetRows, heads: Mapping[str, LinearHead]) -> SetRows:
    """Rows with the logits that heads give them."""
    own, beside = _by_subject(heads)
    frozen = None if rows.frozen is None else _rows_of(rows.frozen, beside)
    logits = {name: np.asarray(each) for name, each in logits_by_head(LazyArray.of(_read(rows)), own).items()}
    return replace(rows, logits=logits, frozen=frozen)


def _read(rows: SetRows) -> Floats:
    return np.asarray(rows.features, dtype=np.float32)


def _shuffled(rows: SetRows, heads: Mapping[str, LinearHead], rng: np.random.Generator) -> SetRows:
    """Rows of which every feature is another row's, of the same expert, and in the same way in both subjects."""
    seed = int(rng.integers(2**32))

    def of_subject(own: SetRows) -> SetRows:
        features = _read(own).copy()
        for expert in [None] if rows.expert is None else np.unique(rows.expert).tolist():
            some = np.arange(len(rows)) if expert is None else np.flatnonzero(rows.expert == expert)
            features[some] = np.random.default_rng((seed, expert or 0)).permuted(features[some], axis=0)
        beside = None if own.frozen is None else of_subject(own.frozen)
        return replace(own, features=features, labels=np.full(len(own), -1, np.int32), frozen=beside)

    return _rows_of(of_subject(rows), heads)
