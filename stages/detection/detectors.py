"""Fitted detectors: a score on a choice of features, with what it learnt from ID rows.

A *subject* is one choice of features: the backbone's own, or one trained mixture's. It has a run for each fold of the
split (one where rows were simply held out) and a final bank; under cross-fitting also a run for each part of the rows,
whose bank has all others. A *detector* is one score of one head on a subject::

    part  ("none", "knn"), ("refit", "energy"), …   a fitted scorer and the raw scores of all calibration rows
    detector  one part, or the sum of several standardised on the calibration rows ("knn+energy");
              calibrated: every part first on its expert's scale

With top-2 routing a row has a twin, the same row through the router's second choice. Its score is the mean of the two
experts' scores, weighted by the gate; what the detector learnt from routed rows stays what it is.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.config import ScoreConfig
from stages.detection.calibration import ExpertCalibration, Standardiser, sum_scores
from stages.detection.selection import Fold as KFold
from stages.detection.selection import choose_k
from stages.errors import InputError, NotFiniteError
from stages.heads.affine import LinearHead
from stages.id_data.lazy import LazyArray, ReadOnce, Rows2D
from stages.id_data.split import N_PARTS
from stages.scorers import get_scorer, scorer_class
from stages.scorers.inputs import LazyRows, ScoreInputs, check_finite
from stages.scorers.neighbours.knn import KNNScorer
from stages.scorers.neighbours.store import NeighbourStore
from stages.scorers.scorer import Scorer

Floats = NDArray[np.float32]
Head = LinearHead | tuple[LinearHead, ...]
NO_HEAD = "none"
_TRAINED = "trained"  # the heads that have "other"
_WEIGHTS = "the weights of a linear head"
_BLOCK = 1 << 15  # rows that are read at once, and that every score sees before the next are read


@dataclass(frozen=True, eq=False)
class SetRows:
    """Rows of a set as one choice of features sees them; features and logits may be more than memory holds.

    Attributes:
        features: ``[n, D]``.
        labels: ``[n]`` class numbers of the study; −1 for OOD rows.
        logits: ``[n, C]`` for each head.
        expert: ``[n]`` the expert that each row went to; None without experts.
        confidence: ``[n]`` the router's probability of its choice, or of its second one where it is that; None without
            experts.
        others: ``[n, E]`` each group's log odds of "other"; None where the heads do not see the same features.
        other: ``[n]`` logit of the expert's "other" beside its trained head's; None where there is none.
        patches: ``[n, P, D]`` patch tokens after the final norm, read when they are asked for; None where there are
            none.
        heads: the linear head itself, by its name, or one for each expert; of rows to fit on.
    """

    features: Rows2D | ReadOnce
    labels: NDArray[np.int32]
    logits: Mapping[str, Rows2D | ReadOnce] = field(default_factory=dict)
    expert: NDArray[np.int64] | None = None
    confidence: Floats | None = None
    others: Floats | None = None
    other: Floats | None = None
    patches: LazyRows | None = None
    heads: dict[str, Head] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    def inputs(self, head: str) -> ScoreInputs:
        """What a scorer may look at."""
        return ScoreInputs(
            self.features,
            self.logits.get(head),
            self.labels,
            self.expert,
            self.others,
            self.other,
            self.patches,
            self.heads.get(head),
        )

    def take(self, rows: NDArray[np.integer] | slice) -> "SetRows":
        """The given rows, by number or by slice; features and logits are not read."""
        small = {
            name: None if (values := getattr(self, name)) is None else values[rows]
            for name in ("expert", "confidence", "others", "other", "patches")
        }
        logits = {head: values[rows] for head, values in self.logits.items()}
        return SetRows(self.features[rows], self.labels[rows], logits, **small, heads=self.heads)

    def blocks(self) -> Iterator[tuple[slice, "SetRows"]]:
        """All rows in order, some at a time, each block read once for all who look at it; and which rows they are."""
        for start in range(0, len(self), _BLOCK):
            some = slice(start, start + _BLOCK)
            block = self.take(some)
            logits = {head: _read_once(values) for head, values in block.logits.items()}
            yield some, replace(block, features=_read_once(block.features), logits=logits)

    def predictions(self) -> dict[str, NDArray[np.int32]]:
        """``[n]`` the most probable class by each head."""
        found = {head: np.empty(len(self), dtype=np.int32) for head in self.logits}
        for some, block in self.blocks():
            for head, logits in block.logits.items():
                found[head][some] = np.asarray(logits).argmax(axis=1)
        return found


def _read_once(rows: Rows2D | ReadOnce) -> Rows2D | ReadOnce:
    return ReadOnce(rows) if isinstance(rows, LazyArray) else rows


@dataclass(frozen=True, eq=False)
class Run:
    """The model of a fold or of a part: its bank (training rows), the rows that it was selected on, and unseen ones.

    `second` are the calibrate rows once more, through the router's second choice; None where no top-2 row is asked.
    """

    bank: SetRows
    select: SetRows
    calibrate: SetRows
    second: SetRows | None = None


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
        runs: one for each fold; they choose k.
        bank: training rows of the final model.
        select_rows: rows that the final model's scores may choose their settings by; it was trained on none of them.
        n_experts: E; 0 without experts.
        has_others: whether its rows carry each group's log odds of "other".
        parts: one for each part under cross-fitting; they calibrate, for their banks have all rows but a few. Their
            select rows are the final model's.
    """

    key: SubjectKey
    heads: tuple[str, ...]
    runs: tuple[Run, ...]
    bank: SetRows
    select_rows: SetRows
    n_experts: int = 0
    has_others: bool = False
    parts: tuple[Run, ...] = ()

    @property
    def calibrating(self) -> tuple[Run, ...]:
        """Runs whose calibrate rows calibrate the final model."""
        return self.parts or self.runs

    @property
    def calibration_part(self) -> NDArray[np.int64]:
        """``[n]`` the part of each calibration row; those of a single run are dealt to as many."""
        sizes = [len(run.calibrate) for run in self.calibrating]
        if len(sizes) == 1:
            return np.arange(sizes[0]) % N_PARTS
        return np.repeat(np.arange(len(sizes)), sizes)

    @property
    def calibration_expert(self) -> NDArray[np.int64] | None:
        """Expert that each calibration row went to; None without experts."""
        return np.concatenate([_known(run.calibrate.expert) for run in self.calibrating]) if self.n_experts else None


@dataclass(frozen=True, eq=False)
class Part:
    """A scorer fitted for the final model, and the raw scores of all calibration rows by models that did not see them.

    `head` is whose logits it reads, ``"none"`` where it reads none. `second` are the scores of the same rows through
    the router's second choice, where top-2 rows are asked.
    """

    scorer: Scorer
    head: str
    calibration: Floats
    second: Floats | None = None


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
            raw = [scale.apply(scores, _known(expert)) for scale, scores in zip(self.experts, raw, strict=True)]
        return sum_scores(raw, self.standardisers) if self.standardisers else np.asarray(raw[0], dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Detector:
    """One row of the table without its OOD set.

    Attributes:
        subject: what it scores.
        head: whose logits it reads; ``"none"`` where it reads none.
        score: name, ``"a+b"`` for a sum.
        calibrated: whether every part is first put on its expert's scale.
        parts: the summands.
        scales: of the parts, from the calibration rows.
    """

    subject: Subject
    head: str
    score: str
    calibrated: bool
    parts: tuple[Part, ...]
    scales: Scales = Scales()

    @property
    def params(self) -> dict[str, Any]:
        """Settings in force; of a sum, those of its parts by name."""
        if len(self.parts) == 1:
            return self.parts[0].scorer.params()
        return {part.scorer.name: part.scorer.params() for part in self.parts}

    def remarks(self) -> list[tuple[str, str, str]]:
        """(score, whose logits it reads, what there is to say of its fit or of what it is summed by)."""
        found = [(part.scorer.name, part.head, said) for part in self.parts for said in part.scorer.remarks()]
        if len(self.parts) > 1 and (said := Standardiser.remark(len(self.parts[0].calibration))):
            found.append((self.score, self.head, said))
        return found

    def combine(self, raw: Sequence[Floats], expert: NDArray[np.int64] | None) -> Floats:
        """Raw scores of the parts, ``[n]`` each, to the detector's score; higher = more OOD."""
        return self.scales.apply(raw, expert)

    @property
    def is_routed(self) -> bool:
        """Whether its score of a row depends on the expert that the row went to."""
        return self.subject.n_experts > 0 and any(not _reads_others(part.scorer.name) for part in self.parts)

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
        second = self._without_their_part(raw, np.concatenate([_known(rows.expert) for rows in twins]))
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


def score_together(detectors: Sequence[Detector], rows: SetRows) -> list[Floats]:
    """Scores of rows by several detectors, ``[n]`` each; higher = more OOD.

    Rows are read once, a block at a time, and a part is computed once however many detectors it is in.
    """
    parts = list(dict.fromkeys(part for detector in detectors for part in detector.parts))
    raw = dict(zip(parts, _raw_scores([(part.scorer, part.head) for part in parts], rows), strict=True))
    return [detector.combine([raw[part] for part in detector.parts], rows.expert) for detector in detectors]


def _raw_scores(scorers: Sequence[tuple[Scorer, str]], rows: SetRows) -> list[Floats]:
    """Scores of rows by fitted scorers with their heads, ``[n]`` each."""
    found = [np.empty(len(rows), dtype=np.float32) for _ in scorers]
    for some, block in rows.blocks():
        for (scorer, head), scores in zip(scorers, found, strict=True):
            try:
                scores[some] = scorer.score(block.inputs(head))
            except NotFiniteError as error:
                check_finite(rows.inputs(head), "scored", error)
                raise
    return found


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
        self.k_record: dict[str, Any] = {"rule": "given"}
        self._parts: dict[tuple[str, str], Part] = {}
        self._k: int | None = None if config.k == "auto" else config.k

    @property
    def k(self) -> int:
        """As given, or by the one rule from left-out ID classes (`stages.scorers.choose_k`)."""
        if self._k is None:
            folds = [KFold(run.bank.inputs(NO_HEAD), run.select.inputs(NO_HEAD)) for run in self.subject.runs]
            self._k, self.k_record = choose_k(folds, neighbours=self._neighbours)
        return self._k

    def detectors(self) -> list[Detector]:
        """Every score for every head that it applies to; with experts, raw and calibrated."""
        asked = [(head, score) for score in self.config.scores for head in self.heads_of(score)]
        self._fit(key for head, score in asked for key in _parts_of(head, score))
        return [
            self.detector(head, score, calibrated)
            for head, score in asked
            for calibrated in ((False, True) if self.subject.n_experts > 1 and not _reads_others(score) else (False,))
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
        if needs & {"head", "logits"} and not subject.heads:
            return "logits"
        if "head" in needs and not subject.bank.heads:
            return _WEIGHTS
        return None

    def detector(self, head: str, score: str, calibrated: bool = False) -> Detector:
        """One fitted detector."""
        keys = _parts_of(head, score)
        self._fit(keys)
        parts = tuple(self._parts[key] for key in keys)
        routed = _known(self.subject.calibration_expert) if calibrated else None
        scales = Scales.fit([part.calibration for part in parts], routed, self.subject.n_experts)
        return Detector(self.subject, head, score, calibrated, parts, scales)

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
                    for key, scores in zip(new, _raw_scores(pairs, rows), strict=True):
                        kept[key].append(scores)
        if len(subject.calibrating) > 1:
            scorers = [
                self._scorer(name).fit(subject.bank.inputs(head), subject.select_rows.inputs(head))
                for head, name in new
            ]
        for key, scorer in zip(new, scorers, strict=True):
            twice = np.concatenate(second[key]) if second[key] else None
            self._parts[key] = Part(scorer, key[0], np.concatenate(calibration[key]), twice)

    def _scorer(self, name: str) -> Scorer:
        given = self.config.params.get(name, {})
        params: dict[str, Any] = {}
        for followed in scorer_class(name).follows - given.keys():
            params[followed] = self.k if followed == "k" else self.config.temperature
        scorer = get_scorer(name, self.config.profile, **params, **given)
        if isinstance(scorer, KNNScorer):
            scorer.neighbours = self._neighbours
        return scorer


def _parts_of(head: str, score: str) -> list[tuple[str, str]]:
    """(head, score) of each summand."""
    return [(head if reads_head(name) else NO_HEAD, name) for name in score.split("+")]


def needs_of(score: str) -> frozenset[str]:
    """What a score, or the parts of a sum, need; see `stages.scorers.Scorer`."""
    return frozenset().union(*(scorer_class(name).needs for name in score.split("+")))


def reads_head(score: str) -> bool:
    """Whether a score, or a part of a sum, reads a head's logits or its weights."""
    return bool(needs_of(score) & {"logits", "head"})


def gate_share(rows: SetRows, twins: SetRows) -> Floats:
    """``[n]`` the weight of the router's first choice among its two: the gate, made to add up to 1 over them."""
    first, second = _known(rows.confidence), _known(twins.confidence)
    return np.asarray(first / (first + second), dtype=np.float32)


def gate_weighted(first: Floats, second: Floats, share: Floats) -> Floats:
    """Mean of what two experts say of the same rows, the first with weight `share`.

    >>> gate_weighted(np.float32([1, 3]), np.float32([2, 7]), np.float32([0.75, 1])).tolist()
    [1.25, 3.0]
    """
    return np.asarray(share * first + (1 - share) * second, dtype=np.float32)


def _reads_others(score: str) -> bool:
    return "others" in needs_of(score)


def recommended(factory: DetectorFactory) -> Detector:
    """What `predict` takes where nothing is asked: the sum of kNN and energy; each alone fails somewhere."""
    head = "refit" if "refit" in factory.subject.heads else factory.subject.heads[0]
    return factory.detector(head, "knn+energy")


def _known(routed: NDArray[Any] | None) -> NDArray[Any]:
    if routed is None:
        raise InputError("these rows were not routed: calibration over experts needs a mixture's features")
    return routed
