"""``score = "auto"``: the detector that is chosen for a study, from ID rows alone.

`stages.detection.pseudo` makes ID rows play OOD, `stages.detection.choice` is the rule, and this says what is chosen
among: by what a score needs, and not by a list of names. What was chosen is kept, by what it was chosen from.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache import fingerprint
from stages.detection.choice import (
    AUTO_SEMANTICS,
    IN_SUMS,
    FoldScores,
    Losses,
    choose,
    clearly_better,
    displaces,
    of_frozen,
    size_of,
    sums_of,
)
from stages.detection.detectors import FittedDetector, raw_scores
from stages.detection.factory import DetectorFactory
from stages.detection.pseudo import (
    DIVISIONS,
    FEWEST_CLASSES,
    OF_CLASSES,
    SHUFFLED,
    PseudoFold,
    n_folds,
    pseudo_folds,
)
from stages.detection.sources import BackboneSource
from stages.detection.subject import NO_HEAD, SubjectKey
from stages.errors import InputError
from stages.files.documents import read_document, write_document
from stages.progress import MOMENT
from stages.scorers import AUTO, FROZEN, SCORERS, needs_of, scorer_class

CHOSEN_FOLDER = "auto"  # folder of what was chosen, among a study's scores
_USABLE = frozenset({"features", "logits", "head", "bank", "select", "labels"})  # what a fold's rows have
_FALLBACKS = ("knn+energy", "knn")  # the first that applies, where nothing can be judged
_RECOMMENDED = ("ncm+energy", "ncm", "knn")  # the first that is judged stands, unless another is clearly better
_SIDES = ((True, False), (False, True))  # families that a sum of a frozen choice is made of: features, and logits
RULE = "lowest mean FPR95 of pseudo-OOD made of ID {}, if clearly lower than that of what is recommended beforehand"
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
    """Candidates, single ones first, with what they lose, ``[candidates, folds, kinds]``; kinds."""

    scores: list[str]
    losses: Losses
    kinds: tuple[str, ...]

    def take(self, keep: Sequence[int]) -> "_Judged":
        return replace(self, scores=[self.scores[number] for number in keep], losses=self.losses[keep])

    @property
    def sides(self) -> Losses:
        """The same, averaged over the kinds of each side, ``[candidates, folds, sides]``."""
        return np.stack([self.losses[..., columns].mean(axis=-1) for columns in sides_of(self.kinds).values()], axis=-1)

    def choose(self) -> int:
        """The number of the chosen candidate."""
        return choose(self.sides, [*map(size_of, self.scores)])

    def told(self, number: int) -> dict[str, Any]:
        """For the record: what a candidate loses, as it counts and by kind."""
        each = dict(zip(self.kinds, map(_rounded, self.losses[number].mean(axis=0)), strict=True))
        return {"loss": _rounded(self.sides[number].mean()), "loss_by_kind": each}


def sides_of(kinds: Sequence[str]) -> dict[str, list[int]]:
    """Which kinds of pseudo-OOD are judged together, by their numbers: left-out classes, and images.

    Each kind by itself where no image plays OOD.

    >>> sides_of(("near", "tiles", "blurred", "far")), sides_of(("near", "shuffled", "far"))
    ({'left out': [0, 3], 'images': [1, 2]}, {'near': [0], 'shuffled': [1], 'far': [2]})
    """
    if SHUFFLED in kinds:
        return {kind: [number] for number, kind in enumerate(kinds)}
    sides: dict[str, list[int]] = {}
    for number, kind in enumerate(kinds):
        sides.setdefault("left out" if kind in OF_CLASSES else "images", []).append(number)
    return sides


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
                "pseudo": None if self._source.pseudo is None else self._source.pseudo.digest,
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


def candidates(factory: DetectorFactory) -> list[str]:
    """Single scores that are judged of a subject without experts."""
    families = _SIDES[: 1 if head_of(factory) is None else 2]
    names = [name for name in SCORERS if is_candidate(name) and factory.why_not(name) is None]
    return [name for name in names if family_of(name) in families]


def family_of(name: str) -> tuple[bool, bool]:
    """What a score looks at: features, logits or the head that makes them, or both; scores of a family see the same."""
    needs = needs_of(name)
    return "features" in needs, bool(needs & {"logits", "head"})


def _chosen(factory: DetectorFactory, frozen: AutoChoice | None) -> AutoChoice:
    """The choice for the backbone's own features; for a mixture's, whose frozen choice is known, see there."""
    if frozen is not None:
        return _chosen_of_mixture(factory, frozen)
    judged = judge_candidates(factory, candidates(factory))
    if judged is None:
        return fallback(factory)
    sides, size = judged.sides, max(map(size_of, judged.scores))
    loss = np.where(np.array([*map(size_of, judged.scores)]) == size, sides.mean(axis=(1, 2)), np.inf)
    best = int(np.argmin(loss))
    default = next((judged.scores.index(score) for score in _RECOMMENDED if score in judged.scores), best)
    found = _record(judged, best if clearly_better(sides[best], sides[default], DIVISIONS) else default)
    told = {"recommended": {"score": judged.scores[default], **judged.told(default)}}
    return replace(found, record=found.record | told, finalists=_finalists(judged, found.score))


def _finalists(judged: _Judged, chosen: str) -> tuple[str, ...]:
    """Single scores that are looked at of experts as well: of each family those that lose least, and what is chosen."""
    loss = dict(zip(judged.scores, judged.sides.mean(axis=(1, 2)).tolist(), strict=True))
    families = _families([score for score in judged.scores if size_of(score) == 1])
    best = [score for family in families for score in sorted(family, key=lambda name: loss[name])[:IN_SUMS]]
    return tuple(dict.fromkeys([*best, *chosen.split("+")]))


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
    best = refined.choose()
    found = replace(_record(refined, best), frozen=False)
    place = judged.scores.index(beside)
    if displaces(refined.losses[best], judged.losses[place]):
        return replace(found, record=found.record | {"frozen": {"chosen": frozen.score, **judged.told(place)}})
    told = {name: found.record[name] for name in ("loss", "loss_by_kind")}
    return replace(frozen, record=frozen.record | {"with_experts": {"chosen": found.score, **told}})


def fallback(factory: DetectorFactory) -> AutoChoice:
    """Where ID rows are too few to play OOD: the sum that is recommended beforehand, or what of it applies."""
    score = next(score for score in _FALLBACKS if factory.heads_of(score))
    classes = len(np.unique(factory.subject.bank.labels))
    few = f"{classes} classes, fewer than {FEWEST_CLASSES}" if classes < FEWEST_CLASSES else "too few held-out ID rows"
    return AutoChoice(score, not factory.subject.n_experts, {"rule": f"{few} to play OOD: as recommended beforehand"})


def _record(judged: _Judged, number: int) -> AutoChoice:
    """A choice, and the numbers that it was made by."""
    loss = judged.sides.mean(axis=(1, 2))
    record = {
        "rule": RULE.format("rows" if SHUFFLED in judged.kinds else "images"),
        **judged.told(number),
        "candidates": len(loss),
        "folds": judged.losses.shape[1],
        "best": {judged.scores[other]: _rounded(loss[other]) for other in np.argsort(loss, kind="stable")[:_TOLD]},
    }
    return AutoChoice(judged.scores[number], True, record)


def _rounded(value: float) -> float:
    return round(float(value), 6)


# ------------------------------------------------------------------------------------------------------------- judging


def judge_candidates(factory: DetectorFactory, names: Sequence[str]) -> _Judged | None:
    """What scores lose, and sums of one of features and one of logits; None where ID rows cannot play OOD.

    Args:
        factory: of the subject's detectors, for its settings.
        names: of scores; ``frozen:`` before those that look at the backbone's own features.
    """
    folds = list(scored_folds(factory, names))
    usable = [name for name in names if all(name in own.id for fold in folds for own in fold)]
    if not folds or not usable:
        return None
    kinds = tuple(kind for own in folds[0] for kind in own.ood)
    singles = _losses(folds, usable)
    sums = sums_of(_families(usable))
    return _Judged([*usable, *sums], np.concatenate([singles, _losses(folds, sums)]), kinds)


def scored_folds(factory: DetectorFactory, names: Sequence[str]) -> Iterator[_FoldOfAll]:
    """Scores of the rows of each pair of `stages.detection.pseudo.pseudo_folds`, as `judge_candidates` takes them."""
    head = head_of(factory)
    strengths = {name: strength for name, strength in factory.subject.strengths.items() if _is_read(name, head)}
    keys = [(*factory.keys_of(head or NO_HEAD, name)[0], name) for name in names]
    subject, progress = factory.subject, factory.handing.progress
    progress.start(n_folds(len(np.unique(subject.bank.labels))), "fold", f"choose for {subject.key.slug}", MOMENT)
    for pair in pseudo_folds(subject, strengths, subject.key.seed or 0):
        yield [_scored(factory, fold, keys) for fold in pair]
        progress.advance()
    progress.close()


def _is_read(name: str, head: str | None) -> bool:
    return name == head or name.startswith(FROZEN)


def head_of(factory: DetectorFactory) -> str | None:
    """The head whose logits candidates read: the first that can be fitted again without some classes."""
    return next((name for name in factory.subject.strengths if not name.startswith(FROZEN)), None)


def _scored(factory: DetectorFactory, fold: PseudoFold, keys: Iterable[tuple[str, str, str]]) -> FoldScores:
    """Scores of a fold's rows, without those that cannot be fitted on so few rows, or are not finite."""
    own: dict[str, NDArray[np.floating]] = {}
    ood: dict[str, dict[str, NDArray[np.floating]]] = {kind: {} for kind in fold.ood}
    bank = fold.bank.sharing()
    for head, name, score in keys:
        try:
            scorer = factory.scorer(head, name, remember=False).fit(bank.inputs(head), fold.select.inputs(head))
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


def _families(names: Sequence[str]) -> list[list[str]]:
    """Features first: a sum is called ``ncm+energy``."""
    return [own for family in _SIDES if (own := [name for name in names if family_of(name) == family])]
