"""What `predict` prints: CSV, a line an image, or one JSON document."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from cache import FeatureSpec
from pipeline.deciding import Deciding
from pipeline.prepared import prepared_images
from pipeline.sources import source_to_predict
from pipeline.terminal import complain
from pipeline.workspace import Workspace
from stages.detection.auto import CHOSEN_FOLDER
from stages.detection.conformal import BatchPromise
from stages.detection.detector import Detector
from stages.errors import InputError
from stages.inputs.arrays import ArrayTable, list_arrays
from stages.inputs.images import SampleTable, describe_left_out, list_images
from stages.inputs.images.table import is_one_file
from stages.metrics.discoveries import discoveries
from stages.networks.preprocessing import check_decode
from stages.predict import N_NEAREST, Prediction, Predictor, predictions_by
from stages.progress import NullProgress, Progress
from stages.results.formats import csv_text

if TYPE_CHECKING:
    from stages.detection.runtime import RuntimeName

_BLOCK = 128  # images whose pixels are in memory at once
_MANY = 256  # images, of which it is said how far they are
Format = Literal["csv", "json"]
_ABOUT = ("backbone", "features", "variant", "seed", "head", "score", "params")  # what is said of a detector
_COLUMNS = ("path", "score", "threshold", "threshold_lo", "threshold_hi", "decision", "prediction", "expert")


class UnusableImage(NamedTuple):
    """An image that was given and cannot be used."""

    path: str
    reason: str


def predict_paths(workspace: Workspace, paths: Sequence[str], deciding: Deciding, form: Format, which: str) -> str:
    """Score new images with the fitted detector of the study; of fine-tuned backbones, with the first's.

    Args:
        workspace: the study.
        paths: images, folders, tars or lists; features, where the study's sets have such.
        deciding: which score decides, and what is promised.
        form: of the text.
        which: kind of the backbone.
    """
    backbone, progress = next(workspace.existing(which)), workspace.progress
    sources = [_new_source(workspace, path, backbone.spec()) for path in paths]  # a missing path is said before work
    if not workspace.config.has_features:
        check_decode(backbone.start, backbone.device)
    if not workspace.config.has_features and (device := backbone.other_device(backbone.spec())):
        progress.note(
            f"predict: the study's features were made on {device}, those of the new images are made on "
            f"{backbone.device}: they are equal to a tolerance, not to the bit"
        )
    source, config = source_to_predict(workspace, backbone), workspace.config.score
    choices = workspace.config.work / "scores" / CHOSEN_FOLDER
    predictor = Predictor(source, config, deciding.score_name, progress, deciding.per, choices)
    fitted = predictor.fitted
    about = asdict(fitted.subject.key) | {"head": fitted.head, "score": fitted.score, "params": fitted.params}
    return _predicted(predictor.detector, about, (paths, sources), deciding.fdr, form, progress)


def predict_by_bundle(
    bundle: str, paths: Sequence[str], deciding: Deciding, form: Format, runtime: "RuntimeName", progress: Progress
) -> str:
    """The same with an exported detector.

    Args:
        bundle: its file.
        paths: images, folders, tars or lists; files of features, where it takes such.
        deciding: what is promised.
        form: of the text.
        runtime: what runs its network.
        progress: counts images, where they are many.
    """
    if deciding.score_name is not None:
        raise InputError(f"--score chooses among the scores of a study; {bundle} has one, which `info` names")
    detector = Detector.load(bundle, "auto", runtime, deciding.per)
    sources = [_source_of(detector, path, progress) for path in paths]
    about = {name: detector.about.get(name) for name in _ABOUT}
    return _predicted(detector, about, (paths, sources), deciding.fdr, form, progress)


def _source_of(detector: Detector, path: str, progress: Progress) -> SampleTable | ArrayTable:
    """What an exported detector is to score."""
    if detector.runtime.size:
        return _listed_images(path, progress)
    table, spec = list_arrays(path).of_classes(detector.class_names), detector.spec
    network = (spec.backbone, spec.weights_sha, spec.expert_blocks, spec.image_size)
    if difference := table.spec(spec.origin, spec.dtype, network).first_difference(spec):
        raise InputError(f"{path}: other arrays than those of the detector: {difference}")
    return table


def _predicted(
    detector: Detector,
    about: Mapping[str, Any],
    given: tuple[Sequence[str], Sequence[SampleTable | ArrayTable]],
    fdr: float | None,
    form: Format,
    progress: Progress,
) -> str:
    """Text of what a detector says of all that was given: paths and what is at each."""
    predictions, unusable = predict_sources(detector, *given, progress)
    batch = None if fdr is None else BatchPromise.of(detector.threshold.n, len(predictions), fdr)
    if batch is not None:
        predictions = _flagged(predictions, batch)
    for line in _promises(detector, predictions, batch):
        complain(line)
    return _json(detector, about, predictions, unusable, batch) if form == "json" else _csv(predictions)


def _flagged(predictions: Sequence[Prediction], batch: BatchPromise) -> list[Prediction]:
    """The images judged together."""
    flags = discoveries([prediction.p_value for prediction in predictions], batch.fdr)
    return [replace(prediction, flagged=bool(flag)) for prediction, flag in zip(predictions, flags, strict=True)]


def _promises(detector: Detector, predictions: Sequence[Prediction], batch: BatchPromise | None) -> Iterator[str]:
    """What is promised of the decisions, or why nothing is."""
    if batch is not None:
        flagged = sum(prediction.flagged is True for prediction in predictions)
        yield f"{flagged} of {batch.images} images flagged: of such at most {batch.fdr:.0%} are ID, on average"
    if batch is not None and batch.too_few:
        yield batch.too_few
    if why := detector.threshold.too_few:
        yield f"no threshold, so no decision: {why}"
    elif detector.threshold.false_alarms is not None:
        exact = detector.parts.calibration.exact
        nearly = "" if exact else " (nearly: its scores are cross-fitted or put on a scale)"
        yield f"the threshold: {detector.threshold.false_alarms.words(detector.threshold.n)}{nearly}"


def _new_source(workspace: Workspace, path: str, spec: FeatureSpec) -> SampleTable | ArrayTable:
    """What is to be scored: images, or features as the study's sets have them."""
    if workspace.config.has_features:
        return workspace.sets.new_arrays(path, spec)
    return _listed_images(path, workspace.progress)


def _listed_images(path: str, progress: Progress) -> SampleTable:
    images = list_images(path)
    for note in (*images.notes, *filter(None, [describe_left_out(images.left_out)])):
        progress.note(f"{path}: {note.removeprefix(f'{path}: ')}")
    return images


def predict_sources(
    detector: Detector,
    paths: Sequence[str],
    sources: Sequence[SampleTable | ArrayTable],
    progress: Progress,
) -> tuple[list[Prediction], list[UnusableImage]]:
    """Score what no cache knows; images that cannot be used are listed on standard error, and are given back.

    Args:
        detector: of the study, or exported.
        paths: as they were given.
        sources: the images of each path, or its features.
        progress: counts images, where they are many.

    Raises:
        InputError: none of the images can be used.
    """
    predictions: list[Prediction] = []
    unusable: list[UnusableImage] = []
    n = sum(map(len, sources))
    progress = progress if n > _MANY else NullProgress()
    progress.start(n, "image", "predict")
    for path, source in zip(paths, sources, strict=True):
        ids = source.samples.ids if isinstance(source, ArrayTable) else source.ids
        # One image file is its own name; of a folder, tar or list, each image adds its own.
        names = [path if is_one_file(path, ids) else f"{path}/{id_}" for id_ in ids]
        for start in range(0, len(names), _BLOCK):
            block = names[start : start + _BLOCK]
            if isinstance(source, ArrayTable):
                arrays, _ = source.read(start, start + len(block), detector.spec)
                predictions += predictions_by(detector, block, arrays)
            else:
                read = prepared_images(detector, source.reader(start, start + len(block)))
                pairs = list(zip(block, read, strict=True))
                unusable += [UnusableImage(name, found) for name, found in pairs if isinstance(found, str)]
                if usable := [(name, found) for name, found in pairs if not isinstance(found, str)]:
                    usable_names, pixels = zip(*usable, strict=True)
                    predictions += predictions_by(detector, usable_names, np.stack(pixels))
            progress.advance(len(block), failures=len(unusable))
    progress.close()
    for image in unusable:
        complain(f"{image.path}: cannot be used: {image.reason}")
    if not predictions:
        raise InputError("none of the given images can be used")
    return predictions, unusable


def _csv(predictions: Sequence[Prediction]) -> str:
    pairs = [(f"nearest_{rank}", f"distance_{rank}") for rank in range(1, N_NEAREST + 1)]
    lines = []
    for prediction in predictions:
        line: dict[str, Any] = {column: getattr(prediction, column) for column in _COLUMNS}
        for (name, distance), neighbour in zip(pairs, prediction.nearest, strict=False):
            line |= {name: neighbour.id, distance: neighbour.distance}
        lines.append(line | {"p_value": prediction.p_value, "flagged": prediction.flagged})
    flagged = ["flagged"] if predictions[0].flagged is not None else []
    columns = [*_COLUMNS, *(column for pair in pairs for column in pair), "p_value", *flagged]
    return csv_text([{column: line.get(column) for column in columns} for line in lines], columns).rstrip("\n")


def _json(
    detector: Detector,
    about: Mapping[str, Any],
    predictions: Sequence[Prediction],
    unusable: Sequence[UnusableImage],
    batch: BatchPromise | None,
) -> str:
    document = {
        "detector": about,
        "threshold": asdict(detector.threshold),
        "promise": {"per": detector.per, "exact": detector.parts.calibration.exact},
        "batch": None if batch is None else asdict(batch),
        "images": [asdict(prediction) for prediction in predictions],
        "unusable": [image._asdict() for image in unusable],
    }
    return json.dumps(document, indent=2, ensure_ascii=False)
