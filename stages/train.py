"""Verb: stage two on cached features. The linear probe, and the Mixture of Feature Experts with its refitted heads.

No image is opened and no backbone runs: experts start from the backbone's own end and read cached tokens.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from cache import FeatureCache
from stages.config import TrainConfig
from stages.context import Context
from stages.files.documents import read_document
from stages.heads.affine import LinearHead
from stages.heads.choose import FITS, FittedHeads, choose_head, fit_heads, load_heads, save_heads
from stages.heads.places import summing_of
from stages.id_data.rows import IdData, lazy_rows, read_blocks
from stages.id_data.split import Rows
from stages.id_data.tokens import read_tokens
from stages.mixture.config import MixtureConfig
from stages.mixture.grouping import group_training_classes, numbers_as_in
from stages.mixture.model import Expert, MixtureOfFeatureExperts, build_mixture, cannot_read
from stages.mixture.storage import load_mixture
from stages.networks.end_check import runs_on
from stages.networks.repeatable import repeatable
from stages.progress import MOMENT
from stages.training.cached import CachedTrainer, EpochRecord
from stages.training.checkpoint import Checkpoints
from stages.training.finish import TrainedRuns, finish
from stages.training.identity import joint_identity, mixture_identity, mixture_is_fresh, probe_identity
from stages.training.loop import train_epochs
from stages.training.optim import is_of_end
from stages.training.recipes import TrainSettings, recorded_settings, resolve_settings
from stages.training.refit import head_rows
from stages.training.run import TrainingRun
from stages.training.started import start_heads, start_router
from stages.training.tensorboard import require_tensorboard, scalars_of_metrics

# --------------------------------------------------------------------------------------------------------- probe


def train_probe(data: IdData, folder: Path, context: Context = Context()) -> FittedHeads:
    """Fit the linear probe on frozen ``cls``, or read it where it is fresh.

    Writes ``probe.safetensors`` and, last, ``probe.json``. Of processes that are joined, rank 0 fits and the others
    wait.

    Raises:
        PeerLostError: rank 0 has ended.
    """
    fitted = _fitted_probe(data, folder, context) if context.ranks.first else None
    context.ranks.agree(None)  # nobody goes on before the files are there
    return _fitted_probe(data, folder, context) if fitted is None else fitted


def _fitted_probe(data: IdData, folder: Path, context: Context) -> FittedHeads:
    identity = probe_identity(data)
    stored = load_heads(folder, "probe", identity)
    if stored is not None:
        return stored["probe"]
    for cache in (data.train, data.held_out):
        for _ in read_blocks(cache, "cls", np.arange(cache.n_rows)):
            pass  # rows that are not finite are refused here, by their names
    features, held_out = (lazy_rows(cache, "cls", cache.spec.cls_dim) for cache in (data.train, data.held_out))
    models = [head_rows(data, features, held_out, rows, data.split.select) for rows in data.train_rows().values()]
    parts = [(features[rows := data.split.without(part)], data.train_labels[rows]) for part in data.split.parts]
    heads = {"probe": fit_heads(models, data.n_classes, parts, summing_of(context, folder), context.progress)}
    save_heads(folder, "probe", heads, identity)
    return heads["probe"]


# ------------------------------------------------------------------------------------------------------- mixture


@dataclass(frozen=True)
class TrainedMixture:
    """A trained model, on the CPU, with its history and the epoch that it is from."""

    mixture: MixtureOfFeatureExperts
    history: list[EpochRecord]
    best_epoch: int


def train_mofe(
    data: IdData,
    config: TrainConfig,
    make_end: Callable[[], nn.Module],
    seed: int,
    folder: Path,
    context: Context = Context(),
    probe: Path | None = None,
) -> bool:
    """Train one variant with one seed, refit its heads, keep the refined features of its bank.

    Writes ``mofe.safetensors``, ``metrics.jsonl``, ``heads.safetensors`` and, last, ``mofe.json`` into `folder`;
    under cross-fitting the folds' models into ``fold-<i>`` below it. Of processes that are joined, all train and rank
    0 does the rest.

    Args:
        data: ID features.
        config: settings.
        make_end: gives a fresh copy of the backbone's end.
        seed: fixes order, partners and λ.
        folder: where the result goes.
        context: counts images; on ``"cuda"`` it trains in mixed precision, unless the settings say otherwise.
        probe: folder of the linear probe, which is fitted where it is not there, if heads and router start from it;
            by default one in `folder`.

    Returns:
        Whether anything was done: False where the folder is fresh.

    Raises:
        InputError: settings that do not fit the data.
        StageError: the loss is not finite.
    """
    ranks = context.ranks
    if config.tensorboard:
        require_tensorboard("train.tensorboard")
    settings = resolve_settings(config, data.n_classes, data.train.spec)
    probe = probe or folder / "probe"
    probes = train_probe(data, probe, context) if settings.start == "probe" else None
    identity = mixture_identity(data, settings, seed, probe)
    if ranks.agree(mixture_is_fresh(folder, identity, data)):
        if config.tensorboard and ranks.first:
            scalars_of_metrics(folder)
        return False
    groups = ranks.agree(_groups_of_runs(data, settings, seed))
    n_groups = max(groups["final"]) + 1
    if settings.expert != "dense" and n_groups < settings.experts:
        said = f"{settings.experts} experts asked for, {n_groups} made: classes that look the same"
        context.progress.note(f"{folder}: {said}")
    runs = {}
    for name, rows in data.train_rows().items():
        checkpoints = Checkpoints(_checkpoint_path(folder, name, identity))
        mixture = start_mixture(data, rows, groups[name], settings, make_end, seed)
        if probes is not None:
            _start_from_probe(mixture, data, rows, probes.of_run(name), context)
        trained = train_mixture(mixture, data, rows, settings, seed, checkpoints, context)
        runs[name] = _numbered_as_in(trained, groups["final"])
    if ranks.first:
        about = {"identity": identity, "settings": recorded_settings(settings), "seed": seed}
        about |= {"best_epoch": runs["final"].best_epoch}
        history = [{"run": name, **asdict(record)} for name, run in runs.items() for record in run.history]
        mixtures = {name: run.mixture for name, run in runs.items()}
        finish(data, TrainedRuns(mixtures, history, about), folder, context, config.tensorboard)
    return True


def start_mixture(
    data: IdData,
    rows: Rows,
    groups: Sequence[int],
    settings: TrainSettings,
    make_end: Callable[[], nn.Module],
    seed: int,
) -> MixtureOfFeatureExperts:
    """A mixture before its training.

    Args:
        data: ID features.
        rows: training rows of id-train, which the router's input is standardised by.
        groups: ``[C]`` group of each class.
        settings: resolved.
        make_end: gives a fresh copy of the backbone's end.
        seed: of what starts at random.

    Raises:
        InputError: features that are not finite, or that the experts cannot run on.
    """
    spec, kind, reads = data.train.spec, settings.expert, settings.router_input
    config = MixtureConfig(spec.cls_dim, spec.tap_dim, tuple(groups), kind, reads, settings.experts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixture = build_mixture(config, make_end)
    _check_experts(mixture, data.train, rows)
    mixture.router.standardise(torch.from_numpy(values) for _, values in read_blocks(data.train, reads, rows))
    return mixture


def _start_from_probe(
    mixture: MixtureOfFeatureExperts, data: IdData, rows: Rows, probe: LinearHead, context: Context
) -> None:
    """Let heads and router say what linear probes of the rows say; on the first process, for all."""
    if context.ranks.first:
        features = lazy_rows(data.train, "cls", data.train.spec.cls_dim)[rows]
        start_heads(mixture, probe, features)
        if mixture.config.router_input == "tap_cls":
            taps, held_out = (lazy_rows(own, "tap_cls", own.spec.tap_dim) for own in (data.train, data.held_out))
            of_taps = head_rows(data, taps, held_out, rows, data.split.select)
            context.progress.start(FITS, "fit", "head router", MOMENT)
            probe = choose_head(of_taps, data.n_classes, progress=context.progress).head
            context.progress.close()
        start_router(mixture.router, probe)
    begun = {name: tensor for name, tensor in mixture.state_dict().items() if not is_of_end(name)}
    mixture.load_state_dict(context.ranks.agree(begun), strict=False)


def train_mixture(
    mixture: MixtureOfFeatureExperts,
    data: IdData,
    rows: Rows,
    settings: TrainSettings,
    seed: int,
    checkpoints: Checkpoints,
    context: Context = Context(),
) -> TrainedMixture:
    """Train experts and router on cached tokens (`stages.training.cached`).

    Killed, it goes on where it was stored last, to the same bits. Processes that are joined train one mixture
    together: all give the same arguments.

    Args:
        mixture: as `start_mixture` gives it.
        data: ID features; select rows of the held-out set stop early and measure difficulty.
        rows: training rows of id-train.
        settings: resolved.
        seed: fixes order, partners and λ; all is drawn anew from (seed, epoch), so a resumed run is the same run.
        checkpoints: in a file that a killed run goes on from, stored after an epoch and within a long one, though not
            so often that it slows the training; left to the caller to remove.
        context: counts images; on ``"cuda"`` it trains in mixed precision, unless the settings say otherwise.

    Raises:
        InputError: features that are not finite.
        StageError: the loss is not finite.
    """
    run = TrainingRun(settings.epochs, settings.patience, checkpoints, context)
    trainer = CachedTrainer(mixture.to(context.place), data, rows, settings, seed, context)
    run.resume(trainer)
    if settings.start == "probe" and not run.history:
        with repeatable(context.place, trains=True):
            run.end_epoch(trainer.judge_start(), trainer)
    train_epochs(trainer, run, context, f"train {checkpoints.path.stem.rpartition('-')[0]}, seed {seed}")
    mixture.to("cpu").load_state_dict(run.best)
    return TrainedMixture(mixture.eval(), [EpochRecord(**record) for record in run.history], run.best_epoch)


def _check_experts(mixture: MixtureOfFeatureExperts, cache: FeatureCache, rows: Rows) -> None:
    """Refuse experts that cannot run on the patches that were cached, or that see nothing in them."""
    kind = mixture.config.kind
    if cache.spec.patches == "full" or kind not in ("end", "dense"):
        return
    if not runs_on(cast(Expert, mixture.experts[0]).end, read_tokens(cache, rows[:8])):
        raise cannot_read(kind, cache.spec.backbone, cache.spec.patches)


def _groups_of_runs(data: IdData, settings: TrainSettings, seed: int) -> dict[str, list[int]]:
    """``[C]`` group of each class for every model, by its own training rows; one for all where nothing is routed."""
    if settings.expert == "dense":
        return dict.fromkeys(data.train_rows(), [0] * data.n_classes)
    final = group_training_classes(data, data.split.final_train, settings.experts, settings.grouping, seed)
    folds = {
        # Classes that look all the same can leave the final model fewer groups than were asked for.
        name: group_training_classes(data, fold.train, max(final) + 1, settings.grouping, seed)
        for name, fold in data.runs()
    }
    return folds | {"final": final}


def _numbered_as_in(trained: TrainedMixture, groups: Sequence[int]) -> TrainedMixture:
    """A fold's model with its experts numbered as those of the final model that they are most like.

    A fold groups classes by its own rows; what is calibrated per expert is pooled over folds. Numbered after the
    training, since the final model's groups depend on rows that the fold must not see.
    """
    numbers = numbers_as_in(trained.mixture.group.tolist(), groups)
    trained.mixture.renumber(numbers)
    order = np.argsort(numbers)
    history = [replace(record, load=[record.load[expert] for expert in order]) for record in trained.history]
    return replace(trained, history=history)


def _checkpoint_path(folder: Path, run: str, identity: str) -> Path:
    """Its name holds the identity, so that no run goes on from a checkpoint of other settings."""
    return folder / f"{run}-{identity[:8]}.checkpoint"


# --------------------------------------------------------------------------- a mixture that came with its backbone


def finish_joint(
    data: IdData,
    source: Path,
    make_end: Callable[[], nn.Module],
    folder: Path,
    context: Context = Context(),
) -> bool:
    """Make a variant of the mixture that a fine-tune trained together with the backbone of these features.

    Nothing is trained: heads are refitted and the bank refined as `train_mofe` does it, into the same files.

    Args:
        data: features of the fine-tuned backbone; without cross-fitting.
        source: folder with the fine-tune's ``finetune.json``, ``mofe.safetensors`` and ``mofe.json``.
        make_end: gives a copy of the backbone's end, whatever its weights.
        folder: where the variant goes.
        context: counts images.

    Returns:
        Whether anything was done: False where the folder is fresh.

    Raises:
        InputError: `source` holds no whole mixture.
    """
    ranks = context.ranks
    identity = joint_identity(data, source)
    if ranks.agree(mixture_is_fresh(folder, identity, data)):
        return False
    if ranks.first:
        spec = data.train.spec
        mixture = load_mixture(source, make_end, spec.cls_dim, spec.tap_dim)
        about, tuned = (read_document(source / name) or {} for name in ("mofe.json", "finetune.json"))
        about = {"identity": identity, "settings": about["settings"], "seed": tuned["seed"]}
        about |= {"best_epoch": tuned["best_epoch"]}
        epochs = (source / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        history = [{"run": "final", **json.loads(line)} for line in epochs]
        finish(data, TrainedRuns({"final": mixture}, history, about), folder, context)
    return True
