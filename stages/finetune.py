"""Verb: stage two, the other half. The whole backbone end to end on the id-train images.

It is trained with a linear head, or with the mixture of feature experts as well (`stages.training.objectives`).
timm's parts do the work: layer-wise learning-rate decay, schedule, augmentation, Mixup and CutMix, moving average. The
result is a backbone checkpoint with a fingerprint of its own; extracting with it fills another cache.

Several processes (`stages.training.distributed`) train one backbone: each computes its share of every batch, and
gradients are summed. All that is random is drawn for the whole batch, so the loss is that of one process, to rounding.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.config import BackboneConfig, FinetuneConfig
from stages.context import Context
from stages.errors import InputError, StageError
from stages.files.documents import digest_of, write_document, write_text
from stages.files.tensors import write_tensors
from stages.id_data.rows import IdData
from stages.inputs.images import SampleTable
from stages.machine import keep_freed_memory
from stages.mixture.storage import save_mixture
from stages.networks.backbone import Backbone, weights_sha
from stages.networks.surgery import freeze_first
from stages.networks.weights.loading import model_shape
from stages.training.augment import generators_kept, transforms
from stages.training.checkpoint import Checkpoints, load_checkpoint
from stages.training.identity import finetune_identity, finetune_is_fresh
from stages.training.images import ImageTrainer, NotFiniteLossError, UnusableImagesError
from stages.training.loading import ImageLoader, ImageSet, expect_workers, worker_count
from stages.training.loop import train_epochs
from stages.training.networks import build_objective, check_joint, checkpoint_gradients, network_options
from stages.training.recipes import FinetuneSettings, MixturePlan, recorded_settings, resolve_recipe
from stages.training.run import Record, TrainingRun, write_metrics
from stages.training.tensorboard import require_tensorboard, scalar_log, scalars_of_metrics


@dataclass(frozen=True)
class TuningImages:
    """ID rows and the images that they were made of.

    Attributes:
        data: rows and split, as the cache of the pre-trained backbone has them; without cross-fitting.
        train: images of the id-train set.
        held_out: images of the set that `select` rows belong to.
    """

    data: IdData
    train: SampleTable
    held_out: SampleTable

    @property
    def n_train(self) -> int:
        """How many images are trained on."""
        return len(self.data.split.folds[0].train)


def finetune(
    backbone: BackboneConfig,
    images: TuningImages,
    config: FinetuneConfig,
    seed: int,
    folder: Path,
    context: Context = Context(),
    mixture: MixturePlan | None = None,
) -> bool:
    """Train backbone and head on the training rows, keep the epoch with the best held-out ID loss.

    Writes ``metrics.jsonl`` after every epoch, with ``config.tensorboard`` its scalars as well
    (`stages.training.tensorboard`), and, at the end, ``backbone.safetensors`` (loadable by plain timm),
    ``head.safetensors``, with ``config.joint`` also ``mofe.safetensors`` and ``mofe.json``, and, last,
    ``finetune.json``. Killed, it goes on where it was stored last, at an end of an epoch or within one, to the same
    bits (`stages.training.run`). Of processes that are joined, all train and rank 0 writes.

    Args:
        backbone: what to start from.
        images: what to train on.
        config: settings.
        seed: fixes initialisation of the head, order and every augmentation, by (seed, epoch, sample).
        folder: where the result goes.
        context: counts images; where it trains.
        mixture: what is trained together with the blocks before it; needed where ``config.joint`` is not 0.

    Returns:
        Whether anything was done: False where the folder is fresh.

    Raises:
        InputError: images that cannot be used any more (listed in ``failures.jsonl``), settings that do not fit.
        StageError: the loss is not finite; the last good epoch's checkpoint is kept.
    """
    ranks, data = context.ranks, images.data
    if config.tensorboard:
        require_tensorboard("finetune.tensorboard")
    settings = resolve_recipe(config, images.n_train)
    identity = finetune_identity(data, config, seed, mixture)
    if ranks.agree(finetune_is_fresh(folder, identity)):
        if config.tensorboard and ranks.first:
            scalars_of_metrics(folder)
        return False
    keep_freed_memory()
    workers = _n_workers(images, settings, context)
    if workers:
        expect_workers()  # while the network is built
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        objective = build_objective(backbone, data, settings, mixture, seed, context)
    sets = _image_sets(images, transforms(objective.model, backbone, settings))
    loader = ImageLoader(sets, workers, pin=context.place != "cpu")
    if data.train.manifest.n_failures:
        context.progress.note(
            f"finetune: {data.train.manifest.n_failures} images of {images.train.source} take no part, they cannot be "
            f"used: see {data.train.path / 'failures.jsonl'}"
        )
    if backbone.decode != "pil":
        context.progress.note(
            f'finetune: backbone.decode = "{backbone.decode}" is for extraction and predict; images are decoded by '
            "Pillow in full here, since crops of them are enlarged"
        )
    checkpoints = Checkpoints(folder / f"finetune-{identity[:8]}.checkpoint")
    run = TrainingRun(settings.epochs, settings.patience, checkpoints, context)
    trainer = ImageTrainer(objective, loader, data.n_classes, settings, seed, context)
    with generators_kept():
        run.resume(trainer)
        _train(trainer, run, folder, config.tensorboard, context)
    if ranks.first:
        objective.load_state_dict(run.best)
        about = {
            "identity": identity,
            "backbone": backbone.model_dump(),
            "settings": recorded_settings(settings),
            "seed": seed,
        }
        _write(folder, objective, data, run, about | {"seed": seed}, mixture)
        for left in folder.glob("*.checkpoint"):  # of runs with other settings, too
            left.unlink()
    ranks.agree(None)  # nobody goes on before the files are there
    return True


def check_finetune(
    backbone: BackboneConfig, settings: FinetuneSettings, n_classes: int, network: Callable[[], Backbone]
) -> None:
    """Refuse settings that the network's shape does not allow; no weights are read.

    Args:
        backbone: the network to fine-tune.
        settings: of the fine-tune.
        n_classes: C.
        network: the same network, with weights or without, asked for where ``joint`` is not 0.

    Raises:
        InputError: in the words of the fine-tune itself.
    """
    model = model_shape(backbone, **network_options(backbone, settings))
    model.reset_classifier(n_classes)
    if settings.checkpointing:
        checkpoint_gradients(model)
    if settings.joint:
        check_joint(network(), settings.joint)
    else:
        freeze_first(model, settings.freeze, "finetune.freeze")
    transforms(model, backbone, settings)


def _n_workers(images: TuningImages, settings: FinetuneSettings, context: Context) -> int:
    """How many processes decode for this one."""
    fold, world = images.data.split.folds[0], context.ranks.world
    n_loads = settings.epochs * (len(fold.train) + len(fold.select)) // world
    return worker_count(settings.workers, n_loads, world, context.place)


def _image_sets(images: TuningImages, augment_and_plain: tuple[Any, Any]) -> tuple[ImageSet, ImageSet]:
    """Images to train on and images to judge by."""
    data, fold = images.data, images.data.split.folds[0]
    return (
        ImageSet(images.train, data.train.ids, fold.train, data.train_labels, *augment_and_plain),
        ImageSet(images.held_out, data.held_out.ids, fold.select, data.held_out_labels, *augment_and_plain),
    )


# ------------------------------------------------------------------------------------------------------- training


def _train(trainer: ImageTrainer, run: TrainingRun, folder: Path, tensorboard: bool, context: Context) -> None:
    """Train every epoch that is left, a line of metrics for each; what stops it is said as a user can use it."""
    first = context.ranks.first
    with scalar_log(folder, tensorboard, run.history) if first else nullcontext() as log:

        def write(record: Record) -> None:
            if log is not None:
                (folder / "finetune.json").unlink(missing_ok=True)  # what older settings left is not described any more
                write_metrics(folder, run.history)
                log(record)

        try:
            train_epochs(trainer, run, context, f"finetune seed {trainer.seed}", write)
        except NotFiniteLossError as error:
            raise StageError(_diverged(str(error), run, trainer.settings.lr)) from None
        except UnusableImagesError:
            raise _list_unusable(trainer.loader, folder, first) from None


def _diverged(what: str, run: TrainingRun, lr: float) -> str:
    path = run.checkpoint
    kept, stored = "no checkpoint was stored yet", load_checkpoint(path)
    if stored is not None:
        n, steps = len(stored["history"]), stored["begun"]["steps"]
        when = f"of epoch {n}, after {steps} steps" if steps else f"of epoch {n - 1}"
        kept = f"the checkpoint {when}, the last good one, is kept in {path}"
    return f"finetune: {what} is not finite in epoch {len(run.history)}; {kept}: lower finetune.lr (now {lr:g})"


def _list_unusable(loader: ImageLoader, folder: Path, writes: bool) -> InputError:
    """Look at every image, so that all that have to be put right are listed at once."""
    found = loader.unusable()
    path = folder / "failures.jsonl"
    if writes:
        lines = [json.dumps({"source": images.source, **failure.to_dict()}) + "\n" for images, failure in found]
        write_text(path, "".join(lines))
    names = ", ".join(f"{failure.id}: {failure.reason}" for _, failure in found[:3])
    more = f", and {len(found) - 3} more, all in {path}" if len(found) > 3 else f"; listed in {path}"
    return InputError(
        f"finetune: {len(found)} images cannot be used any more ({names}{more}): put them right, or run make extract, "
        "which leaves them out"
    )


# --------------------------------------------------------------------------------------------------- what is written


def _write(
    folder: Path, objective: Any, data: IdData, run: TrainingRun, about: dict[str, Any], plan: MixturePlan | None
) -> None:
    """Write the weights that are kept, all metrics and, last, ``finetune.json``.

    Args:
        folder: where to.
        objective: with these weights; its head is taken off.
        data: what it was trained on.
        run: that was done.
        about: what is said of it.
        plan: of the experts that were trained with it.
    """
    model, best = objective.model, run.kept
    for name in ("finetune.json", "mofe.json"):  # killed in between, new weights must not pass for the old
        (folder / name).unlink(missing_ok=True)
    head = model.get_classifier()
    write_tensors(folder / "head.safetensors", _arrays({"weight": head.weight, "bias": head.bias}))
    model.reset_classifier(0)
    write_tensors(folder / "backbone.safetensors", _arrays(model.state_dict()))
    write_metrics(folder, run.history)
    names = ["backbone.safetensors", "head.safetensors", "metrics.jsonl"]
    if plan is not None:
        groups = dict(zip(data.class_names, objective.groups.tolist(), strict=True))
        mixture, joint = objective.mixture, about["settings"]["joint"]
        settings = asdict(plan) | {"expert": mixture.config.kind, "experts": mixture.n_experts, "joint": joint}
        save_mixture(folder, mixture, {"identity": about["identity"], "groups": groups, "settings": settings})
        names += ["mofe.json", "mofe.safetensors"]
    write_document(
        folder / "finetune.json",
        {
            "identity": about["identity"],
            "backbone": about["backbone"],
            "weights_sha": weights_sha(model),  # that which the fingerprint of the features is made of
            "settings": about["settings"],
            "batch_norm": "frozen",
            "seed": about["seed"],
            "classes": list(data.class_names),
            "data": data.identity,
            "best_epoch": best["epoch"],
            "select_accuracy": best["select_accuracy"],
            "files": {name: digest_of(folder / name) for name in names},
        },
    )


def _arrays(tensors: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
