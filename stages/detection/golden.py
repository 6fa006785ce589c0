"""Golden rows: images whose scores are known, scored again wherever a detector is started."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stages.detection.calibration import Standardiser
from stages.detection.parts import GoldenRows
from stages.detection.runtime import NetworkRows
from stages.errors import InputError
from stages.scorers import FROZEN

if TYPE_CHECKING:
    from stages.detection.detector import Detector

TOLERANCE = 1e-4  # of scores, in deviations of the calibration scores
RUNTIME_TOLERANCE = 1e-3  # of scores by another runtime than torch
# Of a network that computes in half precision, which each kind of device rounds otherwise.
HALF_TOLERANCE = {"float16": 0.2, "bfloat16": 2.5}
GOLDEN_ROWS = 32

_BY_FLOAT32 = "score in float32"  # among the values of golden rows of a network that computes in half precision


def tolerance_of(detector: "Detector") -> float:
    """How far scores by torch may be from those of where a detector was made, in deviations of the calibration scores.

    Another GPU, driver or kind of device sums in another order. In float32 that is nothing; in half precision a score
    moves by what its rounding is, and the least that can be asked is that it moves by no more. So of half precision
    `check_in_float32` asks beside that, and what it asks is as strict as of float32.
    """
    return HALF_TOLERANCE.get(_precision(detector), TOLERANCE)


def _precision(detector: "Detector") -> str:
    return str(detector.spec.compute.get("precision", "float32"))


def golden_rows(
    detector: "Detector",
    named: Sequence[tuple[str, str]],
    images: tuple[NDArray[np.uint8], ...] | None,
    features: dict[str, NDArray[Any]] | None,
) -> GoldenRows:
    """Rows with what a detector makes of them: the first `GOLDEN_ROWS` that are not at the threshold itself.

    Args:
        detector: in the process that writes the bundle.
        named: set and id of each row.
        images: pixels ``[h, w, 3]``, where the detector takes images.
        features: arrays ``[n, …]`` as a cache has them, where it takes features.
    """
    score = detector.judge([_through_network(detector, images, features)]).score
    kept = np.flatnonzero(_is_decided(detector, score))[:GOLDEN_ROWS]
    if images is not None:
        images = tuple(images[row] for row in kept)
    if features is not None:
        features = {name: array[kept] for name, array in features.items()}
    rows = _through_network(detector, images, features)
    found, values = detector.judge([rows]), values_of(detector, rows)
    if images is not None and _precision(detector) in HALF_TOLERANCE:
        values[_BY_FLOAT32] = _scores_in_float32(detector, images)
    sets, ids = (tuple(names) for names in zip(*(named[row] for row in kept), strict=True))
    return GoldenRows(sets, ids, images, features, values, found.score, tuple(found.decision.tolist()))


def _is_decided(detector: "Detector", score: NDArray[np.float32]) -> NDArray[np.bool_]:
    """``[n]`` whether a score is away from the threshold; all, where there is none or all are at it."""
    if detector.threshold.threshold is None:
        return np.ones(len(score), dtype=bool)
    # Nearer to the threshold rounding might decide.
    near = max(10 * TOLERANCE, RUNTIME_TOLERANCE, tolerance_of(detector)) * calibration_deviation(detector)
    away = np.abs(score - detector.threshold.threshold) > near
    return away if away.any() else ~away


def calibration_deviation(detector: "Detector") -> float:
    """Of the calibration scores: the unit of differences between scores."""
    return Standardiser.fit(detector.parts.calibration.scores).std


def _through_network(
    detector: "Detector", images: tuple[NDArray[np.uint8], ...] | None, features: Mapping[str, NDArray[Any]] | None
) -> NetworkRows:
    if images is not None:
        return detector.runtime.run(_prepared(detector, images))
    return detector.runtime.run_stored(detector.checked(features or {}))


def _prepared(detector: "Detector", images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return np.stack([detector.prepare(pixels) for pixels in images])


def _scores_in_float32(detector: "Detector", images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """``[n]`` as if the network computed in float32."""
    return detector.judge([detector.runtime.run_in_float32(_prepared(detector, images))]).score


def values_of(detector: "Detector", rows: NetworkRows) -> dict[str, NDArray[Any]]:
    """What came of rows on the way to their scores, in order."""
    found = {name: rows.stored[name] for name in ("cls", "tap_cls") if name in rows.stored}
    if rows.refined is not None:
        found |= {"gate": rows.refined.gate, "expert": rows.refined.expert, "features": rows.refined.features}
    seen = detector.set_rows(rows)
    found["logits"] = np.asarray(seen.logits[detector.parts.head], dtype=np.float32)
    names = [f"{FROZEN if part.head.startswith(FROZEN) else ''}{part.scorer.name}" for part in detector.parts.scores]
    return found | dict(zip(names, detector.raw_scores(seen), strict=True))


def check_golden(detector: "Detector", golden: GoldenRows, tolerance: float = TOLERANCE) -> None:
    """Score the golden rows again.

    Args:
        detector: that was loaded.
        golden: from the same file.
        tolerance: of scores, in deviations of the calibration scores.

    Raises:
        InputError: a decision is another, or a score differs by more than this; what differs first on
            the way is named.
    """
    if not golden.ids or not len(golden.ids) == len(golden.score) == len(golden.decision) == len(golden.sets):
        raise InputError("it has no golden rows")
    rows = _through_network(detector, golden.images, golden.features)
    score = detector.judge([rows]).score
    decision = np.array([detector.threshold.decide(each) for each in score.tolist()])
    away = np.abs(score.astype(np.float64) - golden.score) / calibration_deviation(detector)
    decided = decision == np.array(golden.decision)
    if decided.all() and (away <= tolerance).all():
        return
    row = int(np.argmax(np.where(decided, away, np.inf)))
    what = f"a score is off by {away.max():.2g} deviations, {tolerance:g} is allowed"
    if not decided.all():
        what = f"a decision is {decision[row]}, was {golden.decision[row]}"
    differs = [
        name
        for name, values in values_of(detector, rows).items()
        if _differ(values, golden.values.get(name, np.zeros(0)), tolerance)
    ]
    first = f"; {differs[0]} is the first to differ" if differs else ""
    raise InputError(
        f"its golden rows are scored otherwise here than where it was made: of {golden.ids[row][:60]!a} {what}{first}: "
        f"take the device and the versions that `info` names, or export it anew{_of_float32(detector)}"
    )


def check_in_float32(detector: "Detector", golden: GoldenRows) -> None:
    """Score the golden images by the network in float32, where it computes in half precision.

    So weights, transform, experts, heads and scores are held to `TOLERANCE` on every device; what may differ by more
    is the rounding of half precision alone.

    Args:
        detector: that was loaded.
        golden: from the same file; of one that was written before they had such scores nothing is compared.

    Raises:
        InputError: a score differs by more than `TOLERANCE`.
    """
    theirs = golden.values.get(_BY_FLOAT32)
    if theirs is None or golden.images is None or _precision(detector) not in HALF_TOLERANCE:
        return
    ours = _scores_in_float32(detector, golden.images)
    if theirs.shape != ours.shape:
        raise InputError(f"its golden rows have {theirs.shape} scores in float32, not {ours.shape}")
    away = np.abs(ours.astype(np.float64) - theirs) / calibration_deviation(detector)
    if not (away <= TOLERANCE).all():
        row = int(np.argmax(np.where(away <= TOLERANCE, 0, np.nan_to_num(away, nan=np.inf))))
        raise InputError(
            f"its golden rows are scored otherwise here than where it was made, in float32 too: of "
            f"{golden.ids[row][:60]!a} a score is off by {away[row]:.2g} deviations, {TOLERANCE:g} is allowed: "
            "take the versions that `info` names, or export it anew"
        )


def _of_float32(detector: "Detector") -> str:
    """What to do beside that where devices do not agree."""
    precision = _precision(detector)
    if precision not in HALF_TOLERANCE:
        return ""
    return f' of a study with precision = "float32", for devices round {precision} otherwise'


def _differ(ours: NDArray[Any], theirs: NDArray[Any], tolerance: float) -> bool:
    """Whether values are others, beyond rounding."""
    if ours.shape != theirs.shape:
        return True
    finite = np.isfinite(theirs)
    ours, theirs = ours[finite].astype(np.float64), theirs[finite].astype(np.float64)
    return bool(ours.size and np.abs(ours - theirs).max() > tolerance * (theirs.std() or 1.0))
