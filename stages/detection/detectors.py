"""Fitted detectors: a score on a subject (`stages.detection.subject`), with what it learnt from ID rows.

A *detector* is one score of one head::

    part  ("none", "knn"), ("refit", "energy"), …   a fitted scorer and the raw scores of all calibration rows
    detector  one part, or the sum of several standardised on the calibration rows ("knn+energy");
              calibrated: every part first on its expert's scale

With top-2 routing a row has a twin, the same row through the router's second choice. Its score is the mean of the two
experts' scores, weighted by the gate; what the detector learnt from routed rows stays what it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.detection.calibration import ExpertCalibration, Standardiser, sum_scores
from stages.detection.subject import NO_HEAD, SetRows, Subject, known_route
from stages.errors import NotFiniteError
from stages.id_data.lazy import Floats
from stages.progress import SILENT, Progress
from stages.scorers import FROZEN
from stages.scorers.inputs import check_finite
from stages.scorers.scorer import Scorer


@dataclass(frozen=True, eq=False)
class FittedScore:
    """A scorer fitted for the final model, and the raw scores of all calibration rows by models that did not see them.

    `head` is whose logits it reads, ``"none"`` where it reads none, as `SetRows.inputs` takes it. `second` are the
    scores of the same rows through the router's second choice, where top-2 rows are asked.
    """

    scorer: Scorer
    head: str
    calibration: Floats
    second: Floats | None = None

    @property
    def name(self) -> str:
        """As a sum names it."""
        return (FROZEN if self.head.startswith(FROZEN) else "") + self.scorer.name


@dataclass(frozen=True)
class Scales:
    """What makes the parts of a detector comparable, from their raw scores of calibration rows.

    Attributes:
        experts: each part's scale per expert; none where scores are not calibrated over experts.
        standardisers: each part's mean and deviation, of what the first made of it; none where there is one part.
    """

    experts: tuple[ExpertCalibration, ...] = ()
    standardisers: tuple[Standardiser, ...] = ()

    @classmethod
    def fit(cls, raw: Sequence[Floats], expert: NDArray[np.int64] | None, n_experts: int) -> "Scales":
        """From scores ``[n]`` of each part.

        Args:
            raw: of the calibration rows.
            expert: ``[n]`` that each row went to; None where scores are not to be calibrated over experts.
            n_experts: E.
        """
        experts: tuple[ExpertCalibration, ...] = ()
        if expert is not None:
            experts = tuple(ExpertCalibration.fit(scores, expert, n_experts) for scores in raw)
            raw = [scale.apply(scores, expert) for scale, scores in zip(experts, raw, strict=True)]
        return cls(experts, tuple(map(Standardiser.fit, raw)) if len(raw) > 1 else ())

    def apply(self, raw: Sequence[Floats], expert: NDArray[np.int64] | None) -> Floats:
        """One score a row, ``[n]``."""
        if self.experts:
            raw = [scale.apply(scores, known_route(expert)) for scale, scores in zip(self.experts, raw, strict=True)]
        return sum_scores(raw, self.standardisers) if self.standardisers else np.asarray(raw[0], dtype=np.float32)


@dataclass(frozen=True, eq=False)
class FittedDetector:
    """One row of the table without its OOD set.

    Attributes:
        subject: what it scores.
        head: whose logits it reads; ``"none"`` where it reads none.
        score: name, ``"a+b"`` for a sum.
        calibrated: whether every part is first put on its expert's scale.
        parts: the summands.
        scales: of the parts, from the calibration rows.
        choice: of ``auto``, what was chosen and by which numbers; empty of others.
    """

    subject: Subject
    head: str
    score: str
    calibrated: bool
    parts: tuple[FittedScore, ...]
    scales: Scales = Scales()
    choice: Mapping[str, Any] = field(default_factory=dict)

    @property
    def params(self) -> dict[str, Any]:
        """Settings in force; of a sum, those of its parts by name; of ``auto``, what was chosen as well."""
        if len(self.parts) == 1 and not self.choice:
            return self.parts[0].scorer.params()
        return {**self.choice, **{part.name: part.scorer.params() for part in self.parts}}

    def remarks(self) -> list[tuple[str, str, str]]:
        """(score, whose logits it reads, what there is to say of its fit or of what it is summed by)."""
        found = [
            (part.name, part.head.removeprefix(FROZEN), said) for part in self.parts for said in part.scorer.remarks()
        ]
        if len(self.parts) > 1 and (said := Standardiser.remark(len(self.parts[0].calibration))):
            found.append((self.score, self.head, said))
        return found

    def combine(self, raw: Sequence[Floats], expert: NDArray[np.int64] | None) -> Floats:
        """Raw scores of the parts, ``[n]`` each, to the detector's score; higher = more OOD."""
        return self.scales.apply(raw, expert)

    @property
    def is_routed(self) -> bool:
        """Whether its score of a row depends on the expert that the row went to."""
        own = [part for part in self.parts if not part.head.startswith(FROZEN)]
        return self.subject.n_experts > 0 and any("others" not in part.scorer.needs for part in own)

    @property
    def reads_classes(self) -> bool:
        """Whether its score depends on which class ID rows are of: by experts, a head, or what a part was fitted on."""
        parts = (part.head != NO_HEAD or "labels" in part.scorer.needs for part in self.parts)
        return self.subject.n_experts > 0 or any(parts)

    @property
    def is_exact(self) -> bool:
        """Whether what its calibration scores promise of new ID rows holds exactly, and not nearly.

        It does where the final model, which scores new rows, scored the calibration rows too, and they had no say in
        it. Of rows that cross-fit another model has seen nearly all, and the scales of a sum or of experts come from
        calibration rows. By how much that misses is measured in tests/bench/README.md, "Coverage of the thresholds".
        """
        return len(self.subject.calibrating) == 1 and self.scales == Scales()

    def score_rows(self, rows: SetRows) -> Floats:
        """Score of each row, ``[n]``; higher = more OOD."""
        return score_together([self], rows)[0]

    @property
    def calibration_scores(self) -> Floats:
        """Scores of the calibration rows, which no model in question was trained or selected on.

        As little may a row have set the scale that it is measured by: each is on the scales of the rows that were not
        left out with it.
        """
        return self._without_their_part([part.calibration for part in self.parts], self.subject.calibration_expert)

    @property
    def top2_calibration_scores(self) -> Floats:
        """The same by the router's two choices, where top-2 rows are asked."""
        runs = self.subject.calibrating
        twins = [run.second for run in runs if run.second is not None]
        raw = [part.second for part in self.parts if part.second is not None]
        second = self._without_their_part(raw, np.concatenate([known_route(rows.expert) for rows in twins]))
        share = np.concatenate([gate_share(run.calibrate, rows) for run, rows in zip(runs, twins, strict=True)])
        return gate_weighted(self.calibration_scores, second, share)

    def _without_their_part(self, raw: Sequence[Floats], expert: NDArray[np.int64] | None) -> Floats:
        """Scores of the calibration rows, or of their twins, on scales of the rows that are in no part with them."""
        number, known = self.subject.calibration_part, [part.calibration for part in self.parts]
        if self.scales == Scales() or len(np.unique(number)) < 3:  # a scale wants two rows
            return self.combine(raw, expert)
        first = self.subject.calibration_expert if self.calibrated else None
        scores = np.empty(len(number), dtype=np.float32)
        for part in np.unique(number):
            own, others = number == part, np.flatnonzero(number != part)
            routed = None if first is None else first[others]
            scales = Scales.fit([values[others] for values in known], routed, self.subject.n_experts)
            scores[own] = scales.apply([values[own] for values in raw], None if expert is None else expert[own])
        return scores


def score_together(detectors: Sequence[FittedDetector], rows: SetRows) -> list[Floats]:
    """Scores of rows by several detectors, ``[n]`` each; higher = more OOD.

    Rows are read once, a block at a time, and a part is computed once however many detectors it is in.
    """
    pairs = summands(detectors)
    return combined(detectors, raw_scores(pairs, rows), rows)


def summands(detectors: Sequence[FittedDetector]) -> list[tuple[Scorer, str]]:
    """Fitted scorers that detectors are made of, each once, with their heads."""
    return [(part.scorer, part.head) for part in _parts(detectors)]


def combined(detectors: Sequence[FittedDetector], raw: Sequence[Floats], rows: SetRows) -> list[Floats]:
    """Scores of rows by detectors, ``[n]`` each, of what their `summands` say of them."""
    by_part = dict(zip(_parts(detectors), raw, strict=True))
    return [detector.combine([by_part[part] for part in detector.parts], rows.expert) for detector in detectors]


def _parts(detectors: Sequence[FittedDetector]) -> list[FittedScore]:
    return list(dict.fromkeys(part for detector in detectors for part in detector.parts))


def raw_scores(scorers: Sequence[tuple[Scorer, str]], rows: SetRows, progress: Progress = SILENT) -> list[Floats]:
    """Scores of rows by fitted scorers with their heads, ``[n]`` each; progress counts rows."""
    found = [np.empty(len(rows), dtype=np.float32) for _ in scorers]
    for some, block in rows.blocks():
        for (scorer, head), scores in zip(scorers, found, strict=True):
            try:
                scores[some] = scorer.score(block.inputs(head))
            except NotFiniteError as error:
                check_finite(rows.inputs(head), "scored", error)
                raise
        progress.advance(len(block))
    return found


def gate_share(rows: SetRows, twins: SetRows) -> Floats:
    """``[n]`` the weight of the router's first choice among its two: the gate, made to add up to 1 over them."""
    first, second = known_route(rows.confidence), known_route(twins.confidence)
    return np.asarray(first / (first + second), dtype=np.float32)


def gate_weighted(first: Floats, second: Floats, share: Floats) -> Floats:
    """Mean of what two experts say of the same rows, the first with weight `share`.

    >>> gate_weighted(np.float32([1, 3]), np.float32([2, 7]), np.float32([0.75, 1])).tolist()
    [1.25, 3.0]
    """
    return np.asarray(share * first + (1 - share) * second, dtype=np.float32)
