"""What `watch` says of a stream: a line of JSON for each score, and a state that a killed process goes on from."""

import io
import json
import math
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.fingerprint import fingerprint
from pipeline.deciding import Watching
from pipeline.prepared import prepared_images
from pipeline.terminal import complain
from stages.detection.bundle import read_bundle
from stages.detection.detector import Detector
from stages.detection.drift import DriftMonitor, StreamState
from stages.detection.parts import DetectorParts
from stages.errors import InputError
from stages.files.bundle_file import check_is_bundle
from stages.files.documents import read_document, write_document, write_text
from stages.inputs.images import SampleTable, list_images

_VERSION = 2  # of the state
_BLOCK = 32  # images that are scored at once


@dataclass(frozen=True)
class Seen:
    """What stands in a stream: a score, or why there is none.

    Attributes:
        id: of the image, or of the line.
        score: higher = more OOD.
        unusable: why there is no score; empty where there is one.
    """

    id: str
    score: float = math.nan
    unusable: str = ""


class StreamWatch:
    """A stream beside the calibration rows of a detector.

    Attributes:
        last: id of the last row of the stream, from the state where it goes on; None before the first.
        unusable: rows so far that have no score.

    Args:
        calibration: ``[n]`` scores of the calibration rows.
        asked: how.
        kind: of the stream, ``images`` or ``scores``.

    Raises:
        InputError: the state is damaged, or of another detector, ``alpha``, seed or kind of stream.
    """

    def __init__(self, calibration: NDArray[np.floating], asked: Watching, kind: str = "scores") -> None:
        self._asked = asked
        scores = np.sort(np.asarray(calibration, dtype=np.float64)).tolist()
        self._about = {
            "version": _VERSION,
            "kind": kind,
            "calibration": fingerprint({"scores": scores}),
            "alpha": asked.alpha,
            "seed": asked.seed,
        } | ({"strict": True} if asked.strict else {})
        self.last: str | None = None
        self.unusable = 0
        self._monitor = DriftMonitor(calibration, asked.alpha, asked.seed, self._stored(), asked.strict)

    def _stored(self) -> StreamState | None:
        path = self._asked.state
        if path is None or not path.exists():
            return None
        stored = read_document(path)
        if stored is None:
            raise InputError(f"{path}: damaged, or no state of a stream: delete it to begin anew")
        for key in sorted((self._about.keys() | stored.keys()) - {"last", "unusable", "stream"}):
            ours, theirs = self._about.get(key), stored.get(key)
            if ours != theirs:
                said = f"a stream with {key} {theirs!r}, not {ours!r}"
                raise InputError(f"{path}: {said}: give another --state, or delete it to begin anew")
        try:
            self.last, self.unusable = stored["last"], stored["unusable"]
            return StreamState(**stored["stream"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: no state of a stream: delete it to begin anew") from error

    def lines(self, stream: Iterable[Seen]) -> Iterator[str]:
        """JSON for each row; what was taken of it is in the state and in Prometheus's file.

        A line that could not be delivered, to a full disk or a process that is gone, is given again.
        """
        for seen in stream:
            yield json.dumps(self._line(seen), ensure_ascii=False)
            self.last = seen.id
            if self._asked.prometheus is not None:
                write_text(self._asked.prometheus, prometheus_text(self._monitor, self.unusable))
            if self._asked.state is not None:
                stream_state = {"last": self.last, "unusable": self.unusable, "stream": asdict(self._monitor.state)}
                write_document(self._asked.state, self._about | stream_state)

    def _line(self, seen: Seen) -> dict[str, Any]:
        if seen.unusable:
            self.unusable += 1
            return {"id": seen.id, "unusable": seen.unusable}
        return {"id": seen.id} | asdict(self._monitor.update(seen.score))


def watch_lines(bundle: str, source: str, asked: Watching) -> Iterator[str]:
    """A line of JSON for each image of a source, or for each score of standard input.

    Args:
        bundle: file of the detector.
        source: images as `list_images` takes them, in the order of their names, of which those up to the last that the
            state knows are not looked at again; ``"-"``: scores, one a line, for which no network is loaded.
        asked: how.

    Raises:
        InputError: no detector, no images, a state of something else.
    """
    check_is_bundle(bundle)
    if asked.state is not None and asked.state == asked.prometheus:
        raise InputError(f"--state and --prometheus: {asked.state} is given for both")
    if source == "-":
        if sys.stdin is None:
            raise InputError("-: standard input is closed; give scores there, one a line, or images")
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(
                encoding="utf-8", errors="replace"
            )  # bytes that are no text are lines without a score
        parts = read_bundle(bundle).parts
        watch = StreamWatch(parts.calibration.scores, asked)
        _say_what_holds(parts, asked)
        yield from _counted(watch, scores_of(sys.stdin), "line")
        return
    images = list_images(source)  # a missing folder is said before work
    if len(images.class_names) > 1:
        complain(f"watch: {source} has a folder per class: a stream in the order of its classes drifts by itself")
    detector = Detector.load(bundle, runtime=asked.runtime)
    if not detector.runtime.size:
        raise InputError(
            f"{bundle}: takes features, not images: give their scores on standard input, and - as the source"
        )
    watch = StreamWatch(detector.parts.calibration.scores, asked, kind="images")
    _say_what_holds(detector.parts, asked)
    yield from _counted(watch, _scored(detector, images, watch.last), "image")


def _counted(watch: StreamWatch, stream: Iterable[Seen], what: str) -> Iterator[str]:
    """Lines of a stream; at its end it is said how many rows had no score."""
    before, seen = watch.unusable, 0
    for line in watch.lines(stream):
        seen += 1
        yield line
    if unusable := watch.unusable - before:
        complain(f"watch: {unusable} of {seen} {what}s cannot be used, and count for nothing")


def _say_what_holds(parts: DetectorParts, asked: Watching) -> None:
    """The first line: what is promised of false alarms, and whether exactly."""
    promise = f"watch: a stream of ID images is ever called drifting with probability {asked.alpha:g} at most"
    if parts.calibration.exact or asked.strict:
        complain(f"{promise}, exactly")
        return
    scaled = parts.scales.standardisers or parts.scales.experts
    why = "are on scales that they set" if scaled else "are by cross-fitted models, and not by the final one"
    complain(f"{promise}, nearly: the calibration scores {why}; --strict makes it exact")


def _scored(detector: Detector, images: SampleTable, last: str | None) -> Iterator[Seen]:
    """Scores of the images whose names come after the last one's."""
    ids = [id_.encode() for id_ in images.ids]
    first = 0 if last is None else bisect_right(ids, last.encode())
    if first:
        complain(f"watch: goes on after {last}, by --state: {first} images up to it are not looked at again")
    for start in range(first, len(images), _BLOCK):
        prepared = prepared_images(detector, images.reader(start, start + _BLOCK))
        usable = [pixels for pixels in prepared if not isinstance(pixels, str)]
        scores = iter(detector.score_prepared(np.stack(usable)).score.tolist() if usable else [])
        for name, pixels in zip(images.ids[start : start + _BLOCK], prepared, strict=True):
            yield Seen(name, unusable=pixels) if isinstance(pixels, str) else Seen(name, next(scores))


def scores_of(lines: Iterable[str]) -> Iterator[Seen]:
    """A stream of scores, one a line: a number, or a JSON object with ``score`` and maybe ``id``.

    >>> list(scores_of(["0.5", "", '{"id": "a.jpg", "score": 2}', "cat"]))[1:]
    [Seen(id='a.jpg', score=2.0, unusable=''), Seen(id='line 4', score=nan, unusable="'cat' is no score")]
    """
    for number, text in enumerate(lines, 1):
        if text := text.strip():
            yield _seen(text, f"line {number}")


def _seen(text: str, place: str) -> Seen:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return Seen(place, unusable=f"{text[:60]!r} is no score")
    name = str(given.get("id", place)) if isinstance(given, dict) else place
    name = name.encode("utf-8", "replace").decode()  # JSON may name what UTF-8 has no bytes for
    score = given.get("score") if isinstance(given, dict) else given
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
        return Seen(name, unusable=f"{text[:60]!r} is no score")
    return Seen(name, float(score))


_HELP = {
    "images_total": "counter Images that were scored.",
    "unusable_total": "counter Images or lines without a score.",
    "flagged_total": "counter Images whose score is above the threshold.",
    "ood_share": "gauge Share of OOD among them, as far as it scores above the threshold.",
    "ood_share_lo": "gauge Lower end of its 95 % interval.",
    "ood_share_hi": "gauge Upper end.",
    "log10_evidence": "gauge Logarithm of the martingale for drift.",
    "drift": "gauge 1 once it has reached 1 / alpha.",
}


def prometheus_text(monitor: DriftMonitor, unusable: int) -> str:
    """The last values in Prometheus's text format, for the textfile collector."""
    state, shares = monitor.state, ("ood_share", "ood_share_lo", "ood_share_hi")
    values: dict[str, float | None] = {
        "images_total": state.steps,
        "unusable_total": unusable,
        "flagged_total": state.flagged,
        **dict(zip(shares, monitor.ood_share(), strict=True)),
        "log10_evidence": monitor.log10_evidence,
        "drift": state.alarm_at is not None,
    }
    lines = []
    for name, text in _HELP.items():
        kind, about = text.split(" ", 1)
        if (value := values[name]) is not None:
            lines += [f"# HELP ood_watch_{name} {about}", f"# TYPE ood_watch_{name} {kind}"]
            lines += [f"ood_watch_{name} {float(value):.17g}"]
    return "\n".join(lines) + "\n"
