"""Training on images: what a whole network learns from batches that are decoded, augmented and mixed."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from cache import Failure
from stages.context import Context
from stages.mixture.mixup import next_accuracy, next_alpha
from stages.networks.batch import filled
from stages.networks.repeatable import Backward
from stages.networks.surgery import compile_parts
from stages.networks.transfer import Fetched, Tensors, sent_ahead, to_device
from stages.training.augment import Mixer, seed_generators
from stages.training.batches import Batch, Share, plan_epoch, share_of
from stages.training.loading import ImageLoader, Key, Loaded
from stages.training.loop import Step
from stages.training.networks import checkpoint_gradients
from stages.training.objectives import Mixed, drop_paths_by_row
from stages.training.optim import NetworkSchedule, network_optimiser
from stages.training.recipes import FinetuneSettings
from stages.training.run import Record

TRAIN, SELECT = 0, 1  # sets of the loader
_DROPPING, _OTHERS = 2, 3  # what is drawn for a batch, each apart from what else is


class NotFiniteLossError(Exception):
    """A loss is no number: which one it is."""


class UnusableImagesError(Exception):
    """An image of this process or another cannot be used."""


class LoadedBatch(NamedTuple):
    """A batch, which shares of it this process computes, and where their images come from."""

    batch: Batch
    shares: list[Share]
    images: Iterator[Loaded]


def _floats_of(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers that an average has; counters of batch norm, which is frozen, stay as they are."""
    return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]


class ImageTrainer:
    """Trains an objective's network on images; see `stages.training.loop.Trainer`.

    Attributes:
        objective: what is trained.
        judged: what is judged and kept: the moving average of the weights, or the objective itself where ``ema`` is 0.
    """

    unit = "image"

    def __init__(
        self,
        objective: Any,
        loader: ImageLoader,
        n_classes: int,
        settings: FinetuneSettings,
        seed: int,
        context: Context,
    ) -> None:
        """Begin with an objective as it is.

        Args:
            objective: of `stages.training.objectives`, on the device where it is trained.
            loader: of the images to train on (`TRAIN`) and to judge by (`SELECT`).
            n_classes: C.
            settings: of the fine-tune.
            seed: all that is drawn is drawn from it and the numbers of epoch, batch and image.
            context: which processes train together; told how well they do.
        """
        self.objective: Any = objective
        self.loader, self.settings, self.seed = loader, settings, seed
        self.n_rows = len(loader.sets[TRAIN])
        self._n_classes, self._progress, self._ranks = n_classes, context.progress, context.ranks
        self._device = next(objective.parameters()).device
        self._rows = drop_paths_by_row(objective.model)
        self._average = ModelEmaV3(objective, settings.ema, use_warmup=True) if settings.ema else None
        self.judged: Any = self._average.module if self._average is not None else objective
        self._averaged, self._followed = _floats_of(self.judged), _floats_of(objective)
        self._mixer = Mixer(settings, n_classes, seed)
        self._optimiser = network_optimiser(objective, settings)
        self._free = [p for p in objective.parameters() if p.requires_grad]
        heads = {id(parameter) for parameter in objective.head_parameters()}
        self._backward = Backward(self._free)
        self._behind_heads = [parameter for parameter in self._free if id(parameter) not in heads]
        if settings.checkpointing:
            checkpoint_gradients(objective.model)
        if settings.compile:
            compile_parts(objective.model)
        half = settings.precision == "bfloat16"
        if settings.precision == "auto":
            half = self._device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self._autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=half)
        self._steps_of_epoch = len(plan_epoch(self.n_rows, settings.batch_size, seed, 0))
        self._passes = self._images_of_passes() if self._device.type == "cuda" else ()
        self._schedule = NetworkSchedule(self._optimiser, settings, self._steps_of_epoch)
        weight = objective.model.get_classifier().weight
        self._head_group = next(  # its place: a stored state brings groups of its own
            place
            for place, group in enumerate(self._optimiser.param_groups)
            if any(parameter is weight for parameter in group["params"])
        )
        self._epoch, self._history = 0, list[Record]()
        self._alpha: NDArray[np.float64] | None = None
        self._loss = self._right = 0.0  # sums of the epoch: of the loss, and of images that got their own class

    def _images_of_passes(self) -> tuple[int, ...]:
        """How many images a pass may have on a GPU: that of the largest share of a batch, and one that judges.

        For each other number cuDNN would choose kernels anew, and torch.compile compile: of batches as equal as can be
        some have one image less, and the last that judges has what is left.
        """
        batch = -(-self.n_rows // self._steps_of_epoch)
        return -(-batch // (self.settings.accumulate * self._ranks.world)), self._judged_at_once

    @property
    def _judged_at_once(self) -> int:
        return max(1, self.settings.batch_size // self.settings.accumulate)

    # ------------------------------------------------------------------------------------------- what is stored

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

    def counted(self) -> dict[str, Any]:
        """The sums of the epoch."""
        return {"loss": self._loss, "right": self._right}

    def go_on(self, counted: Mapping[str, Any]) -> None:
        """Go on from what was `counted`."""
        self._loss, self._right = counted["loss"], counted["right"]

    # ------------------------------------------------------------------------------------------- an epoch

    def plan(self, epoch: int, history: Sequence[Record]) -> list[Batch]:
        """Begin an epoch: every image once."""
        settings, labels, groups = self.settings, self.loader.sets[TRAIN].labels, self.objective.groups
        self._epoch, self._history, self._loss, self._right = epoch, list(history), 0.0, 0.0
        self._alpha = next_alpha(history, self._n_classes, settings) if settings.beta == "dynamic" else None
        for parameter in self._behind_heads:
            parameter.requires_grad_(epoch >= settings.head_epochs)
        self.objective.train()
        own_groups = None if groups is None else groups[labels]
        return plan_epoch(self.n_rows, settings.batch_size, self.seed, epoch, own_groups)

    def load(self, batches: Sequence[Batch]) -> Iterator[LoadedBatch]:
        """The batches; images of this process's shares are decoded and augmented in the background."""
        accumulate, ranks = self.settings.accumulate, self._ranks
        shares = [
            [
                share_of(batch, number * ranks.world + ranks.rank, accumulate * ranks.world)
                for number in range(accumulate)
            ]
            for batch in batches
        ]
        seed = (self.seed, self._epoch)
        asked: list[list[Key]] = [
            [(TRAIN, int(row), seed) for row in batch.rows[share.place]]
            for batch, own in zip(batches, shares, strict=True)
            for share in own
        ]
        images = self._on_device(self.loader.batches(asked))
        for batch, own in zip(batches, shares, strict=True):
            yield LoadedBatch(batch, own, images)

    def _on_device(self, loaded: Iterator[Loaded]) -> Iterator[Loaded]:
        """The same images on the device; on a GPU the next are copied there while it computes."""
        failures: deque[list[Failure]] = deque()

        def jobs() -> Iterator[Callable[[], Tensors]]:
            for images, failed in loaded:
                failures.append(failed)
                yield partial(dict, images=images)

        for columns in sent_ahead(jobs(), self._device):
            yield Loaded(columns["images"], failures.popleft())

    def step(self, loaded: LoadedBatch) -> Step:
        """Learn from one batch: the sum of its loss, rows that were right, and images that cannot be used."""
        batch, number = loaded.batch, loaded.batch.number
        self._schedule.set(self._epoch, number)
        labels = self.loader.sets[TRAIN].labels[batch.rows]
        drawn = self.objective.draw(labels, np.random.default_rng((self.seed, self._epoch, number, _OTHERS)))
        found = torch.zeros(3, dtype=torch.float64, device=self._device)
        self._optimiser.zero_grad(set_to_none=True)
        for share in loaded.shares:
            images, failures = next(loaded.images)
            found[2] += len(failures)
            if failures or not len(images):
                continue
            mixed = self._mixed(images, labels, batch, share)
            found[:2] += self._backward(partial(self._forward, mixed, drawn, batch))
        self._ranks.add_gradients(self._free)
        if self.settings.gradient_clip:
            nn.utils.clip_grad_norm_(self._free, self.settings.gradient_clip)
        self._optimiser.step()
        if self._average is not None:
            # As its `update` does, which looks for all tensors in each step.
            decay = self._average.get_decay(self._epoch * self._steps_of_epoch + number + 1)
            torch._foreach_lerp_(self._averaged, self._followed, 1.0 - decay)
        return Step(batch.rows, Fetched(self._ranks.add(found)))

    def _forward(self, mixed: Mixed, drawn: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is minimised, and ``[2]`` the sum of the loss and of the rows that are right."""
        self._rows.place, self._rows.n_batch = filled(mixed.place, [len(mixed.images)]), len(batch.rows)
        seed_generators([self.seed, self._epoch, batch.number, _DROPPING], self._device.type)
        with self._autocast:
            loss, right = self.objective.loss(mixed, drawn)
        return loss / len(batch.rows), torch.stack([loss.detach(), right])

    def _mixed(self, images: Tensor, labels: NDArray[np.integer], batch: Batch, share: Share) -> Mixed:
        """The images of a share, mixed with each other on the device."""
        truth = to_device(torch.from_numpy(labels[share.place]).long(), self._device)
        row_alpha = None if self._alpha is None else self._alpha[labels]
        images, targets = self._mixer(images, truth, share, self._epoch, batch.number, row_alpha)
        return Mixed(filled(images, self._passes), targets, truth, torch.from_numpy(share.place))

    def is_good(self, step: Step) -> bool:
        """Whether a step's loss is a number, and all of its images could be used."""
        loss, _, unusable = step.found.tolist()
        return math.isfinite(loss) and not unusable

    def count(self, step: Step) -> str:
        """Count the loss of a step; gives it a row.

        Raises:
            UnusableImagesError: it had images that cannot be used.
            NotFiniteLossError: its loss is no number.
        """
        loss, right, unusable = step.found.tolist()
        if unusable:
            raise UnusableImagesError
        if not math.isfinite(loss):
            raise NotFiniteLossError("the loss")
        self._loss, self._right = self._loss + loss, self._right + right
        return f"{loss / len(step.rows):.3f}"

    # ------------------------------------------------------------------------------------------- what it came to

    def judge(self) -> Record:
        """End the epoch: its loss, and what the held-out images say as they are."""
        record: Record = {"epoch": self._epoch, "lr": self._optimiser.param_groups[self._head_group]["lr"]}
        record["loss"] = round(self._loss / self.n_rows, 6)
        record["train_accuracy"] = round(self._right / self.n_rows, 6)
        judged, correct = self.judge_held_out()
        record |= judged
        self._progress.advance(0, accuracy=record["select_accuracy"])
        if self._alpha is not None:
            counts = np.bincount(self.loader.sets[SELECT].labels, minlength=self._n_classes)
            record["accuracy"] = next_accuracy(self._history, correct, counts)
            record["alpha"] = np.round(self._alpha, 6).tolist()
        return record

    @torch.inference_mode()
    def judge_held_out(self) -> tuple[Record, NDArray[np.int64]]:
        """By the held-out images as they are: a part of the record, and ``[C]`` how many of each class were right."""
        self.judged.eval()
        images, size = self.loader.sets[SELECT], self._judged_at_once
        rows = np.arange(len(images))[self._ranks.share]
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        asked: list[list[Key]] = [[(SELECT, int(row), None) for row in batch] for batch in batches]
        sums = torch.zeros(4, dtype=torch.float64, device=self._device)
        correct = torch.zeros(self._n_classes, dtype=torch.float64, device=self._device)
        for batch, (pixels, failures) in zip(batches, self._on_device(self.loader.batches(asked)), strict=True):
            sums[3] += len(failures)
            if failures:
                continue
            truth = to_device(torch.from_numpy(images.labels[batch]).long(), self._device)
            judged = self.judged.judge(filled(pixels, self._passes), truth)
            sums[:3] += torch.stack([judged.loss, judged.right.sum(), judged.arrived.sum()])
            correct.index_add_(0, truth, judged.known.double())
        self._ranks.add(correct)
        loss, right, arrived, unusable = self._ranks.add(sums).tolist()
        if unusable:
            raise UnusableImagesError
        if not math.isfinite(loss):
            raise NotFiniteLossError("the held-out loss")
        record = {"select_loss": round(loss / len(images), 6), "select_accuracy": round(right / len(images), 6)}
        if self.objective.groups is not None:
            record["router_accuracy"] = round(arrived / len(images), 6)
        return record, correct.long().cpu().numpy()
