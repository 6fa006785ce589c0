"""Verb: stage two on cached features. The linear probe, and the Mixture of Feature Experts with its refitted heads.

No image is opened and no backbone runs: experts start from the backbone's own end and read cached tokens.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cache.fingerprint import fingerprint
from stages.artifacts import read_json, write_text
from stages.checkpoint import load_checkpoint, save_checkpoint
from stages.config import TrainConfig
from stages.dataset import IdData, Labels, read_tokens
from stages.errors import InputError, StageError
from stages.experts import MixtureOfFeatureExperts, save_mixture, soft_cross_entropy
from stages.grouping import class_prototypes, experts_for, group_classes
from stages.heads import FittedHeads, HeadRows, choose_strength, fit_head, fit_heads, load_heads, save_heads
from stages.mixup import class_alpha, mix_features, running_accuracy
from stages.progress import NullProgress, Progress
from stages.refine import REFINE_BATCH, Refined, refine, refined_path, save_refined
from stages.split import Fold, Rows

TRAIN_SEMANTICS = 1  # raise it when the same settings would train another model


@dataclass(frozen=True)
class TrainSettings:
    """`TrainConfig` with every default filled in."""

    experts: int
    grouping: str
    mixup: str
    epochs: int
    batch_size: int = 64
    lr: float = 3e-5  # of the experts' ends, which start from trained weights: ten times more ruins the features
    head_lr: float = 1e-3
    router_lr: float = 1e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    other_weight: float = 0.1
    warmup_epochs: float = 1.0
    alpha_min: float = 0.1
    alpha_max: float = 0.8
    alpha_power: float = 1.0
    gradient_clip: float = 1.0


# The official code's recipe, where METHOD-relevant settings differ from ours; its α_min = α_max is not copied, since
# with it the difficulty of a class cannot matter.
PAPER = {"label_smoothing": 0.1, "lr": 3.5e-5, "head_lr": 3.5e-5, "router_lr": 3.5e-5}


def resolve_settings(config: TrainConfig, n_classes: int) -> TrainSettings:
    """Fill in the preset's values.

    Raises:
        InputError: ``alpha_min`` not below ``alpha_max`` with dynamic mixup.
    """
    given = {k: v for k, v in config.model_dump().items() if v is not None and k != "preset"}
    if given["experts"] == "auto":
        given["experts"] = experts_for(n_classes)
    settings = TrainSettings(**((PAPER if config.preset == "paper" else {}) | given))
    if settings.mixup == "static":
        settings = replace(settings, alpha_max=settings.alpha_min)
    elif settings.mixup == "none":
        settings = replace(settings, alpha_min=0.0, alpha_max=0.0)
    elif settings.alpha_min >= settings.alpha_max:
        raise InputError(
            f"train.alpha_min: {settings.alpha_min:g} given, must be below alpha_max = {settings.alpha_max:g}: "
            'with equal values difficulty cannot matter; that is mixup = "static"'
        )
    return settings


# ------------------------------------------------------------------------------------------------------- mixture


@dataclass
class EpochRecord:
    """A line of ``metrics.jsonl``."""

    epoch: int
    loss: float
    expert_loss: float
    router_loss: float
    lr: float
    load: list[int]
    select_loss: float | None = None
    select_accuracy: float | None = None
    router_accuracy: float | None = None
    accuracy: list[float] | None = None  # running, per class, as difficulty is made of it
    alpha: list[float] | None = None


@dataclass(frozen=True)
class TrainedMixture:
    """A trained model with its history and the epoch that it is from."""

    mixture: MixtureOfFeatureExperts
    history: list[EpochRecord]
    best_epoch: int


def train_mixture(
    data: IdData,
    rows: Rows,
    select: Rows | None,
    groups: Sequence[int],
    settings: TrainSettings,
    make_end: Callable[[], nn.Module],
    seed: int,
    checkpoint: Path,
    progress: Progress | None = None,
    difficulty: Sequence[NDArray[np.float64]] | None = None,
) -> TrainedMixture:
    """Train experts and router on cached tokens.

    In-group rows go to their true group's expert (teacher forcing), mixed with each other; as many out-of-group rows
    of the same batch teach it "other" with weight ``other_weight``. Killed, it goes on after the last whole epoch.

    Args:
        data: ID features.
        rows: training rows of id-train.
        select: rows of the held-out set that stop early and measure difficulty; None trains every epoch and takes
            difficulty from `difficulty`.
        groups: ``[C]`` group of each class.
        settings: resolved.
        make_end: gives a fresh copy of the backbone's end.
        seed: fixes order, partners and λ; all is drawn anew from (seed, epoch), so a resumed run is the same run.
        checkpoint: file that a killed run goes on from; left to the caller to remove.
        progress: counts batches.
        difficulty: running accuracy per class for each epoch, measured elsewhere (cross-fitting).

    Raises:
        StageError: the loss is not finite.
    """
    progress = progress or NullProgress()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mixture = MixtureOfFeatureExperts(make_end, data.train.spec.cls_dim, data.train.spec.tap_dim, groups)
    mixture.router.standardise(_read_tap_cls(data, rows))
    optimiser = torch.optim.AdamW(_parameter_groups(mixture, settings), weight_decay=settings.weight_decay)
    batches = -(-len(rows) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warmup_cosine(settings, batches))
    history: list[EpochRecord] = []
    best: dict[str, Tensor] = {}
    stored = load_checkpoint(checkpoint)
    if stored is not None:
        mixture.load_state_dict(stored["mixture"])
        optimiser.load_state_dict(stored["optimiser"])
        schedule.load_state_dict(stored["schedule"])
        best = stored["best"]
        history = [EpochRecord(**record) for record in stored["history"]]
    progress.start(settings.epochs * batches, "batch", f"train {checkpoint.stem.rpartition('-')[0]}, seed {seed}")
    progress.advance(len(history) * batches)
    accuracy = np.asarray(history[-1].accuracy) if history and history[-1].accuracy is not None else None
    for epoch in range(len(history), settings.epochs):
        if difficulty is not None:
            accuracy = difficulty[min(epoch, len(difficulty)) - 1] if epoch else None
        alpha = (
            np.full(data.n_classes, settings.alpha_min)
            if accuracy is None
            else class_alpha(accuracy, settings.alpha_min, settings.alpha_max, settings.alpha_power)
        )
        record = _train_epoch(mixture, data, rows, alpha, settings, optimiser, schedule, (seed, epoch), progress)
        if select is not None:
            # Rounded as the record has it: a resumed run reads it there, and must go on with the same numbers.
            accuracy = np.round(_evaluate(mixture, data, select, accuracy, record), 6)
        record.accuracy = None if accuracy is None else accuracy.tolist()
        history.append(record)
        if select is None or _best_epoch(history) == epoch:
            best = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
        save_checkpoint(
            checkpoint,
            {
                "mixture": mixture.state_dict(),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
                "best": best,
                "history": [asdict(record) for record in history],
            },
        )
    progress.close()
    mixture.load_state_dict(best)
    return TrainedMixture(mixture.eval(), history, len(history) - 1 if select is None else _best_epoch(history))


def _best_epoch(history: list[EpochRecord]) -> int:
    """The first of the epochs with the lowest held-out loss."""
    return int(np.argmin([record.select_loss for record in history if record.select_loss is not None]))


def _train_epoch(
    mixture: MixtureOfFeatureExperts,
    data: IdData,
    rows: Rows,
    alpha: NDArray[np.float64],
    settings: TrainSettings,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    seed: tuple[int, int],
    progress: Progress,
) -> EpochRecord:
    rng = np.random.default_rng(seed)
    order = rng.permutation(rows)
    group = mixture.group.numpy()
    sums = np.zeros(2)
    load = np.zeros(mixture.n_experts, dtype=int)
    mixture.train()
    for start in range(0, len(order), settings.batch_size):
        batch = np.sort(order[start : start + settings.batch_size])  # sorted rows read the shards forwards
        tokens = read_tokens(data.train, batch)
        labels = data.train_labels[batch]
        expert_loss = torch.zeros(())
        for expert in range(mixture.n_experts):
            inside, outside = (np.flatnonzero(group[labels] == expert), np.flatnonzero(group[labels] != expert))
            if len(inside) == 0:
                continue
            load[expert] += len(inside)
            if settings.other_weight == 0:
                outside = outside[:0]
            outside = rng.permutation(outside)[: len(inside)]
            targets = mixture.class_targets(torch.from_numpy(labels[inside]).long(), expert, settings.label_smoothing)
            mixed = mix_features(tokens[inside], targets, alpha[labels[inside]], rng)
            both = mixed.tokens.concatenate(tokens[outside])
            _, outputs = mixture.experts[expert](both)
            expert_loss = expert_loss + soft_cross_entropy(outputs[: len(inside)], mixed.targets)
            if len(outside):
                other = mixture.class_targets(torch.from_numpy(labels[outside]).long(), expert)
                expert_loss = expert_loss + settings.other_weight * soft_cross_entropy(outputs[len(inside) :], other)
        router_loss = nn.functional.cross_entropy(
            mixture.router(tokens.tap_cls), torch.from_numpy(labels).long(), reduction="sum"
        )
        loss = (expert_loss + router_loss) / len(batch)
        if not torch.isfinite(loss):
            raise StageError(f"train: the loss is not finite in epoch {seed[1]}: lower train.lr (now {settings.lr:g})")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(mixture.parameters(), settings.gradient_clip)
        optimiser.step()
        schedule.step()
        sums += [expert_loss.item(), router_loss.item()]
        progress.advance(1, epoch=seed[1], loss=loss.item())
    expert_mean, router_mean = sums / len(rows)
    return EpochRecord(
        epoch=seed[1],
        loss=round(float(expert_mean + router_mean), 6),
        expert_loss=round(float(expert_mean), 6),
        router_loss=round(float(router_mean), 6),
        lr=optimiser.param_groups[0]["lr"],
        load=load.tolist(),
        alpha=[round(float(a), 6) for a in alpha],
    )


@torch.inference_mode()
def _evaluate(
    mixture: MixtureOfFeatureExperts,
    data: IdData,
    select: Rows,
    accuracy: NDArray[np.float64] | None,
    record: EpochRecord,
) -> NDArray[np.float64]:
    """Judge by unmixed held-out rows in evaluation mode: fills `record`, returns the running accuracy per class."""
    mixture.eval()
    group, labels = mixture.group.numpy(), data.held_out_labels
    right, routed, loss = [], [], 0.0
    for start in range(0, len(select), REFINE_BATCH):
        batch = select[start : start + REFINE_BATCH]
        tokens = read_tokens(data.held_out, batch)
        truth = torch.from_numpy(labels[batch]).long()
        out = mixture(tokens, mixture.group[truth])
        right.append((out.logits.argmax(1) == truth).numpy())
        routed.append((out.gate.argmax(1) == mixture.group[truth]).numpy())
        loss += nn.functional.cross_entropy(out.logits, truth, reduction="sum").item()
        loss += nn.functional.cross_entropy(mixture.router(tokens.tap_cls), truth, reduction="sum").item()
    correct, arrived = np.concatenate(right), np.concatenate(routed)
    classes = labels[select]
    if not math.isfinite(loss):
        raise StageError(f"train: the held-out loss is not finite after epoch {record.epoch}: lower train.lr")
    record.select_loss = round(loss / len(select), 6)
    record.select_accuracy = round(float((correct & arrived).mean()), 6)
    record.router_accuracy = round(float(arrived.mean()), 6)
    counts = np.bincount(classes, minlength=len(group))
    return running_accuracy(accuracy, np.bincount(classes[correct], minlength=len(group)), counts)


def _read_tap_cls(data: IdData, rows: Rows) -> Tensor:
    return torch.from_numpy(np.asarray(data.train.read("tap_cls", rows), dtype=np.float32))


def _parameter_groups(mixture: MixtureOfFeatureExperts, settings: TrainSettings) -> list[dict[str, Any]]:
    """Ends, heads and router by their learning rates; biases and norms without weight decay."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in mixture.named_parameters():
        lr = settings.lr
        if name.startswith("router."):
            lr = settings.router_lr
        elif ".head." in name and ".end." not in name:
            lr = settings.head_lr
        groups.setdefault((lr, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "lr": lr} | ({} if decay else {"weight_decay": 0.0})
        for (lr, decay), parameters in groups.items()
    ]


def _warmup_cosine(settings: TrainSettings, batches: int) -> Callable[[int], float]:
    total, warmup = settings.epochs * batches, settings.warmup_epochs * batches

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor


# ------------------------------------------------------------------------------------------- the whole of stage two


def train_probe(data: IdData, folder: Path) -> FittedHeads:
    """Fit the linear probe on frozen ``cls``, or read it where it is fresh.

    Writes ``probe.safetensors`` and, last, ``probe.json``.
    """
    identity = fingerprint({"data": data.identity, "semantics": TRAIN_SEMANTICS})
    stored = load_heads(folder, "probe", identity)
    if stored is not None:
        return stored["probe"]
    features = np.asarray(data.train.read("cls"), dtype=np.float32)
    held_out = np.asarray(data.held_out.read("cls"), dtype=np.float32)
    folds = [_head_rows(data, fold, features, held_out) for fold in data.split.folds]
    heads = {"probe": fit_heads(folds, _final_rows(data, features), data.n_classes)}
    save_heads(folder, "probe", heads, identity)
    return heads["probe"]


def train_mofe(
    data: IdData,
    config: TrainConfig,
    make_end: Callable[[], nn.Module],
    seed: int,
    folder: Path,
    progress: Progress | None = None,
) -> bool:
    """Train one variant with one seed, refit its heads, keep the refined features of its bank.

    Writes ``mofe.safetensors``, ``metrics.jsonl``, ``heads.safetensors`` and, last, ``mofe.json`` into `folder`;
    under cross-fitting the folds' models into ``fold-<i>`` below it.

    Returns:
        Whether anything was done: False where the folder is fresh.

    Raises:
        InputError: settings that do not fit the data.
        StageError: the loss is not finite.
    """
    settings = resolve_settings(config, data.n_classes)
    identity = mixture_identity(data, settings, seed)
    if mixture_is_fresh(folder, identity, data):
        return False
    final_train = data.split.final_train
    groups = group_classes(
        class_prototypes(
            np.asarray(data.train.read("cls", final_train), dtype=np.float32),
            data.train_labels[final_train],
            data.n_classes,
        ),
        settings.experts,
        settings.grouping,
        data.class_names,
        seed,
    )

    def train(name: str, fold: Fold) -> TrainedMixture:
        checkpoint = _checkpoint_path(folder, name, identity)
        return train_mixture(data, fold.train, fold.select, groups, settings, make_end, seed, checkpoint, progress)

    runs = {name: train(name, fold) for name, fold in data.runs()}
    if data.split.cross_fitted:
        # No row is left to stop on: the folds' median of epochs, and the difficulty that they measured.
        epochs = int(np.median([run.best_epoch for run in runs.values()])) + 1
        measured = np.asarray([[record.accuracy for record in run.history] for run in runs.values()], dtype=np.float64)
        runs["final"] = train_mixture(
            data,
            final_train,
            None,
            groups,
            replace(settings, epochs=epochs),
            make_end,
            seed,
            _checkpoint_path(folder, "final", identity),
            progress,
            difficulty=list(measured.mean(0)),
        )
    # From here on the folder is of this identity, or of none: what an older run left must not be taken for whole.
    (folder / "mofe.json").unlink(missing_ok=True)
    bank = {
        name: _refine_training_rows(
            data, runs[name].mixture, rows, refined_path(folder, name, "id-train"), identity, progress
        )
        for name, rows in data.train_rows().items()
    }
    heads = _refit_heads(data, groups, bank, runs, progress)
    lines = [json.dumps({"run": name, **asdict(record)}) for name, run in runs.items() for record in run.history]
    write_text(folder / "metrics.jsonl", "\n".join(lines) + "\n")
    save_heads(folder, "heads", heads, identity)
    final = runs["final"]
    description = {
        "identity": identity,
        "settings": asdict(settings),
        "seed": seed,
        "classes": list(data.class_names),
        "groups": dict(zip(data.class_names, groups, strict=True)),
        "data": data.identity,
        "features": data.train.spec.fingerprint,
        "best_epoch": final.best_epoch,
        "parameters": sum(parameter.numel() for parameter in final.mixture.parameters()),
    }
    for name, run in runs.items():
        if name != "final":
            save_mixture(folder / name, run.mixture, description)
    save_mixture(folder, final.mixture, description)
    for checkpoint in folder.glob("*.checkpoint"):  # of runs with other settings, too
        checkpoint.unlink()
    return True


def _checkpoint_path(folder: Path, run: str, identity: str) -> Path:
    """Its name holds the identity, so that no run goes on from a checkpoint of other settings."""
    return folder / f"{run}-{identity[:8]}.checkpoint"


def mixture_identity(data: IdData, settings: TrainSettings, seed: int) -> str:
    """What a trained mixture is made of: features, split, settings (a grouping file by its content) and seed."""
    grouping = Path(settings.grouping)
    content = grouping.read_text(encoding="utf-8") if grouping.is_file() else settings.grouping
    made_of = {"data": data.identity, "settings": asdict(settings) | {"grouping": content}, "seed": seed}
    return fingerprint(made_of | {"semantics": TRAIN_SEMANTICS})


def mixture_is_fresh(folder: Path, identity: str, data: IdData) -> bool:
    """Whether a folder holds the trained mixture of this identity, with all its files."""
    description = read_json(folder / "mofe.json")
    files = [folder / "heads.json", folder / "heads.safetensors", folder / "metrics.jsonl"]
    for run in data.train_rows():
        files += [
            (folder if run == "final" else folder / run) / "mofe.safetensors",
            refined_path(folder, run, "id-train"),
        ]
    return description is not None and description.get("identity") == identity and all(map(Path.is_file, files))


def _refine_training_rows(
    data: IdData, mixture: MixtureOfFeatureExperts, train: Rows, path: Path, identity: str, progress: Progress | None
) -> Refined:
    """Training rows through their own group's expert, as the bank has them; held-out rows of id-train by the router."""
    forced = np.full(data.train.n_rows, -1, dtype=np.int64)
    forced[train] = mixture.group.numpy()[data.train_labels[train]]
    refined = refine(mixture, data.train, forced, progress)
    save_refined(path, refined, {"mixture": identity, "features": data.train.identity})
    return refined


def _refit_heads(
    data: IdData,
    groups: Sequence[int],
    bank: dict[str, Refined],
    runs: dict[str, TrainedMixture],
    progress: Progress | None,
) -> dict[str, FittedHeads]:
    """Heads for scoring. The heads that train the experts are bad OOD scorers (saturated, and taught "other")."""
    group = np.asarray(groups)
    rows: list[HeadRows] = []
    routed: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for name, fold in data.runs():
        held = (
            bank[name] if data.held_out is data.train else refine(runs[name].mixture, data.held_out, progress=progress)
        )
        rows.append(_head_rows(data, fold, bank[name].features, held.features))
        routed.append((bank[name].expert[fold.train], held.expert[fold.select]))
    heads = {"refit": fit_heads(rows, _final_rows(data, bank["final"].features), data.n_classes)}
    for expert in range(max(groups) + 1):
        # Judged on select rows that the router sent to the right expert: only they can be classified at all.
        own = [
            HeadRows(
                fold.features[train == expert],
                fold.labels[train == expert],
                fold.select_features[arrived],
                fold.select_labels[arrived],
            )
            for fold, (train, select) in zip(rows, routed, strict=True)
            if len(arrived := np.flatnonzero((select == expert) & (group[fold.select_labels] == expert)))
        ]
        ending = data.split.final_train[bank["final"].expert[data.split.final_train] == expert]
        final = (bank["final"].features[ending], data.train_labels[ending])
        strength, judged = choose_strength(own, data.n_classes) if own else (heads["refit"].strength, {})
        folds = tuple(
            fit_head(fold.features[train == expert], fold.labels[train == expert], data.n_classes, strength)
            for fold, (train, _) in zip(rows, routed, strict=True)
        )
        heads[f"refit-group-{expert}"] = FittedHeads(
            folds, fit_head(*final, data.n_classes, strength), strength, judged
        )
    return heads


def _head_rows(data: IdData, fold: Fold, features: NDArray[np.float32], held_out: NDArray[np.float32]) -> HeadRows:
    train, select = (data.train_labels[fold.train], data.held_out_labels[fold.select])
    return HeadRows(features[fold.train], train, held_out[fold.select], select)


def _final_rows(data: IdData, features: NDArray[np.float32]) -> tuple[NDArray[np.float32], Labels] | None:
    """Rows that the final head is fitted on; None where the only fold's head is the final one."""
    rows = data.split.final_train
    return (features[rows], data.train_labels[rows]) if data.split.cross_fitted else None
