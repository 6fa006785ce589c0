"""Fitted detectors: a score on a choice of features, with what it learnt from ID rows.

A *subject* is one choice of features: the backbone's own, or one trained mixture's. It has a run for each fold of the
split (one where rows were simply held out) and a final bank. A *detector* is one score of one head on a subject::

    part  ("none", "knn"), ("refit", "energy"), …   a fitted scorer and the raw scores of all calibration rows
    detector  one part, or the sum of several standardised on the calibration rows ("knn+energy");
              calibrated: every part first on its expert's scale
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.config import ScoreConfig
from stages.errors import InputError
from stages.scorers import (
    ExpertCalibration,
    ScoreInputs,
    Scorer,
    Standardiser,
    choose_k,
    get_scorer,
    sum_scores,
)
from stages.scorers import Fold as KFold

Floats = NDArray[np.float32]
NO_HEAD = "none"


@dataclass(frozen=True, eq=False)
class SetRows:
    """Rows of a set as one choice of features sees them.

    Attributes:
        features: ``[n, D]``.
        labels: ``[n]`` class numbers of the study; −1 for OOD rows.
        logits: ``[n, C]`` for each head.
        expert: ``[n]`` routed expert; None without experts.
        confidence: ``[n]`` the router's probability of its choice; None without experts.
    """

    features: Floats
    labels: NDArray[np.int32]
    logits: dict[str, Floats] = field(default_factory=dict)
    expert: NDArray[np.int64] | None = None
    confidence: Floats | None = None

    def __len__(self) -> int:
        return len(self.features)

    def inputs(self, head: str) -> ScoreInputs:
        """What a scorer may look at."""
        return ScoreInputs(self.features, self.logits.get(head), self.labels, self.expert)

    def take(self, rows: NDArray[np.int64]) -> "SetRows":
        """Some of the rows."""
        return SetRows(
            self.features[rows],
            self.labels[rows],
            {head: logits[rows] for head, logits in self.logits.items()},
            None if self.expert is None else self.expert[rows],
            None if self.confidence is None else self.confidence[rows],
        )


@dataclass(frozen=True, eq=False)
class Run:
    """One fold's model: its bank (training rows), and the rows that it did not see."""

    bank: SetRows
    select: SetRows
    calibrate: SetRows


@dataclass(frozen=True)
class SubjectKey:
    """The first columns of the table."""

    backbone: str
    features: str
    variant: str
    seed: int | None


@dataclass(frozen=True, eq=False)
class Subject:
    """One choice of features.

    Attributes:
        key: its name in the table.
        heads: heads whose logits its rows carry.
        runs: one for each fold.
        bank: training rows of the final model.
        n_experts: E; 0 without experts.
    """

    key: SubjectKey
    heads: tuple[str, ...]
    runs: tuple[Run, ...]
    bank: SetRows
    n_experts: int = 0


@dataclass(frozen=True, eq=False)
class Part:
    """A scorer fitted for the final model, and the raw scores of all calibration rows by their folds' models."""

    scorer: Scorer
    calibration: Floats
    calibration_expert: NDArray[np.int64] | None


@dataclass(frozen=True, eq=False)
class Detector:
    """One row of the table without its OOD set.

    Attributes:
        subject: what it scores.
        head: whose logits it reads; ``"none"`` where it reads none.
        score: name, ``"a+b"`` for a sum.
        calibrated: whether every part is first put on its expert's scale.
        parts: the summands.
        experts: each part's scale per expert, where calibrated.
        standardisers: each part's mean and deviation on the calibration rows, for sums.
    """

    subject: Subject
    head: str
    score: str
    calibrated: bool
    parts: tuple[Part, ...]
    experts: tuple[ExpertCalibration, ...] = ()
    standardisers: tuple[Standardiser, ...] = ()

    @property
    def params(self) -> dict[str, Any]:
        """Settings in force; of a sum, those of its parts by name."""
        if len(self.parts) == 1:
            return self.parts[0].scorer.params()
        return {part.scorer.name: part.scorer.params() for part in self.parts}

    def combine(self, raw: Sequence[Floats], expert: NDArray[np.int64] | None) -> Floats:
        """Raw scores of the parts, ``[n]`` each, to the detector's score; higher = more OOD."""
        if self.calibrated:
            assert expert is not None
            raw = [scale.apply(scores, expert) for scale, scores in zip(self.experts, raw, strict=True)]
        return sum_scores(raw, self.standardisers) if self.standardisers else np.asarray(raw[0], dtype=np.float32)

    def score_rows(self, rows: SetRows) -> Floats:
        """Score of each row, ``[n]``; higher = more OOD."""
        return self.combine([part.scorer.score(rows.inputs(self.head)) for part in self.parts], rows.expert)

    @property
    def calibration_scores(self) -> Floats:
        """Scores of the calibration rows, which no model in question was trained or selected on."""
        return self.combine([part.calibration for part in self.parts], self.parts[0].calibration_expert)


class DetectorFactory:
    """Fits the parts of a subject once each and puts detectors together.

    Args:
        subject: choice of features.
        config: scores, k and temperature.

    Raises:
        InputError: a score that nobody knows.
    """

    def __init__(self, subject: Subject, config: ScoreConfig) -> None:
        self.subject = subject
        self.config = config
        self.k_record: dict[str, Any] = {"rule": "given"}
        self._parts: dict[tuple[str, str], Part] = {}
        self._k: int | None = None if config.k == "auto" else config.k

    @property
    def k(self) -> int:
        """As given, or by the one rule from left-out ID classes (`stages.scorers.choose_k`)."""
        if self._k is None:
            folds = [KFold(run.bank.inputs(NO_HEAD), run.select.inputs(NO_HEAD)) for run in self.subject.runs]
            self._k, self.k_record = choose_k(folds)
        return self._k

    def detectors(self) -> list[Detector]:
        """Every score for every head that it applies to; with experts, raw and calibrated."""
        return [
            self.detector(head, score, calibrated)
            for score in self.config.scores
            for head in (self.subject.heads if needs_logits(score) else (NO_HEAD,))
            for calibrated in ((False, True) if self.subject.n_experts > 1 else (False,))
        ]

    def detector(self, head: str, score: str, calibrated: bool = False) -> Detector:
        """One fitted detector."""
        parts = tuple(self._part(head if needs_logits(name) else NO_HEAD, name) for name in score.split("+"))
        experts: tuple[ExpertCalibration, ...] = ()
        if calibrated:
            experts = tuple(
                ExpertCalibration.fit(part.calibration, _known(part.calibration_expert), self.subject.n_experts)
                for part in parts
            )
        plain = Detector(self.subject, head, score, calibrated, parts, experts)
        if len(parts) == 1:
            return plain
        scales = []
        for index, part in enumerate(parts):
            scores = part.calibration
            if calibrated:
                scores = experts[index].apply(scores, _known(part.calibration_expert))
            scales.append(Standardiser.fit(scores))
        return Detector(self.subject, head, score, calibrated, parts, experts, tuple(scales))

    def _part(self, head: str, name: str) -> Part:
        if (head, name) not in self._parts:
            subject = self.subject
            scorers = [self._scorer(name).fit(run.bank.inputs(head)) for run in subject.runs]
            calibration = [
                scorer.score(run.calibrate.inputs(head)) for scorer, run in zip(scorers, subject.runs, strict=True)
            ]
            expert = None
            if subject.n_experts:
                expert = np.concatenate([_known(run.calibrate.expert) for run in subject.runs])
            final = scorers[0] if len(scorers) == 1 else self._scorer(name).fit(subject.bank.inputs(head))
            self._parts[head, name] = Part(final, np.concatenate(calibration), expert)
        return self._parts[head, name]

    def _scorer(self, name: str) -> Scorer:
        params: dict[str, Any] = {"k": self.k} if name == "knn" else {"temperature": self.config.temperature}
        return get_scorer(name, **params)


def needs_logits(score: str) -> bool:
    """Whether a score, or a part of a sum, reads a head's logits."""
    return any("logits" in get_scorer(name).needs for name in score.split("+"))


def recommended(factory: DetectorFactory) -> Detector:
    """What `predict` takes where nothing is asked: the sum of kNN and energy; each alone fails somewhere."""
    head = "refit" if "refit" in factory.subject.heads else factory.subject.heads[0]
    return factory.detector(head, "knn+energy")


def _known(expert: NDArray[np.int64] | None) -> NDArray[np.int64]:
    if expert is None:
        raise InputError("these rows were not routed: calibration over experts needs a mixture's features")
    return expert
