"""Detectors of a subject: which scores apply to it, fitted once each and put together."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stages.config import ScoreConfig
from stages.detection.detectors import FittedDetector, FittedScore, Scales
from stages.detection.handing import Handing
from stages.detection.selection import SearchFold, choose_k
from stages.detection.subject import NO_HEAD, SetRows, Subject, known_route
from stages.id_data.lazy import Floats
from stages.scorers import AUTO, FROZEN, get_scorer, needs_of, parts_of, reads_head, scorer_class
from stages.scorers.neighbours.knn import KNNScorer
from stages.scorers.neighbours.space import RAW, SpaceName
from stages.scorers.neighbours.store import NeighbourStore
from stages.scorers.scorer import Scorer

_TRAINED = "trained"  # the heads that have "other"
_WEIGHTS = "the weights of a linear head"


class DetectorFactory:
    """Fits the parts of a subject once each and puts detectors together.

    Args:
        subject: choice of features.
        config: scores, k and temperature.
        neighbours: remembers what kNN searched, so that another k costs no search.
        handing: fits scores and scores rows.

    Raises:
        InputError: a score that nobody knows.
    """

    def __init__(
        self,
        subject: Subject,
        config: ScoreConfig,
        neighbours: NeighbourStore | None = None,
        handing: Handing = Handing(),
    ) -> None:
        self.subject = subject
        self.config = config
        self.handing = handing
        self._neighbours = neighbours
        self._parts: dict[tuple[str, str], FittedScore] = {}
        self._k: dict[tuple[str, SpaceName], tuple[int, dict[str, Any]]] = {}

    @property
    def k(self) -> int:
        """That of raw features."""
        return self.k_in(RAW)[0]

    @property
    def k_record(self) -> dict[str, Any]:
        """How it came, for the record."""
        return self.k_in(RAW)[1]

    def k_in(self, space: SpaceName, head: str = NO_HEAD) -> tuple[int, dict[str, Any]]:
        """The k of neighbours that are searched in a space, and how it came.

        As given, or by the one rule from left-out ID classes (`stages.detection.selection.choose_k`), in each space,
        and of each subject: ``frozen:`` before the head asks for the backbone's own features beside a mixture's.
        """
        if self.config.k != "auto":
            return self.config.k, {"rule": "given"}
        of = FROZEN + NO_HEAD if head.startswith(FROZEN) else NO_HEAD
        if (of, space) not in self._k:
            folds = [SearchFold(run.bank.inputs(of), run.select.inputs(of)) for run in self.subject.runs]
            progress = self.handing.progress
            self._k[of, space] = choose_k(folds, neighbours=self._neighbours, space=space, progress=progress)
        return self._k[of, space]

    def detectors(self) -> list[FittedDetector]:
        """Every score for every head that it applies to; with experts, raw and calibrated."""
        asked = [(head, score) for score in self.scores for head in self.heads_of(score)]
        self._fit(key for head, score in asked for key in self.keys_of(head, score))
        return [
            self.detector(head, score, calibrated)
            for head, score in asked
            for calibrated in (
                (False, True) if self.subject.n_experts > 1 and "others" not in needs_of(score) else (False,)
            )
        ]

    @property
    def scores(self) -> list[str]:
        """Those that are asked for by their names: ``auto`` is chosen from outside (`stages.detection.auto`)."""
        return [score for score in self.config.scores if score != AUTO]

    def heads_of(self, score: str) -> tuple[str, ...]:
        """Heads that a score applies to; none where it applies to nothing that these rows have."""
        if self.why_not(score):
            return ()
        needs = needs_of(score, frozen=False)
        if needs & {"others", "other"}:
            return (_TRAINED,)
        if "head" in needs:
            return tuple(head for head in self.subject.heads if head in self.subject.bank.heads)
        return self.subject.heads if reads_head(score) else (NO_HEAD,)

    def left_out(self) -> list[tuple[str, str, str]]:
        """What is asked for and does not apply: (score, what it needs, the head that lacks it, or "" for all)."""
        found = []
        for score in self.scores:
            if why := self.why_not(score):
                found.append((score, why, ""))
            elif "head" in needs_of(score, frozen=False):
                lacking = (head for head in self.subject.heads if head not in self.subject.bank.heads)
                found += [(score, _WEIGHTS, head) for head in lacking]
        return found

    def why_not(self, score: str) -> str | None:
        """What a score needs that these rows do not have; None where it applies."""
        subject, frozen = self.subject, self.subject.bank.frozen
        needs = needs_of(score, frozen=False)
        if any(part.frozen for part in parts_of(score)):
            if frozen is None:
                return "experts, beside whose features it looks at the backbone's own"
            if all(part.frozen for part in parts_of(score)):
                return "a part that looks at what the experts make; without one it stands among the frozen features"
            beside = needs_of(score, frozen=True)
            if beside & {"others", "other"}:
                return 'heads with "other", which the backbone\'s own features do not have'
            if why := _lacking(beside, frozen, _heads_of(frozen)):
                return f"{why} of the backbone's own features"
        if "others" in needs and not subject.has_others:
            return 'a mixture trained with train.expert = "frozen" and two experts or more'
        if "other" in needs and subject.n_experts < 2:
            return "a mixture of two experts or more"
        if "patches" in needs and subject.n_experts:
            return "frozen features, for no patches are kept of what the experts make"
        return _lacking(needs, subject.bank, subject.heads)

    def detector(self, head: str, score: str, calibrated: bool = False) -> FittedDetector:
        """One fitted detector."""
        keys = self.keys_of(head, score)
        self._fit(keys)
        parts = tuple(self._parts[key] for key in keys)
        routed = known_route(self.subject.calibration_expert) if calibrated else None
        scales = Scales.fit([part.calibration for part in parts], routed, self.subject.n_experts)
        return FittedDetector(self.subject, head, score, calibrated, parts, scales)

    def keys_of(self, head: str, score: str) -> list[tuple[str, str]]:
        """(head, name) of each summand; the head as `stages.detection.subject.SetRows.inputs` takes it."""
        frozen = self.subject.bank.frozen
        beside = next(iter(_heads_of(frozen)), NO_HEAD) if frozen is not None else NO_HEAD
        found = []
        for part in parts_of(score):
            own = (beside if part.frozen else head) if reads_head(part.name) else NO_HEAD
            found.append((FROZEN + own if part.frozen else own, part.name))
        return found

    def _fit(self, keys: Iterable[tuple[str, str]]) -> None:
        """Fit what is not fitted yet of (head, score); rows to calibrate on are read once for all of it."""
        new = [key for key in dict.fromkeys(keys) if key not in self._parts]
        if not new:
            return
        subject = self.subject
        calibration: dict[tuple[str, str], list[Floats]] = {key: [] for key in new}
        second: dict[tuple[str, str], list[Floats]] = {key: [] for key in new}
        scorers: list[Scorer] = []
        for run in subject.calibrating:
            scorers = self._fitted(new, run.bank, run.select)
            pairs = [(scorer, head) for scorer, (head, _) in zip(scorers, new, strict=True)]
            sets = {"calibrate": run.calibrate}
            if run.second is not None:
                sets["second"] = run.second
            found = self.handing.raw_scores(pairs, sets, subject.key.slug)
            for kept, scored in zip((calibration, second), found.values(), strict=False):
                for key, scores in zip(new, scored, strict=True):
                    kept[key].append(scores)
        if len(subject.calibrating) > 1:
            scorers = self._fitted(new, subject.bank, subject.select_rows)
        for key, scorer in zip(new, scorers, strict=True):
            twice = np.concatenate(second[key]) if second[key] else None
            self._parts[key] = FittedScore(scorer, key[0], np.concatenate(calibration[key]), twice)

    def _fitted(self, keys: Sequence[tuple[str, str]], bank: SetRows, select: SetRows) -> list[Scorer]:
        name = self.subject.key.slug
        return self.handing.fit([(self.scorer(*key), key[0]) for key in keys], bank, select, name)

    def scorer(self, head: str, name: str, remember: bool = True) -> Scorer:
        """A score with its settings, not yet fitted; as `keys_of` names it.

        Args:
            head: whose logits it reads.
            name: of the score.
            remember: whether what it searches is kept.
        """
        given = self.config.params.get(name, {})
        params: dict[str, Any] = {}
        for followed in scorer_class(name).follows - given.keys():
            params[followed] = self._k_of(given, head) if followed == "k" else self.config.temperature
        scorer = get_scorer(name, self.config.profile, **params, **given)
        if remember and isinstance(scorer, KNNScorer):
            scorer.neighbours = self._neighbours
        return scorer

    def _k_of(self, given: Mapping[str, Any], head: str) -> int:
        """What the rule gives for a score with these settings."""
        return self.k_in(str(given.get("space", RAW)), head)[0]


def _heads_of(bank: SetRows) -> tuple[str, ...]:
    """Heads whose logits rows carry, those with weights first."""
    return tuple(dict.fromkeys((*bank.heads, *bank.logits)))


def _lacking(needs: frozenset[str], bank: SetRows, heads: Sequence[str]) -> str | None:
    """What is needed of rows that they do not have, their own head's weights first."""
    if "patches" in needs and bank.patches is None:
        return "patch tokens"
    if "taps" in needs and bank.taps is None:
        return "frozen features with tokens after several blocks: cache.taps names them"
    if needs & {"head", "logits"} and not heads:
        return "logits"
    return _WEIGHTS if "head" in needs and not bank.heads else None
