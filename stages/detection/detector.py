"""The detector that leaves the laboratory: images in, scores with what they promise out.

::

    detector = Detector.load("pets.ood")        # one file, see stages.detection.bundle
    found = detector.score(["cat.jpg", "fish.jpg"])
    found.score, found.p_value, found.decision, found.prediction
"""

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cache import CacheError, FeatureSpec
from stages.detection.bundle import Bundle, going_together, read_bundle
from stages.detection.conformal import ThresholdEstimate, conformal_p_values, threshold_at
from stages.detection.detectors import raw_scores
from stages.detection.given import images_of, numbers_of
from stages.detection.golden import RUNTIME_TOLERANCE, check_golden, check_in_float32, tolerance_of
from stages.detection.mondrian import GroupedCalibration
from stages.detection.parts import NO_EXPERT, DetectorParts
from stages.detection.runtime import NetworkRows, Runtime, RuntimeName
from stages.detection.subject import NO_HEAD, Head, SetRows, known_route, logits_by_head
from stages.errors import InputError
from stages.id_data.lazy import Floats, LazyArray, ReadOnce, Rows2D
from stages.id_data.taps import TapRows
from stages.inputs.images import ImageError, image_bytes
from stages.machine import default_device, usable_cores
from stages.scorers import FROZEN, restored
from stages.scorers.scorer import Scorer

if TYPE_CHECKING:  # faiss, for those alone who ask for neighbours
    from stages.scorers.neighbours.bank import FeatureBank

Per = Literal["all", "class", "expert"]  # whose ID images false alarms are promised for

_AT_ONCE = 64  # images that are decoded before they are scored, and whose pixels are in memory
_MOST_NEAREST = 10_000  # ID images that may be asked for: a row for each image is held


class Nearest(NamedTuple):
    """The k nearest ID training images of each row.

    Attributes:
        ids: ``[n, k]``, the nearest first; empty where there are fewer.
        distances: ``[n, k]`` float32, √(2 − 2 cos) of the features; NaN where there are fewer.
    """

    ids: NDArray[np.str_]
    distances: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ImageScores:
    """What a detector says of n images.

    Attributes:
        score: ``[n]`` float32, higher = more OOD.
        p_value: ``[n]`` float64, see `stages.detection.conformal.conformal_p_values`; small = OOD.
        decision: ``[n]`` ``"ID"`` or ``"OOD"``; ``"unknown"`` where too few rows calibrate for a threshold.
        prediction: ``[n]`` name of the class that the image would be of.
        expert: ``[n]`` int64, that the image was routed to; None without experts.
        admits: the threshold that decided of each, the same for all but where promises are per class or expert.
        nearest: where it was asked for.
    """

    score: Floats
    p_value: NDArray[np.float64]
    decision: NDArray[np.str_]
    prediction: NDArray[np.str_]
    expert: NDArray[np.int64] | None
    admits: tuple[ThresholdEstimate, ...] = field(repr=False)
    nearest: Nearest | None = None

    def __len__(self) -> int:
        return len(self.score)


class Detector:
    """Says of images whether they are in-distribution. Several threads may use one.

    Args:
        parts: what it is made of.
        runtime: runs its network.
        about: where it came from: study, data, metrics, versions.
        per: whose ID images are promised how many false alarms: all together, or those of each predicted class or of
            each expert, which then have p-values and thresholds of their own (`stages.detection.mondrian`).

    Attributes:
        parts, runtime, about, per: as the arguments.
        threshold: a score at or below it is admitted as ID: 95 % of ID images are.
        class_names: classes of the study.

    Raises:
        InputError: parts that do not go together.
    """

    def __init__(
        self, parts: DetectorParts, runtime: Runtime, about: Mapping[str, Any] | None = None, per: Per = "all"
    ) -> None:
        self.parts = parts
        self.runtime = runtime
        self.about: Mapping[str, Any] = about or {}
        self.class_names = parts.class_names
        self.spec = FeatureSpec.from_dict(parts.spec)
        self._check_heads()
        self._scorers: list[tuple[Scorer, str]] = [(restored(part.scorer), part.head) for part in parts.scores]
        self._calibration = np.sort(parts.calibration.scores.astype(np.float64))
        self.threshold: ThresholdEstimate = threshold_at(self._calibration)
        self.per, self._groups = per, self._grouped(per)

    def _check_heads(self) -> None:
        """Refuse heads that are not there, or are not of these classes."""
        parts = self.parts
        sizes = {name: len((head[0] if isinstance(head, tuple) else head).bias) for name, head in parts.heads.items()}
        if wrong := [name for name, n in sizes.items() if name.startswith(FROZEN) and n != len(parts.class_names)]:
            raise InputError(f"heads: {wrong[0][:20]!r} has {sizes[wrong[0]]} classes, not {len(parts.class_names)}")
        sizes |= {"given": self.spec.n_logits, "trained": len(parts.mixture.groups) if parts.mixture else 0}
        if not sizes.get(parts.head):
            raise InputError(f"head: {parts.head[:20]!r} is not there")
        if sizes[parts.head] != len(parts.class_names):
            raise InputError(f"class_names: {len(parts.class_names)} given, the head has {sizes[parts.head]} classes")
        known = {NO_HEAD, parts.head}
        if parts.mixture is not None:
            known |= {FROZEN + NO_HEAD, FROZEN + "given", *(name for name in parts.heads if name.startswith(FROZEN))}
        if others := [part.head for part in parts.scores if part.head not in known]:
            raise InputError(f"scores: the head {others[0][:20]!r} is not the detector's")

    @property
    def _reads_beside(self) -> set[str]:
        """What summands read of rows beside what the network does: features, and logits that came with them."""
        heads = {self.parts.head, *(part.head for part in self.parts.scores)}
        found = {"cls"} if any(head.startswith(FROZEN) for head in heads) else set()
        return found | ({"logits"} if heads & {"given", FROZEN + "given"} else set())

    def _grouped(self, per: Per) -> GroupedCalibration | None:
        """Calibration scores by predicted class or expert; groups come to the calibration rows as to new ones."""
        rows = self.parts.calibration
        if per == "all":
            return None
        if per == "class":
            return GroupedCalibration(rows.scores, rows.prediction, len(self.class_names))
        if rows.expert is None or self.parts.mixture is None:
            raise InputError("a promise per expert needs a mixture of experts: ask for one per class, or for all")
        return GroupedCalibration(rows.scores, rows.expert, max(self.parts.mixture.groups) + 1)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: str = "cpu",
        runtime: RuntimeName = "torch",
        per: Per = "all",
    ) -> Self:
        """A detector from the file that ``python -m pipeline export`` wrote.

        Every byte of the file is compared, and rows whose scores are known are scored again, before it is given.

        Args:
            path: of the file.
            device: where the network runs: ``"cpu"``, ``"cuda"``, or ``"auto"``, a GPU where there is one.
            runtime: what runs it; ``"onnx"`` of a file that was exported with ``--onnx``, and torch is not imported.
            per: as of the class.

        Raises:
            InputError: no such file, another, damaged, of parts that do not go together; or its golden rows are
                scored otherwise here.
        """
        _check_one_of("runtime", runtime, get_args(RuntimeName))
        _check_one_of("per", per, get_args(Per))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device := str(device)):
            raise InputError(f"device: {device!r} given, must be 'auto', 'cpu' or 'cuda'")
        bundle = read_bundle(path)  # before torch is imported
        with going_together(path):
            network = _by_torch(bundle, device) if runtime == "torch" else _by_onnx(bundle, device)
            detector = cls(bundle.parts, network, bundle.about, per)
            check_golden(detector, bundle.golden, tolerance_of(detector) if runtime == "torch" else RUNTIME_TOLERANCE)
            if runtime == "torch":
                check_in_float32(detector, bundle.golden)
        return detector

    # ------------------------------------------------------------------------------------------------- of images

    def score(self, images: Any, nearest: int = 0) -> ImageScores:
        """Scores of images, whatever their number and order.

        Args:
            images: one or many of: a path, bytes of an image file, a PIL image, pixels (uint8 ``[h, w, 3]``, of tensors
                ``[3, h, w]`` as well); an array of several; a DataLoader of these without a transform to floats, whose
                labels are left alone. Or features, as of `score_features`.
            nearest: so many of the nearest ID training images are named.

        Raises:
            InputError: an image that cannot be used, with its place among them; features that do not fit.
        """
        if isinstance(images, Mapping) or (isinstance(images, np.ndarray) and images.ndim == 2 and _is_float(images)):
            return self.score_features(images, nearest)
        self._check_takes_images()
        items = enumerate(images_of(images))
        blocks: list[NetworkRows] = []
        with ThreadPoolExecutor(max(2, usable_cores())) as pool:
            while block := list(islice(items, _AT_ONCE)):
                prepared = list(pool.map(lambda pair: self._prepared(*pair), block))
                blocks.append(self.runtime.run(np.stack(prepared)))
        return self.judge(blocks, nearest)

    def prepare(self, image: Any) -> NDArray[np.uint8]:
        """One image, as of `score`, resized and cropped to ``[3, size, size]``: what each core may do by itself.

        Raises:
            ImageError: it cannot be used, and why.
            InputError: the detector takes features.
        """
        self._check_takes_images()
        return self.runtime.prepare(image_bytes(image))

    def score_prepared(self, pixels: NDArray[np.uint8], nearest: int = 0) -> ImageScores:
        """`score` of what `prepare` gave of n images, uint8 ``[n, 3, size, size]``; n may be 0.

        Raises:
            InputError: arrays of another type or shape; the detector takes features.
        """
        self._check_takes_images()
        shape = (3, self.runtime.size, self.runtime.size)
        if pixels.dtype != np.uint8 or pixels.shape[1:] != shape:
            given = f"{pixels.dtype} {list(pixels.shape)}"
            raise InputError(f"pixels: {given} given, must be uint8 [n, {str(list(shape))[1:]}, as prepare makes them")
        return self.judge([self.runtime.run(np.ascontiguousarray(pixels))] if len(pixels) else [], nearest)

    def _check_takes_images(self) -> None:
        if not self.runtime.size:
            raise InputError("this detector takes features, not images: give score_features the arrays")

    def _prepared(self, number: int, image: Any) -> NDArray[np.uint8]:
        try:
            return self.prepare(image)
        except (ImageError, CacheError) as error:  # the other of a URL
            name = f" ({os.fspath(image)})" if isinstance(image, str | os.PathLike) else ""
            raise InputError(f"image {number}{name}: cannot be used: {error}") from error

    # ----------------------------------------------------------------------------------------------- of features

    def score_features(self, features: Mapping[str, ArrayLike] | ArrayLike, nearest: int = 0) -> ImageScores:
        """Scores of rows whose features were made elsewhere, by the same network.

        Args:
            features: ``cls`` ``[n, D]``, or arrays by name as a cache has them: ``cls``, ``tap_cls``, ``registers``,
                ``patches``, ``logits``, ``taps``.
            nearest: as in `score`.

        Raises:
            InputError: an array that is needed and is not there, has another shape, or holds what is no finite number.
        """
        arrays = self.checked(features if isinstance(features, Mapping) else {"cls": features})
        return self.judge([self.runtime.run_stored(arrays)] if len(arrays["cls"]) else [], nearest)

    def checked(self, features: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        """What is needed of the arrays, as a cache would hold it; raises as `score_features` does."""
        known = self.spec.datasets()
        needed = self.runtime.reads | self._reads_beside
        if missing := sorted(needed - features.keys()):
            raise InputError(f"features: {missing[0]} is missing; this detector reads {', '.join(sorted(needed))}")
        if unknown := sorted(features.keys() - known.keys()):
            raise InputError(f"features: {unknown[0]} is none of {', '.join(known)}")
        found: dict[str, NDArray[Any]] = {}
        for name in sorted(needed):
            shape, dtype = known[name]
            given = numbers_of(name, features[name])
            if given.shape[1:] != shape or not given.ndim:
                raise InputError(f"features: {name} has shape {list(given.shape)}, must be [n, {str(list(shape))[1:]}")
            with np.errstate(over="ignore"):
                found[name] = given.astype(dtype)
            if bad := int((~np.isfinite(found[name]).all(axis=tuple(range(1, given.ndim)))).sum()):
                raise InputError(f"features: {bad} rows of {name} hold what is no finite {dtype.name}")
        if len({len(array) for array in found.values()}) > 1:
            raise InputError(f"features: {', '.join(found)} have different numbers of rows")
        return found

    # ----------------------------------------------------------------------------------------- of what a network gave

    def judge(self, blocks: Sequence[NetworkRows], nearest: int = 0) -> ImageScores:
        """What is said of rows that went through the network, in any number of blocks."""
        if isinstance(nearest, bool) or not isinstance(nearest, int | np.integer) or not 0 <= nearest <= _MOST_NEAREST:
            raise InputError(f"nearest: {nearest!r} given, must be a whole number from 0 to {_MOST_NEAREST}")
        nearest = int(nearest)
        if not blocks:
            return self._said(np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64), None)
        rows = self.set_rows(NetworkRows.concatenate(blocks))
        score = self.parts.scales.apply(self.raw_scores(rows), rows.expert)
        predicted = np.asarray(rows.logits[self.parts.head]).argmax(axis=1)
        found = self._nearest(np.asarray(rows.features), rows.expert, nearest) if nearest else None
        return self._said(score, predicted, rows.expert, found)

    def _said(
        self, score: Floats, predicted: NDArray[np.int64], expert: NDArray[np.int64] | None, nearest: Nearest | None
    ) -> ImageScores:
        p_values, admits = self._promised(score, predicted, expert)
        decision = [own.decide(each) for own, each in zip(admits, score.tolist(), strict=True)]
        named = np.array(self.class_names)[predicted]
        return ImageScores(score, p_values, np.array(decision, np.str_), named, expert, tuple(admits), nearest)

    def _promised(
        self, score: Floats, predicted: NDArray[np.int64], expert: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.float64], list[ThresholdEstimate]]:
        """``[n]`` p-value of each score, and the threshold for it: of all calibration rows, or of its group's."""
        if self._groups is None:
            return conformal_p_values(score, self._calibration), [self.threshold] * len(score)
        group = predicted if self.per == "class" else known_route(expert)
        thresholds = {own: self._groups.threshold(own) for own in np.unique(group).tolist()}
        return self._groups.p_values(score, group), [thresholds[own] for own in group.tolist()]

    def set_rows(self, rows: NetworkRows) -> SetRows:
        """As scores see them."""
        refined, labels, heads = rows.refined, np.full(len(rows), -1, dtype=np.int32), self.parts.heads
        if refined is None:
            return self._frozen_rows(rows, heads)
        own = {name: head for name, head in heads.items() if not name.startswith(FROZEN)}
        beside = {name.removeprefix(FROZEN): head for name, head in heads.items() if name not in own}
        frozen = self._frozen_rows(rows, beside) if any(name.startswith(FROZEN) for _, name in self._scorers) else None
        features = LazyArray.of(refined.features)
        logits: dict[str, Rows2D | ReadOnce] = {
            "trained": refined.logits,
            **logits_by_head(features, own, refined.expert),
        }
        others = refined.others if refined.others.shape[1] else None
        other = refined.other if refined.gate.shape[1] > 1 else None
        return SetRows(
            refined.features, labels, logits, refined.expert, refined.confidence, others, other, frozen=frozen
        )

    def _frozen_rows(self, rows: NetworkRows, heads: Mapping[str, Head]) -> SetRows:
        """The same by the backbone's own features."""
        features = LazyArray.of(np.asarray(rows.stored["cls"], dtype=np.float32))
        given = {"given": rows.stored["logits"]} if "logits" in rows.stored else {}
        logits: dict[str, Rows2D | ReadOnce] = {**logits_by_head(features, heads), **given}
        labels, taps = np.full(len(rows), -1, dtype=np.int32), None
        if "taps" in rows.stored:
            taps = TapRows.of(rows.stored["taps"], self.spec.taps, self.spec.tap_widths)
        return SetRows(np.asarray(features), labels, logits, patches=rows.patches, taps=taps)

    def raw_scores(self, rows: SetRows) -> list[Floats]:
        """Scores by each summand, ``[n]`` each."""
        return raw_scores(self._scorers, rows)

    # ------------------------------------------------------------------------------------------------- neighbours

    @cached_property
    def _banks(self) -> "dict[str, FeatureBank]":
        from stages.scorers.neighbours.bank import FeatureBank

        return {name: FeatureBank(own.features) for name, own in self.parts.examples.items()}

    def _nearest(self, features: Floats, expert: NDArray[np.int64] | None, k: int) -> Nearest:
        ids, distances = np.full((len(features), k), "", dtype=object), np.full((len(features), k), np.nan, np.float32)
        for number in [None] if expert is None else np.unique(expert).tolist():
            name = NO_EXPERT if number is None else str(number)
            if name not in self._banks:
                continue
            rows = np.arange(len(features)) if expert is None else np.flatnonzero(expert == number)
            most = min(k, len(self._banks[name]))
            away, near = self._banks[name].search(features[rows], most)
            distances[rows, :most] = away
            ids[rows, :most] = np.array(self.parts.examples[name].ids, dtype=object)[near]
        return Nearest(ids.astype(np.str_), distances)


def _check_one_of(name: str, given: object, known: Sequence[str]) -> None:
    if given not in known:
        raise InputError(f"{name}: {given!r} given, must be {' or '.join(map(repr, known))}")


def _by_torch(bundle: Bundle, device: str) -> Runtime:
    from stages.detection.torch_runtime import load_runtime

    return load_runtime(bundle.parts, bundle.weights, default_device() if device == "auto" else device)


def _by_onnx(bundle: Bundle, device: str) -> Runtime:
    from stages.detection.onnx_runtime import load_onnx_runtime

    return load_onnx_runtime(bundle.parts, bundle.graph, device)


def _is_float(array: Any) -> bool:
    return "float" in str(getattr(array, "dtype", ""))
