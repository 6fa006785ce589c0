"""That another runtime scores images as torch does, shown on images of the study before anybody relies on it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from stages.detection.detector import Detector, ImageScores
from stages.detection.golden import RUNTIME_TOLERANCE, deviation
from stages.detection.onnx_runtime import OnnxRuntime
from stages.errors import StageError
from stages.inputs.images import ImageError

PROOF_IMAGES = 1000
BATCHES = (1, 2, 33)


@dataclass(frozen=True)
class Proof:
    """What was shown.

    Attributes:
        images: how many were scored.
        away: the largest difference of a score, in deviations of the calibration scores.
    """

    images: int
    away: float


def prove_runtime(reference: Detector, runtime: OnnxRuntime, images: Iterable[tuple[str, bytes]]) -> Proof:
    """Score images by both, from their files on, in passes of `BATCHES` images.

    Args:
        reference: the detector by torch.
        runtime: that is to say the same.
        images: name and file of each; one that cannot be used is left out by both, or refused.

    Raises:
        StageError: a decision is another, or a score differs by more than `RUNTIME_TOLERANCE` deviations.
    """
    others = {batch: Detector(reference.parts, runtime.with_batch(batch)) for batch in BATCHES}
    waiting, n, away = iter(images), 0, 0.0
    while block := list(islice(waiting, max(BATCHES))):
        names, ours, theirs = _prepared(reference, runtime, block)
        if not names:
            continue
        expected = reference.score_prepared(np.stack(theirs))
        for batch, detector in others.items():
            found = detector.score_prepared(np.stack(ours))
            away = max(away, _compared(reference, names, (found, expected), f"in passes of {batch}"))
        n += len(names)
    return Proof(n, away)


def _prepared(
    reference: Detector, runtime: OnnxRuntime, block: Sequence[tuple[str, bytes]]
) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
    """Names of images that can be used, with their pixels by the one and by the other."""
    names, ours, theirs = [], [], []
    for name, data in block:
        try:
            pixels = reference.runtime.prepare(data)
        except ImageError:
            continue
        names.append(name)
        theirs.append(pixels)
        ours.append(runtime.prepare(data))
    return names, ours, theirs


def _compared(reference: Detector, names: Sequence[str], scores: tuple[ImageScores, ImageScores], how: str) -> float:
    """How far scores are apart at most, in deviations."""
    found, expected = scores
    away = np.abs(found.score.astype(np.float64) - expected.score) / deviation(reference)
    same = found.decision == expected.decision
    if same.all() and (away <= RUNTIME_TOLERANCE).all():
        return float(away.max())
    row = int(np.argmax(np.where(same, away, np.inf)))
    what = f"the score is off by {away[row]:.2g} deviations, {RUNTIME_TOLERANCE:g} is allowed"
    if not same[row]:
        what = f"the decision is {found.decision[row]}, by torch {expected.decision[row]}"
    raise StageError(f"onnx does not score as torch does: of {names[row][:60]!a} {what} ({how} images)")
