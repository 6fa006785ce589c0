"""That another runtime scores images as torch does, shown on images of the study before anybody relies on it."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.detection.detector import Detector, ImageScores
from stages.detection.golden import RUNTIME_TOLERANCE, calibration_deviation
from stages.detection.onnx_runtime import OnnxRuntime
from stages.detection.runtime import Runtime
from stages.errors import StageError
from stages.inputs.images import ImageError

PROOF_IMAGES = 1000
PROOF_BATCHES = (1, 2, 33)


class Proof(NamedTuple):
    """What was shown.

    Attributes:
        images: how many were scored by both.
        away: the largest difference of a score, in deviations of the calibration scores.
    """

    images: int
    away: float


def prove_runtime(reference: Detector, runtime: OnnxRuntime, images: Iterable[tuple[str, bytes]]) -> Proof:
    """Score images by both, from their files on, in passes of `PROOF_BATCHES` images.

    Args:
        reference: the detector by torch.
        runtime: of its graph: what that gives must be judged the same.
        images: name and file of each; what neither can use is left out.

    Raises:
        StageError: a decision is another, a score differs by more than `RUNTIME_TOLERANCE` deviations, or an image is
            refused by one of them alone.
    """
    others = {batch: runtime.with_batch(batch) for batch in PROOF_BATCHES}
    waiting, n, away = iter(images), 0, 0.0
    while block := list(islice(waiting, max(PROOF_BATCHES))):
        names, ours, theirs = _prepared(reference, runtime, block)
        if not names:
            continue
        expected = reference.score_prepared(np.stack(theirs))
        for batch, other in others.items():
            found = reference.judge([other.run(np.stack(ours))])
            away = max(away, _compared(calibration_deviation(reference), names, found, expected, batch))
        n += len(names)
    return Proof(n, away)


def _prepared(
    reference: Detector, runtime: OnnxRuntime, block: Sequence[tuple[str, bytes]]
) -> tuple[list[str], list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """Names of images that can be used, with their pixels by the one and by the other."""
    names, ours, theirs = [], [], []
    for name, data in block:
        own, other = _pixels_or_reason(runtime, data), _pixels_or_reason(reference.runtime, data)
        if isinstance(own, str) != isinstance(other, str):
            reason = own if isinstance(own, str) else other
            raise StageError(f"onnx does not score as torch does: {name[:60]!a} is refused by one alone: {reason}")
        if not isinstance(own, str) and not isinstance(other, str):
            names.append(name)
            ours.append(own)
            theirs.append(other)
    return names, ours, theirs


def _pixels_or_reason(runtime: Runtime, data: bytes) -> NDArray[np.uint8] | str:
    try:
        return runtime.prepare(data)
    except ImageError as error:
        return str(error)


def _compared(unit: float, names: Sequence[str], found: ImageScores, expected: ImageScores, batch: int) -> float:
    """How far scores are apart at most, in deviations."""
    away = np.abs(found.score.astype(np.float64) - expected.score) / unit
    same = found.decision == expected.decision
    if same.all() and (away <= RUNTIME_TOLERANCE).all():
        return float(away.max())
    row = int(np.argmax(np.where(same, away, np.inf)))
    what = f"the score is off by {away[row]:.2g} deviations, {RUNTIME_TOLERANCE:g} is allowed"
    if not same[row]:
        what = f"the decision is {found.decision[row]}, by torch {expected.decision[row]}"
    raise StageError(
        f"onnx does not score as torch does: of {names[row][:60]!a} in passes of {batch} {what}: export without --onnx"
    )
