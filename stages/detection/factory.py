"""Detectors of a subject: which scores apply to it, fitted once each and put together."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from stages.config import ScoreConfig
from stages.detection.detectors import FittedDetector, FittedScore, Scales, raw_scores
from stages.detection.selection import SearchFold, choose_k
from stages.detection.subject import NO_HEAD, Subject, known_route
from stages.id_data.lazy import Floats
from stages.scorers import get_scorer, needs_of, reads_head, scorer_class
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

    Raises:
        InputError: a score that nobody knows.
    """

    def __init__(self, subject: Subject, config: ScoreConfig, neighbours: NeighbourStore | None = None) -> None:
        self.subject = subject
        self.config = config
        self._neighbours = neighbours
        self._parts: dict[tuple[str, str], FittedScore] = {}
        self._k: dict[SpaceName, tuple[int, dict[str, Any]]] = {}

    @property
    def k(self) -> int:
        """That of raw features."""
        return self.k_in(RAW)[0]

    @property
    def k_record(self) -> dict[str, Any]:
        """How it came, for the record."""
        return self.k_in(RAW)[1]

    def k_in(self, space: SpaceName) -> tuple[int, dict[str, Any]]:
        """The k of neighbours that are searched in a space, and how it came.

        As given, or by the one rule from left-out ID classes (`stages.detection.selection.choose_k`), in each space.
        """
        if self.config.k != "auto":
            return self.config.k, {"rule": "given"}
        if space not in self._k:
            folds = [SearchFold(run.bank.inputs(NO_HEAD), run.select.inputs(NO_HEAD)) for run in self.subject.runs]
            self._k[space] = choose_k(folds, neighbours=self._neighbours, space=space)
        return self._k[space]

    def detectors(self) -> list[FittedDetector]:
        """Every score for every head that it applies to; with experts, raw and calibrated."""
        asked = [(head, score) for score in self.config.scores for head in self.heads_of(score)]
        self._fit(key for head, score in asked for key in _parts_of(head, score))
        return [
            self.detector(head, score, calibrated)
            for head, score in asked
            for calibrated in (
                (False, True) if self.subject.n_experts > 1 and "others" not in needs_of(score) else (False,)
            )
        ]

    def heads_of(self, score: str) -> tuple[str, ...]:
        """Heads that a score applies to; none where it applies to nothing that these rows have."""
        if self.why_not(score):
            return ()
        if needs_of(score) & {"others", "other"}:
            return (_TRAINED,)
        if "head" in needs_of(score):
            return tuple(head for head in self.subject.heads if head in self.subject.bank.heads)
        return self.subject.heads if reads_head(score) else (NO_HEAD,)

    def left_out(self) -> list[tuple[str, str, str]]:
        """What is asked for and does not apply: (score, what it needs, the head that lacks it, or "" for all)."""
        found = []
        for score in self.config.scores:
            if why := self.why_not(score):
                found.append((score, why, ""))
            elif "head" in needs_of(score):
                lacking = (head for head in self.subject.heads if head not in self.subject.bank.heads)
                found += [(score, _WEIGHTS, head) for head in lacking]
        return found

    def why_not(self, score: str) -> str | None:
        """What a score needs that these rows do not have; None where it applies."""
        needs, subject = needs_of(score), self.subject
        if "others" in needs and not subject.has_others:
            return 'a mixture trained with train.expert = "frozen" and two experts or more'
        if "other" in needs and subject.n_experts < 2:
            return "a mixture of two experts or more"
        if "patches" in needs and subject.n_experts:
            return "frozen features, for no patches are kept of what the experts make"
        if "patches" in needs and subject.bank.patches is None:
            return "patch tokens"
        if "taps" in needs and subject.bank.taps is None:
            return "frozen features with tokens after several blocks: cache.taps names them"
        if needs & {"head", "logits"} and not subject.heads:
            return "logits"
        if "head" in needs and not subject.bank.heads:
            return _WEIGHTS
        return None

    def detector(self, head: str, score: str, calibrated: bool = False) -> FittedDetector:
        """One fitted detector."""
        keys = _parts_of(head, score)
        self._fit(keys)
        parts = tuple(self._parts[key] for key in keys)
        routed = known_route(self.subject.calibration_expert) if calibrated else None
        scales = Scales.fit([part.calibration for part in parts], routed, self.subject.n_experts)
        return FittedDetector(self.subject, head, score, calibrated, parts, scales)

    def _fit(self, keys: Iterable[tuple[str, str]]) -> None:
        """Fit what is not fitted yet of (head, score); rows to calibrate on are read once for all of it."""
        new = [key for key in dict.fromkeys(keys) if key not in self._parts]
        subject = self.subject
        calibration: dict[tuple[str, str], list[Floats]] = {key: [] for key in new}
        second: dict[tuple[str, str], list[Floats]] = {key: [] for key in new}
        scorers: list[Scorer] = []
        for run in subject.calibrating:
            scorers = [self._scorer(name).fit(run.bank.inputs(head), run.select.inputs(head)) for head, name in new]
            pairs = [(scorer, head) for scorer, (head, _) in zip(scorers, new, strict=True)]
            for kept, rows in ((calibration, run.calibrate), (second, run.second)):
                if rows is not None:
                    for key, scores in zip(new, raw_scores(pairs, rows), strict=True):
                        kept[key].append(scores)
        if len(subject.calibrating) > 1:
            scorers = [
                self._scorer(name).fit(subject.bank.inputs(head), subject.select_rows.inputs(head))
                for head, name in new
            ]
        for key, scorer in zip(new, scorers, strict=True):
            twice = np.concatenate(second[key]) if second[key] else None
            self._parts[key] = FittedScore(scorer, key[0], np.concatenate(calibration[key]), twice)

    def _scorer(self, name: str) -> Scorer:
        given = self.config.params.get(name, {})
        params: dict[str, Any] = {}
        for followed in scorer_class(name).follows - given.keys():
            params[followed] = self._k_of(given) if followed == "k" else self.config.temperature
        scorer = get_scorer(name, self.config.profile, **params, **given)
        if isinstance(scorer, KNNScorer):
            scorer.neighbours = self._neighbours
        return scorer

    def _k_of(self, given: Mapping[str, Any]) -> int:
        """What the rule gives for a score with these settings."""
        return self.k_in(str(given.get("space", RAW)))[0]


def _parts_of(head: str, score: str) -> list[tuple[str, str]]:
    """(head, score) of each summand."""
    return [(head if reads_head(name) else NO_HEAD, name) for name in score.split("+")]
