"""`export`: the detector of a study as one file, with what the study knows of it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cache import FeatureCache, fingerprint
from pipeline.backbones import StudyBackbone
from pipeline.config import SetConfig
from pipeline.deciding import Exporting
from pipeline.sources import source_to_predict
from pipeline.stages_of_study.score import stale_scores
from pipeline.terminal import Lines
from pipeline.workspace import Workspace
from stages.detection.auto import CHOSEN_FOLDER
from stages.detection.conformal import threshold_at
from stages.detection.deciding import DecidingDetector
from stages.detection.detectors import FittedDetector
from stages.detection.golden import GOLDEN_ROWS
from stages.detection.graph import require_onnx
from stages.detection.proof import PROOF_BATCHES, PROOF_IMAGES
from stages.detection.subject import NO_HEAD
from stages.errors import InputError
from stages.export import GoldenSamples, even_shares, export_detector, spread
from stages.extraction.fill import made_with
from stages.files.bundle_file import SUFFIX, check_is_bundle
from stages.inputs.images import ImageError, decode_image
from stages.results.method import NO_ROUTING, Method, recommended_of
from stages.results.scored_study import ScoredStudy
from stages.score import ADMIT
from stages.scorers import AUTO, reads_head

_SPARE = 4  # candidates of either kind beside those that become golden: some may be at the threshold
_ID_ROLES, _OOD_ROLES = ("id-test", "id-val", "id-train"), ("near-ood", "far-ood")  # where golden rows come from
_METRICS = ("n_id", "n_ood", "auroc", "auroc_lo", "auroc_hi", "fpr95", "fpr95_lo", "fpr95_hi")


def export_study(workspace: Workspace, which: str, asked: Exporting) -> Lines:
    """Write the file; of fine-tuned backbones, the first's detector.

    Args:
        workspace: the study.
        which: kind of the backbone.
        asked: what is exported.
    """
    _check_replaces(asked.output)
    if asked.onnx:
        _check_onnx(workspace)
    backbone = next(workspace.existing(which))
    samples = _golden_samples(workspace, backbone)  # images that are not there any more are said before work
    source = source_to_predict(workspace, backbone, asked.variant)
    config, choices = workspace.config.score, workspace.config.work / "scores" / CHOSEN_FOLDER
    method = recommended_of(bool(source.mixtures), source.data.labels == "given", config.scores)
    score = asked.score_name or method.score
    deciding = DecidingDetector(source, config, score, method.head, workspace.progress, choices)
    about = _about(workspace, backbone, deciding)
    proof = _proof_images(workspace, backbone) if asked.onnx else None
    detector, shown = export_detector(asked.output, deciding, samples, about, asked.with_backbone, proof)
    lines = [f"export: {asked.output}, {os.path.getsize(asked.output) / 2**20:.1f} MiB, its golden rows scored again"]
    if shown is not None:
        passes = ", ".join(map(str, PROOF_BATCHES))
        said = f"{shown.images} images in passes of {passes} are decided as by torch"
        lines.append(f"model.onnx: {said}, scores at most {shown.away:.1g} deviations apart")
    if chosen := deciding.fitted.choice:
        of = "the backbone's own features" if chosen["features"] == "cls" else "the experts' features"
        lines.append(f"{AUTO}: {chosen['chosen']} on {of}: {chosen['auto']['rule']}")
    if why := detector.threshold.too_few:
        lines.append(f"no threshold, so it decides nothing: {why}")
    return lines


def _check_replaces(path: Path) -> None:
    """Refuse to write over a file that is no detector, such as the experiment file itself."""
    if not path.exists() or path.suffix.lower() == SUFFIX:
        return
    try:
        check_is_bundle(path)
    except InputError as error:
        raise InputError(f"-o {path}: is there and no detector: give another name, such as pets{SUFFIX}") from error


def _check_onnx(workspace: Workspace) -> None:
    """Refuse before work what cannot become a graph."""
    if workspace.config.has_features:
        raise InputError("--onnx: this study is of features: there is no network to export")
    require_onnx()


# ---------------------------------------------------------------------------------------------------------- golden rows


class _Row(NamedTuple):
    entry: SetConfig
    cache: FeatureCache
    row: int
    id: str


def _golden_samples(workspace: Workspace, backbone: StudyBackbone) -> GoldenSamples:
    """ID and OOD rows in turn, evenly spread over their sets."""
    sides = [_spread_over(backbone, sets) for sets in _golden_sets(workspace)]
    rows = [row for row in chain.from_iterable(zip_longest(*sides)) if row is not None]
    named = [(row.entry.name, row.id) for row in rows]
    if not workspace.config.has_features:
        files = _Files(workspace)
        return GoldenSamples(named, [_image(files, row) for row in rows], None)
    names = rows[0].cache.spec.datasets() if rows else {}
    arrays = {name: np.concatenate([row.cache.read(name, np.array([row.row])) for row in rows]) for name in names}
    return GoldenSamples(named, None, arrays)


def _golden_sets(workspace: Workspace) -> Iterator[list[SetConfig]]:
    """Sets of ID images, test images where there are such, and those of OOD images."""
    sets = workspace.config.sets_of
    yield next((found for role in _ID_ROLES if (found := sets(role))), [])
    yield sets(*_OOD_ROLES)


def _spread_over(backbone: StudyBackbone, sets: Sequence[SetConfig]) -> list[_Row]:
    """Rows of every set in turn, enough for all golden ones."""
    each = -(-(GOLDEN_ROWS + _SPARE) // max(1, len(sets)))
    found = []
    for entry in sets:
        cache = backbone.cache(entry)
        ids = cache.ids
        found.append([_Row(entry, cache, row, str(ids[row])) for row in spread(cache.n_rows, each).tolist()])
    return [row for row in chain.from_iterable(zip_longest(*found)) if row is not None]


def _image(files: "_Files", row: _Row) -> Image.Image:
    """An image of the study, read again."""
    with _there_still(row):
        return decode_image(files.read(row))


@contextmanager
def _there_still(row: _Row) -> Iterator[None]:
    """Around reading an image again."""
    try:
        yield
    except (KeyError, ImageError) as error:
        raise InputError(
            f"set {row.entry.name!r}: {row.id} is not there as it was extracted, and export reads images again, "
            "to prove the detector by: run make extract"
        ) from error


class _Files:
    """Files of the images of a study, found by their ids."""

    def __init__(self, workspace: Workspace) -> None:
        self._sets = workspace.sets
        self._places: dict[str, dict[str, int]] = {}

    def read(self, row: _Row) -> bytes:
        """Bytes of one; raises KeyError or `ImageError` where it is not there."""
        table, name = self._sets.table(row.entry), row.entry.name
        if name not in self._places:
            self._places[name] = {id_: place for place, id_ in enumerate(table.ids)}
        place = self._places[name][row.id]
        return table.reader(place, place + 1).read(0)


def _proof_images(workspace: Workspace, backbone: StudyBackbone) -> Iterator[tuple[str, bytes]]:
    """Name and file of images of all sets in turn, drawn from each, `PROOF_IMAGES` or all there are."""
    entries, files = workspace.config.sets, _Files(workspace)
    caches = [backbone.cache(entry) for entry in entries]
    shares = even_shares([cache.n_rows for cache in caches], PROOF_IMAGES)
    drawn = []
    for entry, cache, share in zip(entries, caches, shares, strict=True):
        numbers = np.random.default_rng(0).permutation(cache.n_rows)[:share]
        drawn.append([_Row(entry, cache, row, str(cache.ids[row])) for row in numbers.tolist()])
    for row in (row for row in chain.from_iterable(zip_longest(*drawn)) if row is not None):
        with _there_still(row):
            yield f"{row.entry.name}/{row.id}", files.read(row)


# ----------------------------------------------------------------------------------------------------- where it is from


def _about(workspace: Workspace, backbone: StudyBackbone, deciding: DecidingDetector) -> dict[str, Any]:
    """What the study knows of the detector, JSON; no time and no place, so that two exports are alike."""
    fitted, source = deciding.fitted, deciding.source
    spec, scores = source.data.train.spec, fitted.calibration_scores
    metrics, not_measured = _measured(workspace, fitted)
    return {
        "study": workspace.config.name,
        **asdict(fitted.subject.key),
        "head": fitted.head,
        "score": fitted.score,
        "params": fitted.params,
        "profile": workspace.config.score.profile,
        "network": {"name": spec.backbone, "weights_sha256": spec.weights_sha, "image_size": spec.image_size},
        "takes": "images" if deciding.takes_images else "features",
        "compute": dict(spec.compute),
        "data": {
            "features": spec.fingerprint,
            "id": fingerprint(source.data.identity),
            "split": source.data.split.rule,
        },
        "classes": len(source.data.class_names),
        "labels": source.data.labels,
        "sets": [_set_line(backbone.cache(entry), entry) for entry in workspace.config.sets],
        "calibration": {"rows": len(scores), "exact": fitted.is_exact},
        "thresholds": [asdict(threshold_at(scores, admit)) for admit in ADMIT],
        "metrics": metrics,
        "not_measured": not_measured,
        "made_with": made_with(),
    }


def _set_line(cache: FeatureCache, entry: SetConfig) -> dict[str, Any]:
    """What a set was, by its bytes."""
    return {
        "name": entry.name,
        "role": entry.role,
        "rows": cache.n_rows,
        "failures": cache.manifest.n_failures,
        "sha256": cache.digest,
    }


def _measured(workspace: Workspace, fitted: FittedDetector) -> tuple[list[dict[str, Any]], list[str]]:
    """Metrics of this very detector on each OOD set, with their intervals; and what nobody measured."""
    oods = workspace.config.sets_of(*_OOD_ROLES)
    everything = [f"images of other sources than {', '.join(entry.name for entry in oods)}"] if oods else []
    try:
        stale = stale_scores(workspace)
        rows = [] if stale is not None else ScoredStudy(workspace.config.work / "scores").rows
        why = "not of the models of now" if stale is not None else f"none of {fitted.score} with this model"
    except InputError:
        rows, why = [], "not there: run make score"
    key = fitted.subject.key
    head = fitted.head if reads_head(fitted.score) else NO_HEAD
    routing = "predicted" if fitted.is_routed else NO_ROUTING
    method = Method(key.backbone, key.features, head, key.variant, routing, fitted.score, fitted.calibrated)
    own = [row for row in rows if Method.of(row) == method and row["seed"] == key.seed and row["ood"] != "average"]
    found = [{"ood": row["ood"], "group": row["group"], **{name: row[name] for name in _METRICS}} for row in own]
    lacking = [entry.name for entry in oods if entry.name not in {row["ood"] for row in found}]
    unknown = [f"{name}: scores are {why}" for name in lacking] or ([] if oods else ["any OOD set: the study has none"])
    return found, [*unknown, *everything]
