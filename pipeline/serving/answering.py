"""What a detector answers to a question: JSON, whatever was asked. The event loop neither decodes nor computes."""

import asyncio
import json
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.deciding import Serving
from pipeline.serving.batches import Batches
from pipeline.serving.frames import Answer, Question, as_json, refusal
from pipeline.terminal import complain
from stages.detection.detector import Detector, ImageScores
from stages.detection.given import numbers_of
from stages.errors import InputError
from stages.inputs.images import ImageError, image_size

Row = dict[str, Any]  # what is said of one image


class _Asked(NamedTuple):
    pixels: NDArray[np.uint8]  # [3, size, size]
    nearest: int


class Answering:
    """Answers questions by a detector.

    Args:
        detector: answers.
        asked: the limits.

    Attributes:
        batches: gathers images; its `run` has to run.
    """

    def __init__(self, detector: Detector, asked: Serving) -> None:
        self._detector, self._asked = detector, asked
        runtime = detector.runtime
        most = min(asked.batch, runtime.batch)  # more would take another pass, and wait for both
        self.batches: Batches[_Asked, Row] = Batches(
            self._rows, most, asked.patience, runtime.side_by_side, runtime.whole
        )

    def info(self) -> Row:
        """Where the detector came from, what it takes and promises."""
        detector = self._detector
        return {
            "about": dict(detector.about),
            "takes": {"images": bool(detector.runtime.size), "features": sorted(detector.runtime.reads)},
            "runtime": self._asked.runtime,
            "class_names": list(detector.class_names),
            "threshold": detector.threshold.threshold,
        }

    async def answer(self, question: Question) -> Answer | None:
        """What is said of an image or of features, or why nothing; None where nobody waits any more."""
        try:
            async with asyncio.timeout(question.seconds):
                asked = self._features if question.kind == "features" else self._image
                return Answer(question.number, 200, as_json(await asked(question)))
        except TimeoutError:
            return None
        except InputError as error:  # ImageError is one
            return Answer(question.number, 400, refusal(str(error)))
        except Exception as error:
            complain(f"serve: unexpected {type(error).__name__}: {error}; a request was answered by 500")
            traceback.print_exc()
            return Answer(question.number, 500, refusal(f"unexpected {type(error).__name__}"))

    async def _image(self, question: Question) -> Row:
        return await self.batches.ask(partial(self._prepare, question.body, question.nearest))

    async def _features(self, question: Question) -> Row:
        features = await self.batches.prepared(lambda: self._detector.checked(features_of(question.body)))
        nearest = question.nearest
        return {
            "rows": await self.batches.beside(
                lambda: image_rows(self._detector.score_features(features, nearest), nearest)
            )
        }

    def _prepare(self, image: bytes, nearest: int) -> _Asked:
        """By a thread of its own."""
        if self._detector.runtime.size:  # what is no image is said by `prepare`, of a detector that takes images
            width, height = image_size(image)
            if width * height > self._asked.max_pixels:
                raise ImageError(f"too large: {width} × {height} pixels, {self._asked.max_pixels} are the most")
        return _Asked(self._detector.prepare(image), nearest)

    def _rows(self, batch: Sequence[_Asked]) -> list[Row]:
        """By a thread of the network's."""
        most = max(own.nearest for own in batch)
        rows = image_rows(self._detector.score_prepared(np.stack([own.pixels for own in batch]), most), most)
        return [_with_nearest(row, own.nearest) for row, own in zip(rows, batch, strict=True)]


def features_of(body: bytes) -> Mapping[str, NDArray[np.float64]]:
    """Arrays by name of ``{"features": {"cls": [[…], …]}}``; one array alone is ``cls``.

    Raises:
        InputError: anything else.
    """
    try:
        given: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError("no JSON") from error
    features = given.get("features") if isinstance(given, dict) else None
    if isinstance(given, dict) and (unknown := sorted(given.keys() - {"features"})):
        raise InputError(f"{unknown[0][:20]!r} is not known: give features, and nearest in the query")
    if isinstance(features, list):
        features = {"cls": features}
    if not isinstance(features, dict):
        raise InputError('no features: give {"features": [[…], …]}, a row an image, or arrays by name')
    return {name: numbers_of(name[:20], values).astype(np.float64) for name, values in features.items()}


def image_rows(found: ImageScores, nearest: int) -> list[Row]:
    """A row for each image, of what JSON has.

    Args:
        found: of n images.
        nearest: how many ID images of each are named; fewer where there are fewer.
    """
    rows: list[Row] = [
        {
            "score": score,
            "p_value": p_value,
            "decision": decision,
            "prediction": prediction,
            "threshold": admits.threshold,
        }
        for score, p_value, decision, prediction, admits in zip(
            found.score.tolist(),
            found.p_value.tolist(),
            found.decision.tolist(),
            found.prediction.tolist(),
            found.admits,
            strict=True,
        )
    ]
    if found.expert is not None:
        for row, expert in zip(rows, found.expert.tolist(), strict=True):
            row["expert"] = expert
    if found.nearest is not None:
        ids, distances = found.nearest.ids.tolist(), found.nearest.distances.tolist()
        for row, names, away in zip(rows, ids, distances, strict=True):
            near = [{"id": name, "distance": each} for name, each in zip(names, away, strict=True) if each == each]
            row["nearest"] = near[:nearest]
    return rows


def _with_nearest(row: Row, nearest: int) -> Row:
    """The row with as many as were asked for: others of its batch asked for more."""
    if not nearest:
        return {name: value for name, value in row.items() if name != "nearest"}
    return row | {"nearest": row["nearest"][:nearest]}
