"""Verb: the fitted detector of a study on new images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cache import FeatureCache
from stages.config import ScoreConfig
from stages.detection.conformal import ThresholdEstimate, conformal_p_values, threshold_at
from stages.detection.detectors import FittedDetector
from stages.detection.factory import DetectorFactory
from stages.detection.frozen import FrozenFeatures
from stages.detection.mondrian import GroupedCalibration
from stages.detection.refined import RefinedFeatures
from stages.detection.sources import BackboneSource
from stages.detection.subject import NO_HEAD, known_route
from stages.errors import InputError
from stages.id_data.split import Rows
from stages.progress import NullProgress, Progress
from stages.results.method import FROZEN_SUM, RECOMMENDED
from stages.scorers.neighbours.bank import FeatureBank

N_NEAREST = 3
Per = Literal["all", "class", "expert"]  # whose ID images false alarms are promised for


@dataclass(frozen=True)
class Neighbour:
    """An id-train image, and how far from it a new one lies: √(2 − 2 cos) of their features."""

    id: str
    distance: float


@dataclass(frozen=True)
class Prediction:
    """What a fitted detector says of one new image.

    Attributes:
        path: as it was given.
        score: higher = more OOD.
        p_value: at most α for at most a share α of new ID images (`stages.detection.conformal`); small = OOD.
        threshold: a score at or below it is admitted as ID; None where the calibration rows are too few for it.
        threshold_lo: lower end of its 95 % confidence interval; None where they are too few for that.
        threshold_hi: upper end, likewise.
        decision: ``"ID"`` or ``"OOD"``; ``"unknown"`` without a threshold.
        prediction: class name.
        expert: that the image was routed to; None without experts.
        nearest: the nearest of the training images that its score may look at, the routed expert's where there are
            experts; ascending by distance.
        flagged: whether it is OOD among the images that were asked about together, at a false discovery rate; None
            where none was asked.
    """

    path: str
    score: float
    p_value: float
    threshold: float | None
    threshold_lo: float | None
    threshold_hi: float | None
    decision: str
    prediction: str
    expert: int | None
    nearest: tuple[Neighbour, ...]
    flagged: bool | None = None


class Predictor:
    """The fitted detector of a study, for new images: thresholds come from the calibration rows alone.

    Args:
        source: a backbone with its trained mixtures; the first one is used, or the frozen features where there is none.
        config: scores, k, temperature.
        score: name; None takes the recommended one.
        progress: of what has to be refined first.
        per: whose ID images are promised how many false alarms: all together, or those of each predicted class or of
            each expert, which then have p-values and thresholds of their own.

    Raises:
        InputError: an unknown score, or experts where there are none.
    """

    def __init__(
        self,
        source: BackboneSource,
        config: ScoreConfig,
        score: str | None = None,
        progress: Progress | None = None,
        per: Per = "all",
    ) -> None:
        self._refined: RefinedFeatures | None = None
        self._frozen = FrozenFeatures(source)
        if source.mixtures:
            self._refined = RefinedFeatures(source, source.mixtures[0], progress or NullProgress())
        self._factory = DetectorFactory((self._refined or self._frozen).subject(), config)
        self._bank_ids = source.data.train.ids[source.data.split.final_train]
        self._banks: dict[int | None, tuple[FeatureBank, Rows]] = {}
        self.detector = self._asked(score or RECOMMENDED.score)
        self._calibration = self.detector.calibration_scores
        self.threshold = threshold_at(self._calibration)
        self._class_names = source.data.class_names
        self.per, self._groups = per, self._grouped(per)

    @property
    def reads(self) -> frozenset[str]:
        """Features of a new image that decide; a cache may lack the others."""
        experts = self._refined.mixture().config.reads if self._refined else ("cls",)
        return frozenset(experts).union(*(part.scorer.needs & {"patches"} for part in self.detector.parts))

    def _asked(self, score: str) -> FittedDetector:
        heads = self._factory.heads_of(score)
        if not heads:
            raise InputError(f"{score} needs {self._factory.why_not(score)}: ask for another")
        # A score on features alone still wants a head: its class is what the image is called.
        best = (RECOMMENDED if self._refined else FROZEN_SUM).head
        return self._factory.detector(best if heads == (NO_HEAD,) or best in heads else heads[0], score)

    def _grouped(self, per: Per) -> GroupedCalibration | None:
        """Calibration scores by predicted class or expert; groups come to the calibration rows as to new ones."""
        subject = self.detector.subject
        if per == "all":
            return None
        if per == "class":
            found = [run.calibrate.predictions()[self.detector.head] for run in subject.calibrating]
            return GroupedCalibration(self._calibration, np.concatenate(found), len(self._class_names))
        if (expert := subject.calibration_expert) is None:
            raise InputError("a promise per expert needs a mixture of experts: ask for one per class, or for all")
        return GroupedCalibration(self._calibration, expert, subject.n_experts)

    def predict(self, paths: Sequence[str], cache: FeatureCache) -> list[Prediction]:
        """Decisions for the rows of a cache of new images."""
        labels = np.full(cache.n_rows, -1, dtype=np.int32)
        if self._refined is not None:
            rows = self._refined.passing_rows(cache, labels)
        else:
            rows = self._frozen.rows(cache, labels)
        scores = self.detector.score_rows(rows)
        predicted = rows.predictions()[self.detector.head]
        experts = [None] * len(rows) if rows.expert is None else rows.expert.tolist()
        nearest = self._nearest(np.asarray(rows.features), experts)
        p_values, admitting = self._judged(scores, predicted, rows.expert)
        return [
            Prediction(
                path=path,
                score=float(scores[index]),
                p_value=float(p_values[index]),
                threshold=admits.threshold,
                threshold_lo=admits.lo,
                threshold_hi=admits.hi,
                decision=admits.decide(float(scores[index])),
                prediction=self._class_names[predicted[index]],
                expert=experts[index],
                nearest=nearest[index],
            )
            for index, (path, admits) in enumerate(zip(paths, admitting, strict=True))
        ]

    def _judged(
        self, scores: NDArray[np.float32], predicted: NDArray[np.int32], expert: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.float64], list[ThresholdEstimate]]:
        """``[n]`` p-value of each score, and the threshold for it: of all calibration rows, or of its group's."""
        if self._groups is None:
            return conformal_p_values(scores, self._calibration), [self.threshold] * len(scores)
        group = predicted if self.per == "class" else known_route(expert)
        thresholds = {own: self._groups.threshold(own) for own in np.unique(group).tolist()}
        return self._groups.p_values(scores, group), [thresholds[own] for own in group.tolist()]

    def _nearest(self, features: NDArray[np.float32], experts: Sequence[int | None]) -> list[tuple[Neighbour, ...]]:
        found: list[tuple[Neighbour, ...]] = [()] * len(features)
        for expert in dict.fromkeys(experts):
            queries = [index for index, own in enumerate(experts) if own == expert]
            bank, rows = self._bank(expert)
            distances, neighbours = bank.search(features[queries], min(N_NEAREST, len(bank)))
            for index, away, near in zip(queries, distances.tolist(), rows[neighbours].tolist(), strict=True):
                pairs = zip(near, away, strict=True)
                found[index] = tuple(Neighbour(str(self._bank_ids[row]), distance) for row, distance in pairs)
        return found

    def _bank(self, expert: int | None) -> tuple[FeatureBank, Rows]:
        """An expert's training features, or all of them, and which rows of the subject's bank they are."""
        if expert not in self._banks:
            own = self._factory.subject.bank
            rows = np.arange(len(own)) if own.expert is None else np.flatnonzero(own.expert == expert)
            self._banks[expert] = FeatureBank(own.features[rows]), rows
        return self._banks[expert]
