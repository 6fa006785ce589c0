"""``score = "auto"``: the detector that is chosen for a study, from ID rows alone.

`stages.detection.pseudo` makes ID rows play OOD, `stages.detection.choice` is the rule, and this says what is chosen
among: by what a score needs, and not by a list of names. What was chosen is kept, by what it was chosen from.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache import fingerprint
from stages.detection.choice import (
    IN_SUMS,
    FoldScores,
    Losses,
    choose,
    displaces,
    of_frozen,
    size_of,
    standings,
    sums_of,
)
from stages.detection.detectors import FittedDetector, raw_scores
from stages.detection.factory import DetectorFactory
from stages.detection.pseudo import FEWEST_CLASSES, PSEUDO_KINDS, PseudoFold, pseudo_folds
from stages.detection.sources import BackboneSource
from stages.detection.subject import NO_HEAD, SubjectKey
from stages.errors import InputError
from stages.files.documents import read_document, write_document
from stages.scorers import AUTO, FROZEN, SCORERS, needs_of, reads_head, scorer_class

CHOSEN_FOLDER = "auto"  # folder of what was chosen, among a study's scores
AUTO_SEMANTICS = 1  # raise it when the same rows and settings would give another choice
_USABLE = frozenset({"features", "logits", "head", "bank", "select", "labels"})  # what a fold's rows have
_FALLBACKS = ("knn+energy", "knn")  # the first that applies, where nothing can be judged
RULE = "lowest mean FPR95 of pseudo-OOD made of ID rows; within a standard error of every kind the fewest parts"
_TOLD = 5  # candidates in the record


@dataclass(frozen=True)
class AutoChoice:
    """What was chosen.

    Attributes:
        score: as a study names it: ``knn``, ``ncm+energy``; on a mixture's features also ``frozen:knn+energy``.
        frozen: whether it is a score of the backbone's own features alone.
        record: by which rule, what it loses, and which candidates came nearest; JSON.
        finalists: of frozen features, the scores that stand in sums.
    """

    score: str
    frozen: bool
    record: dict[str, Any]
    finalists: tuple[str, ...] = ()


_FoldOfAll = list[FoldScores]  # of a fold, whose kinds come one after the other


@dataclass(frozen=True, eq=False)
class _Judged:
    """Candidates with what they lose, ``[candidates, folds, kinds]``; parts of sums by family."""

    scores: list[str]
    losses: Losses
    families: list[list[str]]

    def take(self, keep: Sequence[int]) -> "_Judged":
        return _Judged([self.scores[number] for number in keep], self.losses[keep], self.families)


class AutoScore:
    """Chooses for the subjects of one backbone.

    Args:
        source: whose rows are looked at: neither its OOD sets nor its ID test set.
        folder: where choices are kept, ``<work>/scores/auto``; None: nowhere.
    """

    def __init__(self, source: BackboneSource, folder: Path | None = None) -> None:
        self._source = source
        self._folder = folder if source.models else None  # by their bytes alone choices are told apart
        self._made: dict[SubjectKey, AutoChoice] = {}

    def choice(self, factory: DetectorFactory, frozen: DetectorFactory) -> AutoChoice:
        """The choice for a subject: the backbone's own features, or those of a mixture with the former beside.

        Args:
            factory: of the subject.
            frozen: of the backbone's own features; the same where that is the subject.
        """
        key = factory.subject.key
        if key not in self._made:
            self._made[key] = self._kept(factory) or self._new(factory, frozen)
        return self._made[key]

    def _kept(self, factory: DetectorFactory) -> AutoChoice | None:
        stored = None if self._folder is None else read_document(self._path(self._folder, factory))
        if stored is None:
            return None
        return AutoChoice(stored["score"], stored["frozen"], stored["record"], tuple(stored["finalists"]))

    def _new(self, factory: DetectorFactory, frozen: DetectorFactory) -> AutoChoice:
        found = _chosen(factory, self.choice(frozen, frozen) if factory.subject.n_experts else None)
        if self._folder is not None:
            write_document(self._path(self._folder, factory), asdict(found))
        return found

    def _path(self, folder: Path, factory: DetectorFactory) -> Path:
        return folder / f"{self._identity(factory)[:16]}.json"

    def detector(self, factory: DetectorFactory, frozen: DetectorFactory) -> FittedDetector:
        """The chosen detector, under the name ``auto``.

        Args:
            factory: as of `choice`.
            frozen: likewise.

        Returns:
            One of `frozen` where a score of these alone was chosen.
        """
        choice = self.choice(factory, frozen)
        of = frozen if choice.frozen else factory
        heads = of.heads_of(choice.score)
        head = head_of(of) or next(iter(of.subject.heads), NO_HEAD)
        found = of.detector(head if heads == (NO_HEAD,) or head in heads else heads[0], choice.score)
        told = {"chosen": choice.score, "features": "cls" if choice.frozen else "mofe", "auto": choice.record}
        return replace(found, score=AUTO, head=head, choice=told)

    def _identity(self, factory: DetectorFactory) -> str:
        subject, config = factory.subject, factory.config
        model = {subject.key.variant, f"seed-{subject.key.seed}"}
        own = [
            path
            for path in self._source.models
            if "probe" in Path(path).parts or (subject.n_experts and model <= set(Path(path).parts))
        ]
        return fingerprint(
            {
                "semantics": AUTO_SEMANTICS,
                "subject": asdict(subject.key),
                "data": self._source.data.identity,
                "models": {path: self._source.models[path] for path in own},
                "settings": config.model_dump(include={"k", "profile", "params", "temperature"}),
                "candidates": [name for name in SCORERS if is_candidate(name)],
            }
        )


def is_candidate(name: str) -> bool:
    """Whether a score may be chosen: its fit is cheap, and it needs what left-out classes leave whole.

    Not those of trained heads with "other", which saw every class, and not those of patches.

    >>> is_candidate("knn"), is_candidate("gmm"), is_candidate("other")
    (True, False, False)
    """
    scorer = scorer_class(name)
    return not scorer.costly and scorer.needs <= _USABLE


def family_of(name: str) -> tuple[bool, bool]:
    """What a score looks at: features, logits or the head that makes them, or both; scores of a family see the same."""
    needs = needs_of(name)
    return "features" in needs, bool(needs & {"logits", "head"})


def _chosen(factory: DetectorFactory, frozen: AutoChoice | None) -> AutoChoice:
    """The choice for the backbone's own features; for a mixture's, whose frozen choice is known, see there."""
    if frozen is not None:
        return _chosen_of_mixture(factory, frozen)
    head = head_of(factory)
    names = [name for name in SCORERS if is_candidate(name) and factory.why_not(name) is None]
    judged = judge_candidates(factory, [name for name in names if head is not None or not reads_head(name)])
    if judged is None:
        return fallback(factory)
    finalists = tuple(part for family in judged.families for part in family)
    return _record(judged, choose(judged.losses, [*map(size_of, judged.scores)]), finalists)


def _chosen_of_mixture(factory: DetectorFactory, frozen: AutoChoice) -> AutoChoice:
    """The frozen choice; where a score that reads the experts' features is clearly better, that.

    Of each family those scores stand beside the frozen ones, and in sums with them, that were parts of sums there.
    """
    own = [name for name in frozen.finalists if factory.why_not(name) is None]
    judged = judge_candidates(factory, [*(FROZEN + name for name in frozen.finalists), *own]) if own else None
    if judged is None:
        return fallback(factory) if not frozen.finalists else frozen
    beside = "+".join(FROZEN + part for part in frozen.score.split("+"))
    refined = judged.take([number for number, score in enumerate(judged.scores) if not of_frozen(score)])
    if beside not in judged.scores or not refined.scores:
        return frozen
    best = choose(refined.losses, [*map(size_of, refined.scores)])
    found = replace(_record(refined, best, ()), frozen=False)
    at = judged.losses[judged.scores.index(beside)]
    numbers = {"loss": _rounded(at.mean()), "loss_by_kind": _by_kind(at)}
    if displaces(refined.losses[best], at):
        return replace(found, record=found.record | {"frozen": {"chosen": frozen.score, **numbers}})
    told = {name: found.record[name] for name in ("loss", "loss_by_kind")}
    return replace(frozen, record=frozen.record | {"with_experts": {"chosen": found.score, **told}})


def fallback(factory: DetectorFactory) -> AutoChoice:
    """Where ID rows are too few to play OOD: the sum that is recommended beforehand, or what of it applies."""
    score = next(score for score in _FALLBACKS if factory.heads_of(score))
    classes = len(np.unique(factory.subject.bank.labels))
    few = f"{classes} classes, fewer than {FEWEST_CLASSES}" if classes < FEWEST_CLASSES else "too few held-out ID rows"
    return AutoChoice(score, not factory.subject.n_experts, {"rule": f"{few} to play OOD: as recommended beforehand"})


def _record(judged: _Judged, number: int, finalists: tuple[str, ...]) -> AutoChoice:
    """A choice, and the numbers that it was made by."""
    each = standings(judged.losses)
    order = sorted(range(len(each)), key=lambda other: each[other].loss)
    record = {
        "rule": RULE,
        "loss": _rounded(each[number].loss),
        "loss_by_kind": _by_kind(judged.losses[number]),
        "gap": dict(zip(PSEUDO_KINDS, map(_rounded, each[number].gaps), strict=True)),
        "gap_error": dict(zip(PSEUDO_KINDS, map(_rounded, each[number].errors), strict=True)),
        "candidates": len(each),
        "folds": judged.losses.shape[1],
        "best": {judged.scores[other]: _rounded(each[other].loss) for other in order[:_TOLD]},
    }
    return AutoChoice(judged.scores[number], True, record, finalists)


def _by_kind(losses: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(PSEUDO_KINDS, map(_rounded, losses.mean(axis=0)), strict=True))


def _rounded(value: float) -> float:
    return round(float(value), 6)


# ------------------------------------------------------------------------------------------------------------- judging


def judge_candidates(factory: DetectorFactory, names: Sequence[str]) -> _Judged | None:
    """What scores lose, and sums of the best of each family; None where ID rows cannot play OOD.

    Args:
        factory: of the subject's detectors, for its settings.
        names: of scores; ``frozen:`` before those that look at the backbone's own features.
    """
    head = head_of(factory)
    strengths = {name: strength for name, strength in factory.subject.strengths.items() if _is_read(name, head)}
    keys = [(*factory.keys_of(head or NO_HEAD, name)[0], name) for name in names]
    folds: list[_FoldOfAll] = []
    for pair in pseudo_folds(factory.subject, strengths, factory.subject.key.seed or 0):
        folds.append([_scored(factory, fold, keys) for fold in pair])
    usable = [name for name in names if all(name in own.id for fold in folds for own in fold)]
    if not folds or not usable:
        return None
    singles = _losses(folds, usable)
    families = _best_of_families(usable, singles.mean(axis=(1, 2)))
    sums = sums_of(families)
    return _Judged([*usable, *sums], np.concatenate([singles, _losses(folds, sums)]), families)


def _is_read(name: str, head: str | None) -> bool:
    return name == head or name.startswith(FROZEN)


def head_of(factory: DetectorFactory) -> str | None:
    """The head whose logits candidates read: the first that can be fitted again without some classes."""
    return next((name for name in factory.subject.strengths if not name.startswith(FROZEN)), None)


def _scored(factory: DetectorFactory, fold: PseudoFold, keys: Iterable[tuple[str, str, str]]) -> FoldScores:
    """Scores of a fold's rows, without those that cannot be fitted on so few rows, or are not finite."""
    own: dict[str, NDArray[np.floating]] = {}
    ood: dict[str, dict[str, NDArray[np.floating]]] = {kind: {} for kind in fold.ood}
    for head, name, score in keys:
        try:
            scorer = factory.scorer(head, name, remember=False).fit(fold.bank.inputs(head), fold.select.inputs(head))
            found = [raw_scores([(scorer, head)], rows)[0] for rows in (fold.id, *fold.ood.values())]
        except InputError:
            continue
        if not all(np.isfinite(scores).all() for scores in found):
            continue
        own[score] = found[0]
        for kind, scores in zip(fold.ood, found[1:], strict=True):
            ood[kind][score] = scores
    return FoldScores(own, ood).standardised()


def _losses(folds: Sequence[_FoldOfAll], scores: Sequence[str]) -> Losses:
    return np.stack([np.concatenate([own.losses(scores) for own in fold], axis=1) for fold in folds], axis=1)


def _best_of_families(names: Sequence[str], loss: np.ndarray) -> list[list[str]]:
    """Of each family the scores that lose least, of each subject apart; in the order of the registry."""
    members: dict[tuple[bool, bool], dict[bool, list[int]]] = {}
    for number, name in enumerate(names):
        family = members.setdefault(family_of(name), {})
        family.setdefault(of_frozen(name), []).append(number)
    return [
        [
            names[number]
            for own in family.values()
            for number in sorted(sorted(own, key=lambda number: loss[number])[:IN_SUMS])
        ]
        for family in members.values()
    ]
