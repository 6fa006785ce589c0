"""Verb: stage two, the other half. The whole backbone and a linear head, end to end on the id-train images.

timm's parts do the work: layer-wise learning-rate decay, schedule, augmentation, Mixup and CutMix. The result is a
backbone checkpoint with a fingerprint of its own; extracting with it fills another cache.
"""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from cache.fingerprint import fingerprint
from stages.allocator import keep_freed_memory
from stages.artifacts import read_json, read_tensors, write_json, write_tensors, write_text
from stages.backbone import build_model
from stages.checkpoint import load_checkpoint, save_checkpoint
from stages.config import BackboneConfig, FinetuneConfig
from stages.dataset import IdData, Labels
from stages.errors import InputError, StageError
from stages.images import SampleTable, decode_image
from stages.progress import NullProgress, Progress
from stages.split import Rows

FINETUNE_SEMANTICS = 1  # raise it when the same settings would train another backbone
SMALL_DATA = 50_000  # images below which preset = "auto" takes the small-data recipe


@dataclass(frozen=True)
class FinetuneSettings:
    """`FinetuneConfig` with every default filled in; the defaults are the small-data recipe.

    Batch-norm statistics stay the pre-trained ones in both recipes: small batches would spoil them.
    """

    epochs: int
    batch_size: int = 32
    lr: float = 3e-4
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    warmup_epochs: int = 1
    label_smoothing: float = 0.1
    rand_augment: str = ""
    random_erasing: float = 0.0
    crop_scale: float = 0.5
    hflip: float = 0.5
    mixup: float = 0.0
    cutmix: float = 0.0
    drop_path: float = 0.0
    gradient_clip: float = 1.0


# The official recipe: AdamW (0.9, 0.99), layer decay 0.75, RandAugment, erasing, Mixup and CutMix, 10 warm-up epochs.
PAPER: dict[str, Any] = {
    "batch_size": 128,
    "lr": 3.5e-5,
    "warmup_epochs": 10,
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "crop_scale": 0.08,
    "mixup": 0.8,
    "cutmix": 1.0,
    "drop_path": 0.1,
}


def resolve_settings(config: FinetuneConfig, n_train: int) -> FinetuneSettings:
    """Fill in the preset's values; ``auto`` takes the paper's recipe from `SMALL_DATA` images on."""
    given = {k: v for k, v in config.model_dump().items() if v is not None and k != "preset"}
    paper = config.preset == "paper" or (config.preset == "auto" and n_train >= SMALL_DATA)
    return FinetuneSettings(**((PAPER if paper else {}) | given))


def finetune(
    backbone: BackboneConfig,
    data: IdData,
    train_samples: SampleTable,
    held_out_samples: SampleTable,
    config: FinetuneConfig,
    seed: int,
    folder: Path,
    device: str = "cpu",
    progress: Progress | None = None,
) -> bool:
    """Train backbone and head on the training rows, keep the epoch with the best held-out ID loss.

    Writes ``backbone.safetensors`` (loadable by plain timm), ``head.safetensors``, ``metrics.jsonl`` and, last,
    ``finetune.json``. Killed, it goes on after the last whole epoch.

    Args:
        backbone: what to start from.
        data: ID rows and split, as the cache of the pre-trained backbone has them; without cross-fitting.
        train_samples: images of the id-train set.
        held_out_samples: images of the set that `select` rows belong to.
        config: settings.
        seed: fixes initialisation of the head, order and every augmentation, by (seed, epoch, sample).
        folder: where the result goes.
        device: where it trains.
        progress: counts images.

    Returns:
        Whether anything was done: False where the folder is fresh.

    Raises:
        StageError: the loss is not finite; the last good epoch's checkpoint is kept.
    """
    keep_freed_memory()
    progress = progress or NullProgress()
    fold = data.split.folds[0]
    settings = resolve_settings(config, len(fold.train))
    identity = finetune_identity(data, config, seed)
    if finetune_is_fresh(folder, identity):
        return False
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(backbone, drop_path_rate=settings.drop_path)
        cast(Any, model).reset_classifier(data.n_classes)
    model.to(device)
    if not hasattr(model, "patch_embed"):
        model.to(memory_format=torch.channels_last)
    transforms = _transforms(model, backbone, settings)
    train = _Images(train_samples, data.train.ids, fold.train, data.train_labels, transforms[0])
    select = _Images(held_out_samples, data.held_out.ids, fold.select, data.held_out_labels, transforms[1])
    optimiser = create_optimizer_v2(
        model,
        opt="adamw",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
        betas=(0.9, 0.99),
    )
    schedule = CosineLRScheduler(
        optimiser,
        t_initial=max(settings.epochs, 2),  # of one epoch timm would say that it has no effect; its rate is the same
        warmup_t=min(settings.warmup_epochs, settings.epochs - 1),
        warmup_lr_init=settings.lr / 10,
        warmup_prefix=False,
    )
    checkpoint = folder / f"finetune-{identity[:8]}.checkpoint"
    history: list[dict[str, Any]] = []
    best: dict[str, Tensor] = {}
    stored = load_checkpoint(checkpoint, device)
    if stored is not None:
        model.load_state_dict(stored["model"])
        optimiser.load_state_dict(stored["optimiser"])
        best, history = stored["best"], stored["history"]
    progress.start(settings.epochs * len(train), "image", f"finetune seed {seed}")
    progress.advance(len(history) * len(train))
    for epoch in range(len(history), settings.epochs):
        schedule.step(epoch)
        record = {"epoch": epoch, "lr": optimiser.param_groups[-1]["lr"]}
        record |= _train_epoch(model, train, settings, optimiser, seed, epoch, data.n_classes, device, progress)
        record |= _evaluate(model, select, settings.batch_size, device)
        if not np.isfinite(record["select_loss"]):
            raise _diverged("the held-out loss", epoch, settings)
        history.append(record)
        if _best_epoch(history) == epoch:
            best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        save_checkpoint(
            checkpoint,
            {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "best": best, "history": history},
        )
    progress.close()
    model.load_state_dict(best)
    _write(folder, model, backbone, data, settings, seed, identity, history)
    for left in folder.glob("*.checkpoint"):  # of runs with other settings, too
        left.unlink()
    return True


def finetune_identity(data: IdData, config: FinetuneConfig, seed: int) -> str:
    """What a fine-tuned backbone is made of: images and their split, weights to start from, settings and seed."""
    start = data.train.spec
    return fingerprint(
        {
            "data": data.identity,
            "settings": asdict(resolve_settings(config, len(data.split.folds[0].train))),
            "seed": seed,
            "weights": start.weights_sha,
            "image_size": start.image_size,
            "semantics": FINETUNE_SEMANTICS,
        }
    )


def _best_epoch(history: list[dict[str, Any]]) -> int:
    """The first of the epochs with the lowest held-out loss."""
    return int(np.argmin([record["select_loss"] for record in history]))


def finetune_is_fresh(folder: Path, identity: str) -> bool:
    """Whether a folder holds the fine-tuned backbone of this identity, with all its files."""
    about = read_json(folder / "finetune.json")
    whole = all((folder / name).is_file() for name in ("backbone.safetensors", "head.safetensors"))
    return whole and about is not None and about.get("identity") == identity


def _write(
    folder: Path,
    model: nn.Module,
    backbone: BackboneConfig,
    data: IdData,
    settings: FinetuneSettings,
    seed: int,
    identity: str,
    history: list[dict[str, Any]],
) -> None:
    (folder / "finetune.json").unlink(missing_ok=True)  # killed in between, new weights must not pass for the old
    timm_model = cast(Any, model)
    head = timm_model.get_classifier()
    write_tensors(
        folder / "head.safetensors",
        {"weight": head.weight.detach().cpu().numpy(), "bias": head.bias.detach().cpu().numpy()},
    )
    timm_model.reset_classifier(0)
    write_tensors(
        folder / "backbone.safetensors",
        {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in model.state_dict().items()},
    )
    write_text(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))
    best = _best_epoch(history)
    write_json(
        folder / "finetune.json",
        {
            "identity": identity,
            "backbone": backbone.model_dump(),
            "settings": asdict(settings),
            "seed": seed,
            "classes": list(data.class_names),
            "data": data.identity,
            "best_epoch": best,
            "select_accuracy": history[best]["select_accuracy"],
        },
    )


def read_finetuned_head(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight ``[C, D]`` and bias ``[C]`` of the head that was trained with the backbone.

    Raises:
        InputError: no whole fine-tune stands there.
    """
    tensors = read_tensors(folder / "head.safetensors")
    if tensors is None:
        raise InputError(f"{folder} holds no fine-tuned head: run make finetune")
    return tensors["weight"], tensors["bias"]


class _Images:
    """Images of some rows, decoded and transformed on demand."""

    def __init__(self, samples: SampleTable, ids: NDArray[np.str_], rows: Rows, labels: Labels, transform: Any) -> None:
        place = {id_: index for index, id_ in enumerate(samples.ids)}
        missing = [str(ids[row]) for row in rows if str(ids[row]) not in place]
        if missing:
            raise InputError(
                f"{samples.source}: {len(missing)} images of the cache are gone ({missing[0]} first): run make extract"
            )
        self.index = [place[str(ids[row])] for row in rows]
        self.labels = labels[rows]
        self.reader = samples.reader()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.index)

    def batches(
        self, size: int, order: NDArray[np.int64], seed: tuple[int, int] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches in an order; with a seed every augmentation is drawn from (seed, epoch, sample)."""
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            images = [self._load(int(row), seed) for row in rows]
            yield torch.stack(images), torch.from_numpy(self.labels[rows]).long()

    def _load(self, row: int, seed: tuple[int, int] | None) -> Tensor:
        image = decode_image(self.reader.read(self.index[row]))
        if seed is not None:
            # timm's and torchvision's transforms draw from these three generators.
            drawn = int(np.random.SeedSequence([*seed, row]).generate_state(1)[0])
            random.seed(drawn)
            np.random.seed(drawn)
            torch.manual_seed(drawn)
        tensor: Tensor = self.transform(image)
        return tensor


def _transforms(model: nn.Module, backbone: BackboneConfig, settings: FinetuneSettings) -> tuple[Any, Any]:
    size = backbone.image_size
    config = timm.data.resolve_data_config({"input_size": (3, size, size)}, model=model)
    train = timm.data.create_transform(
        input_size=config["input_size"],
        is_training=True,
        scale=(settings.crop_scale, 1.0),
        hflip=settings.hflip,
        color_jitter=0.0,
        auto_augment=settings.rand_augment or None,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        re_prob=settings.random_erasing,
        re_mode="pixel",
    )
    return train, timm.data.create_transform(**config)


def _train_epoch(
    model: nn.Module,
    images: _Images,
    settings: FinetuneSettings,
    optimiser: torch.optim.Optimizer,
    seed: int,
    epoch: int,
    n_classes: int,
    device: str,
    progress: Progress,
) -> dict[str, float]:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    mixed = settings.mixup > 0 or settings.cutmix > 0
    mixer = Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.label_smoothing, num_classes=n_classes)
    hard = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    soft = SoftTargetCrossEntropy()
    order = np.random.default_rng((seed, epoch)).permutation(len(images))
    total, right = 0.0, 0
    with _generators_kept():
        for x, y in images.batches(settings.batch_size, order, (seed, epoch)):
            x, y = x.to(device), y.to(device)
            if mixed and len(x) % 2 == 0:  # timm's Mixup pairs rows of even batches
                x, targets = mixer(x, y)
                logits = model(x)
                loss = soft(logits, targets)
            else:
                logits = model(x)
                loss = hard(logits, y)
            if not torch.isfinite(loss):
                raise _diverged("the loss", epoch, settings)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
            optimiser.step()
            total += loss.item() * len(x)
            right += int((logits.argmax(1) == y).sum())
            progress.advance(len(x), epoch=epoch, loss=f"{loss.item():.3f}")
    return {"loss": round(total / len(images), 6), "train_accuracy": round(right / len(images), 6)}


def _diverged(what: str, epoch: int, settings: FinetuneSettings) -> StageError:
    return StageError(
        f"finetune: {what} is not finite in epoch {epoch}; the last whole epoch is kept: "
        f"lower finetune.lr (now {settings.lr:g})"
    )


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Whatever is drawn and seeded inside, the caller's random numbers stay what they are."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@torch.inference_mode()
def _evaluate(model: nn.Module, images: _Images, batch_size: int, device: str) -> dict[str, float]:
    model.eval()
    loss, right = 0.0, 0
    for x, y in images.batches(batch_size, np.arange(len(images)), None):
        logits = model(x.to(device)).cpu()
        loss += nn.functional.cross_entropy(logits, y, reduction="sum").item()
        right += int((logits.argmax(1) == y).sum())
    return {"select_loss": round(loss / len(images), 6), "select_accuracy": round(right / len(images), 6)}
