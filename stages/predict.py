"""Verb: the fitted detector of a study on new images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.config import ScoreConfig
from stages.detection.conformal import ThresholdEstimate
from stages.detection.deciding import DecidingDetector
from stages.detection.detector import Detector, Nearest, Per
from stages.detection.sources import BackboneSource
from stages.progress import Progress
from stages.results.method import recommended_of

N_NEAREST = 3


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
    """The detector of a study as it would be exported, for new images.

    Args:
        source: a backbone with its trained mixtures; the first one is used, or the frozen features where there is none.
        config: scores, k, temperature.
        score: name; None takes the recommended one.
        progress: of what has to be refined first.
        choices: where what ``auto`` chose is kept.
        per: whose ID images are promised how many false alarms, as of `stages.detection.detector.Detector`.

    Attributes:
        fitted: score, head and settings, as the table has them.
        detector: what scores.

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
        choices: Path | None = None,
    ) -> None:
        method = recommended_of(bool(source.mixtures), source.data.labels == "given", config.scores)
        deciding = DecidingDetector(source, config, score or method.score, method.head, progress, choices)
        self.fitted = deciding.fitted
        self.detector = deciding.detector(per)

    @property
    def threshold(self) -> ThresholdEstimate:
        """Of all calibration rows."""
        return self.detector.threshold

    def predict(self, paths: Sequence[str], images: NDArray[np.uint8] | Mapping[str, NDArray[Any]]) -> list[Prediction]:
        """Decisions.

        Args:
            paths: what each is called.
            images: what `Detector.prepare` gave of each; or features, arrays by name.
        """
        return predictions_by(self.detector, paths, images)


def predictions_by(
    detector: Detector, paths: Sequence[str], images: NDArray[np.uint8] | Mapping[str, NDArray[Any]]
) -> list[Prediction]:
    """Decisions of any detector; arguments as of `Predictor.predict`."""
    if isinstance(images, Mapping):
        found = detector.score_features(images, N_NEAREST)
    else:
        found = detector.score_prepared(images, N_NEAREST)
    nearest = _neighbours(found.nearest) if found.nearest else []
    return [
        Prediction(
            path=path,
            score=float(found.score[index]),
            p_value=float(found.p_value[index]),
            threshold=admits.threshold,
            threshold_lo=admits.lo,
            threshold_hi=admits.hi,
            decision=str(found.decision[index]),
            prediction=str(found.prediction[index]),
            expert=None if found.expert is None else int(found.expert[index]),
            nearest=nearest[index],
        )
        for index, (path, admits) in enumerate(zip(paths, found.admits, strict=True))
    ]


def _neighbours(nearest: Nearest) -> list[tuple[Neighbour, ...]]:
    """Of each row, those that there are."""
    rows = zip(nearest.ids.tolist(), nearest.distances.tolist(), strict=True)
    return [tuple(Neighbour(*each) for each in zip(ids, away, strict=True) if each[0]) for ids, away in rows]
