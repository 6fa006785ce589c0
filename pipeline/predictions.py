"""What `predict` prints: CSV, a line an image, or one JSON document."""

import json
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cache import CacheError, FeatureCache, FeatureSpec, Lock
from pipeline.backbones import StudyBackbone
from pipeline.sources import source_to_predict
from pipeline.workspace import Workspace
from stages.errors import InputError
from stages.extract import ExtractOptions, extract_set, import_set
from stages.inputs.arrays import ArrayTable
from stages.inputs.images import SampleTable, describe_left_out, list_images
from stages.inputs.images.table import is_one_file
from stages.networks.preprocessing import check_decode
from stages.predict import N_NEAREST, Prediction, Predictor
from stages.progress import NullProgress, Progress
from stages.results.formats import csv_text

_BLOCK = 256  # images whose features stand on the disk at once
_SCRATCH = "mofe-feature-cache-predict-"  # begins the name of every folder that they stand in
_ANY = ExtractOptions(max_failures=1.0)  # what cannot be used is said of each image
Format = Literal["csv", "json"]
_COLUMNS = ("path", "score", "threshold", "threshold_lo", "threshold_hi", "decision", "prediction", "expert")


class UnusableImage(NamedTuple):
    """An image that was given and cannot be used."""

    path: str
    reason: str


def predict_paths(workspace: Workspace, paths: Sequence[str], score_name: str | None, form: Format, which: str) -> str:
    """Score new images with the fitted detector of the study; of fine-tuned backbones, with the first's.

    Args:
        workspace: the study.
        paths: images, folders, tars or lists; features, where the study's sets have such.
        score_name: which score decides; by default the detector's own choice.
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
    predictor = Predictor(source_to_predict(workspace, backbone), workspace.config.score, score_name, progress)
    return predict_sources(predictor, backbone, paths, sources, form, progress)


def _new_source(workspace: Workspace, path: str, spec: FeatureSpec) -> SampleTable | ArrayTable:
    """What is to be scored: images, or features as the study's sets have them."""
    if workspace.config.has_features:
        return workspace.sets.new_arrays(path, spec)
    images = list_images(path)
    for note in (*images.notes, *filter(None, [describe_left_out(images.left_out)])):
        workspace.progress.note(f"{path}: {note.removeprefix(f'{path}: ')}")
    return images


def predict_sources(
    predictor: Predictor,
    backbone: StudyBackbone,
    paths: Sequence[str],
    sources: Sequence[SampleTable | ArrayTable],
    form: Format,
    progress: Progress,
) -> str:
    """Score what no cache knows; images that cannot be used are listed on standard error, and in JSON.

    Args:
        predictor: of the study.
        backbone: whose features it reads.
        paths: as they were given.
        sources: the images of each path, or its features.
        form: of the text.
        progress: counts images, where they are many.

    Raises:
        InputError: none of the images can be used.
    """
    predictions: list[Prediction] = []
    unusable: list[UnusableImage] = []
    n = sum(map(len, sources))
    progress = progress if n > _BLOCK else NullProgress()
    progress.start(n, "image", "predict")
    with _scratch_folder() as scratch:
        for path, source in zip(paths, sources, strict=True):
            ids = source.samples.ids if isinstance(source, ArrayTable) else source.ids
            # One image file is its own name; of a folder, tar or list, each image adds its own.
            one = is_one_file(path, ids)
            for cache in _caches(source, backbone, predictor.reads, scratch):
                names = {id_: path if one else f"{path}/{id_}" for id_ in cache.inputs().ids}
                unusable += [UnusableImage(names[failure.id], failure.reason) for failure in cache.failures()]
                predictions += predictor.predict([names[id_] for id_ in cache.ids], cache)
                progress.advance(len(names), failures=len(unusable))
                shutil.rmtree(cache.path)
    progress.close()
    for image in unusable:
        print(f"{image.path}: cannot be used: {image.reason}", file=sys.stderr)
    if not predictions:
        raise InputError("none of the given images can be used")
    if why := predictor.threshold.too_few:
        print(f"no threshold, so no decision: {why}", file=sys.stderr)
    return _json(predictor, predictions, unusable) if form == "json" else _csv(predictions)


def _caches(
    source: SampleTable | ArrayTable, backbone: StudyBackbone, reads: frozenset[str], scratch: Path
) -> Iterator[FeatureCache]:
    """Caches that are thrown away, a block of images each: what is new takes the way of what the detector knows."""
    spec = backbone.spec()
    if isinstance(source, ArrayTable):
        yield import_set("predict", source, spec, scratch)
        return
    for start in range(0, len(source), _BLOCK):
        block = source.part(start, start + _BLOCK)
        yield extract_set("predict", block, _only(spec, reads), scratch, lambda: backbone.loaded, options=_ANY)


def _only(spec: FeatureSpec, reads: frozenset[str]) -> FeatureSpec:
    """The same features without patch tokens, where nobody reads them: they are nearly all bytes of a cache."""
    return spec if "patches" in reads else replace(spec, patches="none", grid=(0, 0))


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A folder of this process's own; those that killed processes left are removed."""
    place = Path(tempfile.gettempdir())
    for left in {place / path.name.partition(".")[0] for path in place.glob(f"{_SCRATCH}*")}:
        with suppress(CacheError, OSError), Lock(left):  # in use, or another user's
            shutil.rmtree(left, ignore_errors=True)
    folder = place / f"{_SCRATCH}{secrets.token_hex(8)}"
    with Lock(folder, "used"):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def _csv(predictions: Sequence[Prediction]) -> str:
    pairs = [(f"nearest_{rank}", f"distance_{rank}") for rank in range(1, N_NEAREST + 1)]
    lines = []
    for prediction in predictions:
        line: dict[str, Any] = {column: getattr(prediction, column) for column in _COLUMNS}
        for (name, distance), neighbour in zip(pairs, prediction.nearest, strict=False):
            line |= {name: neighbour.id, distance: neighbour.distance}
        lines.append(line)
    return csv_text(lines, [*_COLUMNS, *(column for pair in pairs for column in pair)]).rstrip("\n")


def _json(predictor: Predictor, predictions: Sequence[Prediction], unusable: Sequence[UnusableImage]) -> str:
    detector = predictor.detector
    about = {"head": detector.head, "score": detector.score, "params": detector.params}
    document = {
        "detector": asdict(detector.subject.key) | about,
        "threshold": asdict(predictor.threshold),
        "images": [asdict(prediction) for prediction in predictions],
        "unusable": [image._asdict() for image in unusable],
    }
    return json.dumps(document, indent=2, ensure_ascii=False)
