"""The second half of a training, wherever the experts were trained: refined bank, refitted heads, and all files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache import FeatureCache
from cache.fingerprint import fingerprint
from stages.context import Context
from stages.files.documents import digest_of, write_document
from stages.heads.choose import FittedHeads, save_heads
from stages.heads.places import summing_of
from stages.id_data.rows import IdData
from stages.mixture.model import MixtureOfFeatureExperts
from stages.mixture.refine import refine_to
from stages.mixture.refined import (
    LEFT_OUT,
    Refined,
    Routes,
    refined_digest,
    refined_identity,
    refined_path,
    training_routes,
)
from stages.mixture.storage import run_folder, save_weights
from stages.training.identity import TRAIN_SEMANTICS
from stages.training.refit import RefinedRuns, refit_heads
from stages.training.run import write_metrics
from stages.training.tensorboard import scalar_log


@dataclass(frozen=True)
class TrainedRuns:
    """Mixtures that were trained.

    Attributes:
        mixtures: by the name of the run (`IdData.train_rows`).
        history: lines of ``metrics.jsonl``.
        about: what ``mofe.json`` says of the training: ``identity``, ``settings``, ``seed``, ``best_epoch``.
    """

    mixtures: Mapping[str, MixtureOfFeatureExperts]
    history: Sequence[Mapping[str, Any]]
    about: Mapping[str, Any]


def finish(data: IdData, trained: TrainedRuns, folder: Path, context: Context, tensorboard: bool = False) -> None:
    """Refine the bank, refit the heads, and write all files, ``mofe.json`` last.

    Args:
        data: features that the experts read from now on.
        trained: what was trained.
        folder: where to.
        context: where the bank is refined.
        tensorboard: whether the history is written as scalars as well.
    """
    # From here on the folder is of this training, or of none: what an older one left must not be taken for whole.
    (folder / "mofe.json").unlink(missing_ok=True)
    weights = {name: save_weights(run_folder(folder, name), own) for name, own in trained.mixtures.items()}
    refined = _refine_runs(data, trained.mixtures, weights, folder, context)
    heads = refit_heads(data, trained.mixtures, refined, summing_of(context, folder), context.progress)
    write_metrics(folder, trained.history)
    with scalar_log(folder, tensorboard, trained.history):
        pass
    made_of = _heads_made_of(data, refined, folder)
    save_heads(folder, "heads", heads, made_of["heads"])
    _say_notes(heads, folder, context)
    _describe(data, trained, weights, made_of, folder)
    for checkpoint in folder.glob("*.checkpoint"):  # of runs with other settings, too
        checkpoint.unlink()


def _refine_runs(
    data: IdData,
    mixtures: Mapping[str, MixtureOfFeatureExperts],
    weights: Mapping[str, str],
    folder: Path,
    context: Context,
) -> RefinedRuns:
    """Refined rows of every run, in files."""

    def refine(run: str, name: str, cache: FeatureCache, routes: Routes) -> Refined:
        path, identity = refined_path(folder, run, name), refined_identity(weights[run], cache, routes)
        return refine_to(path, identity, mixtures[run], cache, routes, context)

    groups = {name: mixture.group.numpy() for name, mixture in mixtures.items()}
    bank = {
        run: refine(run, "id-train", data.train, Routes(training_routes(rows, groups[run][data.train_labels])))
        for run, rows in data.train_rows().items()
    }
    held_out = bank
    if data.held_out is not data.train:
        held_out = {run: refine(run, "id-val", data.held_out, Routes()) for run in data.train_rows()}
    left_out = {}
    if data.split.cross_fitted:
        for run, fold in data.runs():
            routes = Routes(groups[run][data.train_labels[fold.calibrate]], fold.calibrate)
            left_out[run] = refine(run, LEFT_OUT, data.train, routes)
    return RefinedRuns(bank, held_out, left_out)


def _heads_made_of(data: IdData, refined: RefinedRuns, folder: Path) -> dict[str, Any]:
    """Digests of the refined rows, as ``mofe.json`` has them, and the identity of heads that are fitted on them."""

    def digests(runs: Mapping[str, Refined], name: str) -> dict[str, str | None]:
        return {run: refined_digest(refined_path(folder, run, name)) for run in runs}

    bank, left_out = digests(refined.bank, "id-train"), digests(refined.left_out, LEFT_OUT)
    held_out = list(digests(refined.held_out, "id-val").values())
    identity = fingerprint(
        {"data": data.identity, "features": [bank, left_out, held_out], "semantics": TRAIN_SEMANTICS}
    )
    return {"heads": identity, "bank": bank, "left_out": left_out}


def _say_notes(heads: Mapping[str, FittedHeads], folder: Path, context: Context) -> None:
    for kind, fitted in heads.items():
        for note in fitted.notes(kind):
            context.progress.note(f"{folder}: {note}")


def _describe(
    data: IdData, trained: TrainedRuns, weights: Mapping[str, str], made_of: Mapping[str, Any], folder: Path
) -> None:
    """Write ``mofe.json`` of every run, the final one's last."""
    final = trained.mixtures["final"]
    description = {
        **trained.about,
        "classes": list(data.class_names),
        "data": data.identity,
        "features": data.train.spec.fingerprint,
        "parameters": sum(parameter.numel() for parameter in final.parameters()),
        **made_of,
    }
    names = ["mofe.safetensors", "heads.json", "heads.safetensors", "metrics.jsonl"]
    for name in trained.mixtures.keys() - {"final"}:
        own = {"groups": _groups(data, trained.mixtures[name]), "files": {"mofe.safetensors": weights[name]}}
        write_document(run_folder(folder, name) / "mofe.json", description | own)
        names += [f"{name}/mofe.json", f"{name}/mofe.safetensors"]
    files = {name: digest_of(folder / name) for name in sorted(names)}
    write_document(folder / "mofe.json", description | {"groups": _groups(data, final), "files": files})


def _groups(data: IdData, mixture: MixtureOfFeatureExperts) -> dict[str, int]:
    """Group of each class, by its name."""
    return dict(zip(data.class_names, mixture.group.tolist(), strict=True))
