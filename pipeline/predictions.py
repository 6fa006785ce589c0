"""What `predict` prints: CSV, a line an image, or one JSON document."""

import csv
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.legs import Leg
from stages.arrays import ArrayTable
from stages.errors import InputError
from stages.extract import extract_set, import_set
from stages.images import SampleTable
from stages.predict import N_NEAREST, Prediction, Predictor

Format = Literal["csv", "json"]
_COLUMNS = ("path", "score", "threshold", "threshold_lo", "threshold_hi", "decision", "prediction", "expert")


class Unusable(NamedTuple):
    """An image that was given and cannot be used."""

    path: str
    reason: str


def predict_sources(
    predictor: Predictor,
    leg: Leg,
    paths: Sequence[str],
    sources: Sequence[SampleTable | ArrayTable],
    form: Format,
) -> str:
    """Score what no cache knows; images that cannot be used are listed on standard error, and in JSON.

    Args:
        predictor: of the study.
        leg: its backbone.
        paths: as they were given.
        sources: the images of each path, or its features.
        form: of the text.

    Raises:
        InputError: none of the images can be used.
    """
    predictions: list[Prediction] = []
    unusable: list[Unusable] = []
    spec = leg.spec()
    with _scratch_folder() as scratch:
        for number, (path, source) in enumerate(zip(paths, sources, strict=True)):
            # A cache of its own, thrown away: what is new takes the same way as what the detector knows.
            name = f"predict-{number}"
            if isinstance(source, ArrayTable):
                table, cache = source.samples, import_set(name, source, spec, scratch)
            else:
                table, cache = source, extract_set(name, source, spec, scratch, lambda: leg.loaded, max_failures=1.0)
            # One image file is its own name; of a folder, tar or list, each image adds its own.
            one = table.ids == (Path(path).name,) and Path(path).is_file()
            names = {id_: path if one else f"{path}/{id_}" for id_ in table.ids}
            unusable += [Unusable(names[failure.id], failure.reason) for failure in cache.failures()]
            predictions += predictor.predict([names[id_] for id_ in cache.ids], cache)
    for image in unusable:
        print(f"{image.path}: cannot be used: {image.reason}", file=sys.stderr)
    if not predictions:
        raise InputError("none of the given images can be used")
    return _json(predictor, predictions, unusable) if form == "json" else _csv(predictions)


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="predict-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _csv(predictions: Sequence[Prediction]) -> str:
    pairs = [(f"nearest_{rank}", f"distance_{rank}") for rank in range(1, N_NEAREST + 1)]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*_COLUMNS, *(column for pair in pairs for column in pair)], lineterminator="\n")
    writer.writeheader()
    for prediction in predictions:
        line: dict[str, Any] = {column: getattr(prediction, column) for column in _COLUMNS}
        for (name, distance), neighbour in zip(pairs, prediction.nearest, strict=False):
            line |= {name: neighbour.id, distance: neighbour.distance}
        writer.writerow(line)
    return out.getvalue().rstrip("\n")


def _json(predictor: Predictor, predictions: Sequence[Prediction], unusable: Sequence[Unusable]) -> str:
    detector = predictor.detector
    about = {"head": detector.head, "score": detector.score, "params": detector.params}
    document = {
        "detector": asdict(detector.subject.key) | about,
        "threshold": asdict(predictor.threshold),
        "images": [asdict(prediction) for prediction in predictions],
        "unusable": [image._asdict() for image in unusable],
    }
    return json.dumps(document, indent=2, ensure_ascii=False)
