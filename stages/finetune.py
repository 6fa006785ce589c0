"""Verb: stage two, the other half. The whole backbone end to end on the id-train images.

It is trained with a linear head, or with the mixture of feature experts as well (`stages.training.objectives`).
timm's parts do the work: layer-wise learning-rate decay, schedule, augmentation, Mixup and CutMix, moving average. The
result is a backbone checkpoint with a fingerprint of its own; extracting with it fills another cache.

Several processes (`stages.training.distributed`) train one backbone: each computes its share of every batch, and
gradients are summed. All that is random is drawn for the whole batch, so the loss is that of one process, to rounding.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from cache.fingerprint import fingerprint
from stages.config import BackboneConfig, FinetuneConfig
from stages.errors import InputError, StageError
from stages.files.documents import digest_of, read_document, read_whole, write_document, write_text
from stages.files.tensors import read_tensors, write_tensors
from stages.id_data.rows import IdData, read_blocks
from stages.inputs.images import SampleTable
from stages.machine import keep_freed_memory
from stages.mixture.config import MixtureConfig
from stages.mixture.grouping import group_training_classes, grouping_content
from stages.mixture.mixup import class_alpha, running_accuracy
from stages.mixture.model import build_mixture
from stages.mixture.storage import save_mixture
from stages.networks.backbone import Backbone, weights_sha
from stages.networks.surgery import compile_parts, freeze_first, n_parts
from stages.networks.weights.loading import build_model, model_shape
from stages.progress import NullProgress, Progress
from stages.training.augment import (
    Batch,
    ImageLoader,
    ImageSet,
    Key,
    Loaded,
    Mixer,
    Share,
    generators_kept,
    plan_epoch,
    seed_generators,
    share_of,
    transforms,
    worker_count,
)
from stages.training.checkpoint import Checkpoints, load_checkpoint
from stages.training.distributed import current
from stages.training.objectives import JointObjective, LinearObjective, Mixed, MixturePlan, drop_paths_by_row
from stages.training.recipes import FinetuneSettings, resolve_recipe
from stages.training.tensorboard import require_tensorboard, scalar_log, scalars_of_metrics

FINETUNE_SEMANTICS = 2  # raise it when the same settings would train another backbone

_TRAIN, _SELECT = 0, 1  # sets of the loader
_DROPPING, _OTHERS = 2, 3  # what is drawn for a batch, each apart from what else is


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
    mixture: MixturePlan | None = None,
) -> bool:
    """Train backbone and head on the training rows, keep the epoch with the best held-out ID loss.

    Writes ``metrics.jsonl`` after every epoch, with ``config.tensorboard`` its scalars as well
    (`stages.training.tensorboard`), and, at the end, ``backbone.safetensors`` (loadable by plain timm),
    ``head.safetensors``, with ``config.joint`` also ``mofe.safetensors`` and ``mofe.json``, and, last,
    ``finetune.json``. Killed, it goes on where it was stored last, at an end of an epoch or within one, to the same
    bits (`Checkpoints`). Of processes that are joined, all train and rank 0 writes.

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
        mixture: what is trained together with the blocks before it; needed where ``config.joint`` is not 0.

    Returns:
        Whether anything was done: False where the folder is fresh.

    Raises:
        InputError: images that cannot be used any more (listed in ``failures.jsonl``), settings that do not fit.
        StageError: the loss is not finite; the last good epoch's checkpoint is kept.
    """
    ranks = current()
    progress = progress if progress is not None and ranks.first else NullProgress()
    if config.tensorboard:
        require_tensorboard("finetune.tensorboard")
    settings = resolve_recipe(config, len(data.split.folds[0].train))
    identity = finetune_identity(data, config, seed, mixture)
    if ranks.agree(finetune_is_fresh(folder, identity)):
        if config.tensorboard and ranks.first:
            scalars_of_metrics(folder)
        return False
    keep_freed_memory()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        objective = _objective(backbone, data, settings, mixture, seed, device)
    augment, plain = transforms(objective.model, backbone, settings)
    fold = data.split.folds[0]
    sets = (
        ImageSet(train_samples, data.train.ids, fold.train, data.train_labels, augment, plain),
        ImageSet(held_out_samples, data.held_out.ids, fold.select, data.held_out_labels, augment, plain),
    )
    n_loads = settings.epochs * sum(map(len, sets)) // ranks.world
    loader = ImageLoader(sets, worker_count(config.workers, n_loads, ranks.world), pin=device != "cpu")
    run = _Run(folder, identity, settings)
    if data.train.manifest.n_failures:
        progress.note(
            f"finetune: {data.train.manifest.n_failures} images of {train_samples.source} take no part, they cannot be "
            f"used: see {data.train.path / 'failures.jsonl'}"
        )
    tuning = _Tuning(objective, loader, data.n_classes, settings, seed, device, progress)
    with generators_kept():
        _train(tuning, run, progress, seed, config.tensorboard)
    if ranks.first:
        objective.load_state_dict(run.best)
        _write(run, objective, backbone, data, seed, mixture)
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
    model = model_shape(backbone, **_network_options(backbone, settings))
    model.reset_classifier(n_classes)
    if settings.checkpointing:
        _checkpoint_gradients(model)
    if settings.joint:
        _check_joint(network(), settings.joint)
    else:
        freeze_first(model, settings.freeze, "finetune.freeze")
    transforms(model, backbone, settings)


def _network_options(backbone: BackboneConfig, settings: FinetuneSettings) -> dict[str, float]:
    """What the model is built with beside its name; some families know nothing of stochastic depth."""
    options = {"drop_path_rate": settings.drop_path}
    try:
        model_shape(backbone, **options)
    except TypeError as error:
        if settings.drop_path:
            raise InputError(
                f"finetune.drop_path: {settings.drop_path:g} given, {backbone.name} has no stochastic depth: give 0"
            ) from error
        return {}
    return options


def _check_joint(tapped: Backbone, joint: int) -> int:
    """How many blocks or stages stand before the experts; refuses more of them, and ends that cannot be cut out."""
    name = tapped.config.name
    if not tapped.cut:
        raise InputError(f"finetune.joint: the end of {name} cannot be cut out for experts: leave joint at 0")
    if joint > (before := n_parts(tapped.model) - tapped.expert_blocks):
        raise InputError(f"finetune.joint: {joint} given, {name} has {before} blocks or stages before the experts")
    return before


def _objective(
    backbone: BackboneConfig,
    data: IdData,
    settings: FinetuneSettings,
    mixture: MixturePlan | None,
    seed: int,
    device: str,
) -> Any:
    """The network to train, on the device, with what stays as it is frozen."""
    model = build_model(backbone, **_network_options(backbone, settings))
    if not settings.joint:
        cast(Any, model).reset_classifier(data.n_classes)
        freeze_first(model, settings.freeze, "finetune.freeze")
        model.to(device)
        if not hasattr(model, "patch_embed"):
            model.to(memory_format=torch.channels_last)
        return LinearObjective(model, settings.label_smoothing)
    assert mixture is not None
    spec = data.train.spec
    plain = backbone.model_copy(update={"compile": False, "precision": "float32"})
    tapped = Backbone(model, plain, spec.expert_blocks, device, detach_end=True)
    before = _check_joint(tapped, settings.joint)
    if spec.patches != "full":
        raise InputError(
            f'finetune.joint: experts read all patches: extract with patches = "full", not "{spec.patches}"'
        )
    train = data.split.folds[0].train
    groups = current().agree(group_training_classes(data, train, mixture.experts, mixture.grouping, seed))
    config = MixtureConfig(tapped.dim, tapped.tap_dim, tuple(groups), "end", mixture.router_input)
    experts = build_mixture(config, tapped.end)
    blocks = read_blocks(data.train, mixture.router_input, train)
    experts.router.standardise(torch.from_numpy(values) for _, values in blocks)
    cast(Any, model).reset_classifier(data.n_classes)
    freeze_first(model, before - settings.joint, "finetune.joint")
    objective = JointObjective(tapped, experts, mixture, settings.label_smoothing)
    return objective.to(device)


# ------------------------------------------------------------------------------------------------------- training


@dataclass
class _Begun:
    """How far an epoch is: steps that were taken, the sum of their loss, and how many images got their own class."""

    steps: int = 0
    loss: float = 0.0
    right: float = 0.0

    def add(self, loss: float, right: float) -> None:
        """Count one more step."""
        self.steps, self.loss, self.right = self.steps + 1, self.loss + loss, self.right + right


class _Run:
    """What a run has on disk, and what it has to remember: history, the epoch that it is in, and best weights."""

    def __init__(self, folder: Path, identity: str, settings: FinetuneSettings) -> None:
        self.folder, self.identity, self.settings = folder, identity, settings
        self.checkpoint = folder / f"finetune-{identity[:8]}.checkpoint"
        self.history: list[dict[str, Any]] = []
        self.begun = _Begun()
        self.best: dict[str, Tensor] = {}
        self._store = Checkpoints(self.checkpoint) if current().first else None

    def restore(self, tuning: "_Tuning") -> None:
        """Go on from the checkpoint, if there is one."""
        ranks, say = current(), tuning.progress.note
        stored = ranks.agree(load_checkpoint(self.checkpoint, say=say) if ranks.first else None)
        if stored is not None:
            tuning.restore(stored["tuning"])
            self.best, self.history, self.begun = stored["best"], stored["history"], _Begun(**stored["begun"])

    def store(self, tuning: "_Tuning") -> None:
        """At the end of an epoch, unless the last time was just now."""
        if self._store is not None and (self._store.due or self.ended):
            self._store.save(self._state(tuning))

    @property
    def overdue(self) -> bool:
        """Whether this process is to store the run within the epoch."""
        return self._store is not None and self._store.overdue

    def prepare(self, tuning: "_Tuning") -> None:
        """Take the run as it is within an epoch; stored once the loss of these weights is known to be a number."""
        assert self._store is not None
        self._store.prepare(self._state(tuning))

    def count(self, loss: float, right: float) -> None:
        """Count a step of the epoch, whose loss is a number."""
        self.begun.add(loss, right)
        if self._store is not None:
            self._store.commit()

    def _state(self, tuning: "_Tuning") -> dict[str, Any]:
        return {"tuning": tuning.state(), "best": self.best, "history": self.history, "begun": asdict(self.begun)}

    @property
    def best_epoch(self) -> int:
        """The first of the epochs with the lowest held-out loss."""
        return int(np.argmin([record["select_loss"] for record in self.history]))

    @property
    def ended(self) -> bool:
        """Whether no epoch is left, or too many went by without a better one."""
        n, patience = len(self.history), self.settings.patience
        return n >= self.settings.epochs or (patience is not None and n > 0 and n - 1 - self.best_epoch >= patience)

    def write_metrics(self) -> None:
        """All epochs so far; what older settings left is not described any more."""
        (self.folder / "finetune.json").unlink(missing_ok=True)
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in self.history))


def _train(tuning: "_Tuning", run: _Run, progress: Progress, seed: int, tensorboard: bool) -> None:
    """Train every epoch that is left, on from the checkpoint if there is one."""
    run.restore(tuning)
    n_images = len(tuning.loader.sets[_TRAIN])
    progress.start(run.settings.epochs * n_images, "image", f"finetune seed {seed}")
    progress.advance(len(run.history) * n_images)
    with scalar_log(run.folder, tensorboard, run.history) if current().first else nullcontext() as log:
        while not run.ended:
            record = _epoch(tuning, run)
            run.history.append(record)
            run.begun = _Begun()
            if run.best_epoch == record["epoch"]:
                run.best = {name: tensor.cpu().clone() for name, tensor in tuning.judged.state_dict().items()}
            run.store(tuning)
            if log is not None:
                run.write_metrics()
                log(record)
    progress.close()


def _epoch(tuning: "_Tuning", run: _Run) -> dict[str, Any]:
    """Train the next epoch; what stops it is said as a user can use it."""
    try:
        return tuning.epoch(run)
    except _NotFiniteError as error:
        raise StageError(_diverged(str(error), run)) from None
    except _UnusableError:
        raise _list_unusable(tuning.loader, run.folder) from None


class _NotFiniteError(Exception):
    """Which loss it is."""


class _UnusableError(Exception):
    """An image of this process or another cannot be used."""


def _diverged(what: str, run: _Run) -> str:
    kept, stored = "no checkpoint was stored yet", load_checkpoint(run.checkpoint)
    if stored is not None:
        n, steps = len(stored["history"]), stored["begun"]["steps"]
        when = f"of epoch {n}, after {steps} steps" if steps else f"of epoch {n - 1}"
        kept = f"the checkpoint {when}, the last good one, is kept in {run.checkpoint}"
    where = f"in epoch {len(run.history)}"
    return f"finetune: {what} is not finite {where}; {kept}: lower finetune.lr (now {run.settings.lr:g})"


def _list_unusable(loader: ImageLoader, folder: Path) -> InputError:
    """Look at every image, so that all that have to be put right are listed at once."""
    found = loader.unusable()
    path = folder / "failures.jsonl"
    if current().first:
        lines = [json.dumps({"source": images.source, **failure.to_dict()}) + "\n" for images, failure in found]
        write_text(path, "".join(lines))
    names = ", ".join(f"{failure.id}: {failure.reason}" for _, failure in found[:3])
    more = f", and {len(found) - 3} more, all in {path}" if len(found) > 3 else f"; listed in {path}"
    return InputError(
        f"finetune: {len(found)} images cannot be used any more ({names}{more}): put them right, or run make extract, "
        "which leaves them out"
    )


class _Tuning:
    """An objective while it is trained: its weights, their moving average, and the optimiser.

    Attributes:
        objective: what is trained.
        judged: what is judged and kept: the moving average of the weights, or the objective itself where ``ema`` is 0.
    """

    def __init__(
        self,
        objective: Any,
        loader: ImageLoader,
        n_classes: int,
        settings: FinetuneSettings,
        seed: int,
        device: str,
        progress: Progress,
    ) -> None:
        self.objective: Any = objective
        self.loader, self.settings, self.seed, self.device = loader, settings, seed, torch.device(device)
        self.progress, self.n_classes = progress, n_classes
        self.ranks = current()
        self._rows = drop_paths_by_row(objective.model)
        self._average = ModelEmaV3(objective, settings.ema, use_warmup=True) if settings.ema else None
        self.judged: Any = self._average.module if self._average is not None else objective
        self._mixer = Mixer(settings, n_classes, seed)
        self._optimiser = _optimiser(objective, settings)
        self._free = [p for p in objective.parameters() if p.requires_grad]
        heads = {id(parameter) for parameter in objective.head_parameters()}
        self._behind_heads = [parameter for parameter in self._free if id(parameter) not in heads]
        weight = objective.model.get_classifier().weight
        self._head_group = next(  # its place: a stored state brings groups of its own
            place
            for place, group in enumerate(self._optimiser.param_groups)
            if any(parameter is weight for parameter in group["params"])
        )
        if settings.checkpointing:
            _checkpoint_gradients(objective.model)
        if settings.compile:
            compile_parts(objective.model)
        half = settings.precision == "bfloat16"
        if settings.precision == "auto":
            half = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self._autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=half)
        self._steps_of_epoch = len(plan_epoch(self._n_train, settings.batch_size, seed, 0))
        self._schedule = _schedule(self._optimiser, settings, self._steps_of_epoch)

    @property
    def _n_train(self) -> int:
        return len(self.loader.sets[_TRAIN])

    def state(self) -> dict[str, Any]:
        """All that another process needs to go on to the same bits."""
        average = None if self._average is None else self._average.module.state_dict()
        return {
            "objective": self.objective.state_dict(),
            "average": average,
            "optimiser": self._optimiser.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.objective.load_state_dict(state["objective"])
        self._optimiser.load_state_dict(state["optimiser"])
        if self._average is not None:
            self._average.module.load_state_dict(state["average"])

    def epoch(self, run: _Run) -> dict[str, Any]:
        """Train on every image once, or on those that are left of the epoch, and judge by the held-out ones.

        Returns:
            A line of ``metrics.jsonl``.
        """
        epoch = len(run.history)
        accuracy = run.history[-1].get("accuracy") if run.history else None  # [C] running; difficulty is made of it
        settings, labels, groups = self.settings, self.loader.sets[_TRAIN].labels, self.objective.groups
        own_groups = None if groups is None else groups[labels]
        batches = plan_epoch(len(labels), settings.batch_size, self.seed, epoch, own_groups)
        for parameter in self._behind_heads:
            parameter.requires_grad_(epoch >= settings.head_epochs)
        alpha = self._alpha(accuracy) if settings.beta == "dynamic" else None
        self._train(batches, run, alpha)
        record: dict[str, Any] = {"epoch": epoch, "lr": self._optimiser.param_groups[self._head_group]["lr"]}
        loss, right = run.begun.loss / len(labels), run.begun.right / len(labels)
        record |= {"loss": round(loss, 6), "train_accuracy": round(right, 6)}
        judged, correct = self._judge()
        record |= judged
        self.progress.advance(0, accuracy=record["select_accuracy"])
        if alpha is not None:
            before = None if accuracy is None else np.asarray(accuracy)
            counts = np.bincount(self.loader.sets[_SELECT].labels, minlength=self.n_classes)
            # Rounded as the record has it: a resumed run reads it there, and must go on with the same numbers.
            record["accuracy"] = np.round(running_accuracy(before, correct, counts), 6).tolist()
            record["alpha"] = np.round(alpha, 6).tolist()
        return record

    def _alpha(self, accuracy: Sequence[float] | None) -> NDArray[np.float64]:
        """``[C]`` Beta parameters; all alike until accuracy was measured."""
        settings = self.settings
        known = np.zeros(self.n_classes) if accuracy is None else np.asarray(accuracy)
        return class_alpha(known, settings.alpha_min, settings.alpha_max, settings.alpha_power)

    def _train(self, batches: list[Batch], run: _Run, alpha: NDArray[np.float64] | None) -> None:
        """Take the steps of the epoch that are left; counts them, over all processes, in ``run.begun``."""
        self.objective.train()
        epoch, done = len(run.history), run.begun.steps
        self.progress.advance(sum(len(batch.rows) for batch in batches[:done]))
        batches = batches[done:]
        accumulate, parts = self.settings.accumulate, self.settings.accumulate * self.ranks.world
        shares = [
            [share_of(batch, number * self.ranks.world + self.ranks.rank, parts) for number in range(accumulate)]
            for batch in batches
        ]
        seed = (self.seed, epoch)
        asked: list[list[Key]] = [
            [(_TRAIN, int(row), seed) for row in batch.rows[share.place]]
            for batch, own in zip(batches, shares, strict=True)
            for share in own
        ]
        loaded = self.loader.batches(asked)
        last: tuple[Tensor, int] | None = None
        for batch, own in zip(batches, shares, strict=True):
            # What a bad step ends is left to all processes together, a step later: this one alone stores.
            if run.overdue and last is not None and _is_good(last[0]):
                run.count(*self._checked(last, epoch))
                last = None
                run.prepare(self)
            self._set_lr(epoch, batch.number)
            found = self._step(batch, own, loaded, epoch, alpha)
            # The step before is looked at while a GPU computes this one: nothing that a bad step spoils is kept.
            if last is not None:
                run.count(*self._checked(last, epoch))
            last = found, len(batch.rows)
        if last is not None:
            run.count(*self._checked(last, epoch))

    def _checked(self, step: tuple[Tensor, int], epoch: int) -> tuple[float, float]:
        """The loss of a step and how many rows were right, once they are known to be numbers."""
        found, n_rows = step
        loss, right, unusable = found.tolist()
        if unusable:
            raise _UnusableError
        if not math.isfinite(loss):
            raise _NotFiniteError("the loss")
        self.progress.advance(n_rows, epoch=epoch, loss=f"{loss / n_rows:.3f}")
        return loss, right

    def _step(
        self, batch: Batch, shares: list[Share], loaded: Iterator[Loaded], epoch: int, alpha: NDArray[np.float64] | None
    ) -> Tensor:
        """Learn from one batch; returns the sum of its loss, rows that were right, and images that cannot be used."""
        labels = self.loader.sets[_TRAIN].labels[batch.rows]
        drawn = self.objective.draw(labels, np.random.default_rng((self.seed, epoch, batch.number, _OTHERS)))
        found = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._optimiser.zero_grad(set_to_none=True)
        for share in shares:
            images, failures = next(loaded)
            found[2] += len(failures)
            if failures or not len(images):
                continue
            truth = torch.from_numpy(labels[share.place]).long().to(self.device)
            images = images.to(self.device, non_blocking=True)
            row_alpha = None if alpha is None else alpha[labels]
            images, targets = self._mixer(images, truth, share, epoch, batch.number, row_alpha)
            place = torch.from_numpy(share.place)
            self._rows.place, self._rows.n_batch = place, len(batch.rows)
            seed_generators([self.seed, epoch, batch.number, _DROPPING])
            with self._autocast:
                loss, right = self.objective.loss(Mixed(images, targets, truth, place), drawn)
            (loss / len(batch.rows)).backward()
            found[:2] += torch.stack([loss.detach(), right])
        self.ranks.add_gradients(self._free)
        if self.settings.gradient_clip:
            nn.utils.clip_grad_norm_(self._free, self.settings.gradient_clip)
        self._optimiser.step()
        if self._average is not None:
            self._average.update(self.objective, step=epoch * self._steps_of_epoch + batch.number + 1)
        return self.ranks.add(found)

    def _set_lr(self, epoch: int, step: int) -> None:
        if epoch < self.settings.head_epochs:
            for group in self._optimiser.param_groups:
                group["lr"] = self.settings.head_lr
        else:
            self._schedule.step_update((epoch - self.settings.head_epochs) * self._steps_of_epoch + step)

    @torch.inference_mode()
    def _judge(self) -> tuple[dict[str, float], NDArray[np.int64]]:
        """By the held-out images as they are: a part of the record, and ``[C]`` how many of each class were right."""
        self.judged.eval()
        images, size = self.loader.sets[_SELECT], max(1, self.settings.batch_size // self.settings.accumulate)
        rows = np.arange(len(images))[self.ranks.share]
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        asked: list[list[Key]] = [[(_SELECT, int(row), None) for row in batch] for batch in batches]
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        correct = torch.zeros(self.n_classes, dtype=torch.float64, device=self.device)
        for batch, (pixels, failures) in zip(batches, self.loader.batches(asked), strict=True):
            sums[3] += len(failures)
            if failures:
                continue
            truth = torch.from_numpy(images.labels[batch]).long().to(self.device)
            judged = self.judged.judge(pixels.to(self.device, non_blocking=True), truth)
            sums[:3] += torch.stack([judged.loss, judged.right.sum(), judged.arrived.sum()])
            correct += torch.bincount(truth[judged.known], minlength=self.n_classes)
        self.ranks.add(correct)
        loss, right, arrived, unusable = self.ranks.add(sums).tolist()
        if unusable:
            raise _UnusableError
        if not math.isfinite(loss):
            raise _NotFiniteError("the held-out loss")
        record = {"select_loss": round(loss / len(images), 6), "select_accuracy": round(right / len(images), 6)}
        if self.objective.groups is not None:
            record["router_accuracy"] = round(arrived / len(images), 6)
        return record, correct.long().cpu().numpy()


def _is_good(found: Tensor) -> bool:
    """Whether a step's loss is a number, and all of its images could be used."""
    loss, _, unusable = found.tolist()
    return math.isfinite(loss) and not unusable


def _optimiser(objective: Any, settings: FinetuneSettings) -> torch.optim.Optimizer:
    """AdamW with the paper's betas; the learning rate falls with the distance of a layer from the head."""
    model = objective.model
    groups = param_groups_layer_decay(
        model,
        weight_decay=settings.weight_decay,
        no_weight_decay_list=getattr(model, "no_weight_decay", set)(),
        layer_decay=settings.layer_decay,
    )
    groups += objective.parameter_groups(settings.weight_decay, settings.lr)
    return create_optimizer_v2(groups, opt="adamw", lr=settings.lr, weight_decay=0.0, betas=(0.9, 0.99))


def _schedule(optimiser: torch.optim.Optimizer, settings: FinetuneSettings, steps_of_epoch: int) -> CosineLRScheduler:
    """Of the epochs in which the whole backbone is trained, by steps."""
    epochs = settings.epochs - settings.head_epochs
    return CosineLRScheduler(
        optimiser,
        t_initial=max(epochs * steps_of_epoch, 2),  # of one step timm would say that it has no effect
        warmup_t=min(settings.warmup_epochs, epochs - 1) * steps_of_epoch,
        warmup_lr_init=settings.lr / 10,
        warmup_prefix=False,
        t_in_epochs=False,
    )


def _checkpoint_gradients(model: Any) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        name = type(model).__name__
        raise InputError(
            f"finetune.checkpointing: timm's {name} has no gradient checkpointing: leave it out"
        ) from error


# --------------------------------------------------------------------------------------------------- what is written


def finetune_identity(data: IdData, config: FinetuneConfig, seed: int, mixture: MixturePlan | None = None) -> str:
    """What a fine-tuned backbone is made of: images and their split, weights to start from, settings and seed."""
    start = data.train.spec
    joint = None if mixture is None else asdict(mixture) | {"grouping": grouping_content(mixture.grouping)}
    return fingerprint(
        {
            "data": data.identity,
            "settings": asdict(resolve_recipe(config, len(data.split.folds[0].train))),
            "mixture": joint,
            "seed": seed,
            "weights": start.weights_sha,
            "image_size": start.image_size,
            "semantics": FINETUNE_SEMANTICS,
        }
    )


def finetune_is_fresh(folder: Path, identity: str) -> bool:
    """Whether a folder holds the fine-tuned backbone of this identity, with all its files."""
    about = read_whole(folder / "finetune.json", unread=("metrics.jsonl",))  # which nothing is made of but the report
    return about is not None and about.get("identity") == identity


def _write(
    run: _Run, objective: Any, backbone: BackboneConfig, data: IdData, seed: int, plan: MixturePlan | None
) -> None:
    folder, model = run.folder, objective.model
    for name in ("finetune.json", "mofe.json"):  # killed in between, new weights must not pass for the old
        (folder / name).unlink(missing_ok=True)
    head = model.get_classifier()
    write_tensors(folder / "head.safetensors", _arrays({"weight": head.weight, "bias": head.bias}))
    model.reset_classifier(0)
    write_tensors(folder / "backbone.safetensors", _arrays(model.state_dict()))
    best = run.history[run.best_epoch]
    if plan is not None:
        groups = dict(zip(data.class_names, objective.groups.tolist(), strict=True))
        mixture = objective.mixture
        settings = asdict(plan) | {
            "expert": mixture.config.kind,
            "experts": mixture.n_experts,
            "joint": run.settings.joint,
        }
        save_mixture(folder, mixture, {"identity": run.identity, "groups": groups, "settings": settings})
    run.write_metrics()
    names = ["backbone.safetensors", "head.safetensors", "metrics.jsonl"]
    names += ["mofe.json", "mofe.safetensors"] if plan is not None else []
    write_document(
        folder / "finetune.json",
        {
            "identity": run.identity,
            "backbone": backbone.model_dump(),
            "weights_sha": weights_sha(model),  # that which the fingerprint of the features is made of
            "settings": asdict(run.settings),
            "batch_norm": "frozen",
            "seed": seed,
            "classes": list(data.class_names),
            "data": data.identity,
            "best_epoch": best["epoch"],
            "select_accuracy": best["select_accuracy"],
            "files": {name: digest_of(folder / name) for name in names},
        },
    )
    for left in folder.glob("*.checkpoint"):  # of runs with other settings, too
        left.unlink()


def _arrays(tensors: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}


def read_finetuned_head(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight ``[C, D]`` and bias ``[C]`` of the head that was trained with the backbone.

    Raises:
        InputError: no whole fine-tune stands there.
    """
    about, path = read_document(folder / "finetune.json"), folder / "head.safetensors"
    tensors = read_tensors(path)
    if about is None or tensors is None or digest_of(path) != about["files"][path.name]:
        raise InputError(f"{folder} holds no whole fine-tuned head: run make finetune")
    return tensors["weight"], tensors["bias"]
