"""Verb: the fitted detector of a study on new images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cache import FeatureCache
from stages.config import ScoreConfig
from stages.detectors import NO_HEAD, Detector, DetectorFactory, recommended
from stages.errors import InputError
from stages.progress import NullProgress, Progress
from stages.scorers import threshold_at
from stages.subjects import BackboneSource, FrozenFeatures, RefinedFeatures


@dataclass(frozen=True)
class Prediction:
    """What a fitted detector says of one new image."""

    path: str
    score: float
    threshold: float
    decision: str  # "ID" or "OOD"
    prediction: str  # class name
    expert: int | None


class Predictor:
    """The fitted detector of a study, for new images: thresholds come from the calibration rows alone.

    Args:
        source: a backbone with its trained mixtures; the first one is used, or the frozen features where there is none.
        config: scores, k, temperature.
        score: name; None takes the recommended one.
        progress: of what has to be refined first.

    Raises:
        InputError: an unknown score.
    """

    def __init__(
        self, source: BackboneSource, config: ScoreConfig, score: str | None = None, progress: Progress | None = None
    ) -> None:
        self._refined: RefinedFeatures | None = None
        self._frozen = FrozenFeatures(source)
        if source.mixtures:
            self._refined = RefinedFeatures(source, source.mixtures[0], progress or NullProgress())
        self._factory = DetectorFactory((self._refined or self._frozen).subject(), config)
        self.detector = recommended(self._factory) if score is None else self._asked(score)
        self.threshold = threshold_at(self.detector.calibration_scores)
        self._class_names = source.data.class_names

    def _asked(self, score: str) -> Detector:
        heads = self._factory.heads_of(score)
        if not heads:
            raise InputError(f"{score} needs {self._factory.why_not(score)}: ask for another")
        # A score on features alone still wants a head: its class is what the image is called.
        best = "refit" if self._refined else "probe"
        return self._factory.detector(best if heads == (NO_HEAD,) or best in heads else heads[0], score)

    def predict(self, paths: Sequence[str], cache: FeatureCache) -> list[Prediction]:
        """Decisions for the rows of a cache of new images."""
        labels = np.full(cache.n_rows, -1, dtype=np.int32)
        if self._refined is not None:
            rows = self._refined.passing_rows(cache, labels)
        else:
            rows = self._frozen.rows(cache, labels)
        scores = self.detector.score_rows(rows)
        predicted = rows.logits[self.detector.head].argmax(1)
        return [
            Prediction(
                path=path,
                score=float(scores[index]),
                threshold=self.threshold.threshold,
                decision="ID" if scores[index] <= self.threshold.threshold else "OOD",
                prediction=self._class_names[predicted[index]],
                expert=None if rows.expert is None else int(rows.expert[index]),
            )
            for index, path in enumerate(paths)
        ]
