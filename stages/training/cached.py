"""Training on cached features: batches of rows, and how experts and router learn from them."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cache import FeatureCache
from stages.context import Context
from stages.errors import StageError
from stages.id_data.rows import IdData, Labels, epoch_windows, not_finite, unit
from stages.id_data.split import Rows
from stages.id_data.tokens import read_tokens
from stages.mixture.mixup import Mixing, draw_mixing, interpolate, next_accuracy, next_alpha
from stages.mixture.model import MixtureOfFeatureExperts, soft_cross_entropy
from stages.mixture.refine import REFINE_BATCH
from stages.networks.tokens import Tokens
from stages.training.loop import Step
from stages.training.optim import follow, mixture_optimiser, warm_cosine
from stages.training.recipes import TrainSettings
from stages.training.run import Record


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
    mixing: list[float] | None = None  # mean of min(λ, 1 − λ) per class: 0 leaves rows alone, ½ is the strongest


class CachedBatch(NamedTuple):
    """Rows of one step.

    Attributes:
        number: in its epoch.
        rows: ascending, so that the shards are read forwards.
        done: epochs that were trained when it begins.
        length: of its step, in epochs.
    """

    number: int
    rows: Rows
    done: float
    length: float


class _Part(NamedTuple):
    """What one expert learns from a batch, rows counted in the batch; all but `inside` is this process's share."""

    expert: int
    inside: NDArray[np.int64]  # rows of its group, of all processes
    mixing: Mixing  # of all of them
    own: NDArray[np.int64]  # rows of its group
    partners: NDArray[np.int64]  # what each of `own` is mixed with
    lam: NDArray[np.float32]  # their λ
    other: NDArray[np.int64]  # rows of other groups


@dataclass
class _Sums:
    """What an epoch has counted so far.

    Attributes:
        mixing: ``[C]`` sum of min(λ, 1 − λ).
        load: ``[E]`` rows that each expert has learned from as its own.
        expert_loss, router_loss: sums over rows.
    """

    mixing: Tensor
    load: list[int]
    expert_loss: float = 0.0
    router_loss: float = 0.0


class CachedTrainer:
    """Trains a mixture on cached tokens; see `stages.training.loop.Trainer`.

    In-group rows go to their true group's expert (teacher forcing), mixed with each other; as many out-of-group rows
    of the same batch teach it "other" with weight ``other_weight``.

    Attributes:
        mixture: what is trained.
        judged: what is judged and kept: the moving average of the weights, or the mixture itself where ``ema`` is 0.
    """

    def __init__(
        self,
        mixture: MixtureOfFeatureExperts,
        data: IdData,
        rows: Rows,
        settings: TrainSettings,
        seed: int,
        context: Context,
    ) -> None:
        """Begin with a mixture as it is.

        Args:
            mixture: on the device where it is trained.
            data: ID features.
            rows: those of id-train that it learns from.
            settings: resolved.
            seed: all that is drawn is drawn from it and the number of the epoch.
            context: which processes train it together; told how experts are used and how well they do.
        """
        self.mixture, self.data, self.settings, self.seed = mixture, data, settings, seed
        self.n_rows, self.unit = len(rows), unit(data.train)
        self.judged = copy.deepcopy(mixture).requires_grad_(False).eval() if settings.ema else mixture
        self._rows, self._progress, self._ranks = rows, context.progress, context.ranks
        self._device = mixture.group.device
        self._optimiser = mixture_optimiser(mixture, settings)
        gpu = self._device.type == "cuda"
        mixed = settings.precision == "bfloat16" or (settings.precision == "auto" and gpu)
        # GPUs older than bfloat16 have float16, whose small gradients need a scale.
        half = torch.bfloat16 if not gpu or torch.cuda.is_bf16_supported() else torch.float16
        self._autocast = torch.autocast(self._device.type, dtype=half, enabled=mixed)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=mixed and half is torch.float16)
        self._steps = 0  # in all epochs
        self._epoch, self._history = 0, list[Record]()
        self._alpha = np.zeros(data.n_classes)
        self._rng = np.random.default_rng(seed)
        self._sums = _Sums(torch.zeros(0), [])

    # ------------------------------------------------------------------------------------------- what is stored

    def state(self) -> dict[str, Any]:
        """All that another process needs to go on to the same bits."""
        return {
            "mixture": self.mixture.state_dict(),
            "average": self.judged.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "scaler": self._scaler.state_dict(),
            "steps": self._steps,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.mixture.load_state_dict(state["mixture"])
        self.judged.load_state_dict(state["average"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._scaler.load_state_dict(state["scaler"])
        self._steps = state["steps"]

    def counted(self) -> dict[str, Any]:
        """The sums of the epoch, and where its random numbers are."""
        return vars(self._sums) | {"drawn": self._rng.bit_generator.state}

    def go_on(self, counted: Mapping[str, Any]) -> None:
        """Go on from what was `counted`."""
        sums = {name: counted[name] for name in vars(self._sums)}
        self._sums = _Sums(**sums | {"mixing": counted["mixing"].to(self._device)})
        self._rng.bit_generator.state = counted["drawn"]

    # ------------------------------------------------------------------------------------------- an epoch

    def plan(self, epoch: int, history: Sequence[Record]) -> list[CachedBatch]:
        """Begin an epoch: every row once, windows of them that fit into memory one after the other."""
        data, settings = self.data, self.settings
        self._epoch, self._history = epoch, list(history)
        self._alpha = next_alpha(history, data.n_classes, settings)
        self._sums = _Sums(torch.zeros(data.n_classes, device=self._device), [0] * self.mixture.n_experts)
        self._rng = np.random.default_rng((self.seed, epoch))
        stored, reads = data.train.spec.datasets(), self.mixture.config.reads
        row_bytes = sum(math.prod(stored[name][0]) * stored[name][1].itemsize for name in reads if name in stored)
        starts = [shard.start for shard in data.train.manifest.shards]
        # Batches as equal as can be, so that no small one at a window's end weighs as much as a whole one.
        batches = [
            batch
            for window in epoch_windows(self._rows, starts, row_bytes, self._rng)
            for batch in np.array_split(window, -(-len(window) // settings.batch_size))
        ]
        length = 1 / len(batches)
        self.mixture.train()
        return [
            CachedBatch(number, np.sort(batch), epoch + number / len(batches), length)
            for number, batch in enumerate(batches)
        ]

    def load(self, batches: Sequence[CachedBatch]) -> Iterator[CachedBatch]:
        """The batches: a step reads its tokens itself, once it is drawn which of them this process computes."""
        return iter(batches)

    def step(self, batch: CachedBatch) -> Step:
        """Learn from one batch; nothing is learned where a loss is not finite."""
        mixture, optimiser = self.mixture, self._optimiser
        losses = self._losses(batch.rows)
        optimiser.zero_grad(set_to_none=True)
        self._scaler.scale(losses.sum() / len(batch.rows)).backward()
        self._ranks.add_gradients(list(mixture.parameters()))
        step = Step(batch.rows, self._ranks.add(losses.detach().double()))
        if self.is_good(step):
            for group in optimiser.param_groups:
                group["lr"] = group["initial_lr"] * warm_cosine(self.settings, batch.done, batch.length)
            self._scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(mixture.parameters(), self.settings.gradient_clip)
            self._scaler.step(optimiser)
            self._scaler.update()
            if self.judged is not mixture:
                follow(self.judged, mixture, self.settings.ema, self._steps)
            self._steps += 1
        return step

    def is_good(self, step: Step) -> bool:
        """Whether both losses are numbers."""
        return all(map(math.isfinite, step.found.tolist()))

    def count(self, step: Step) -> float:
        """Count the losses of a step; gives their sum, a row.

        Raises:
            InputError: its features are not finite.
            StageError: its loss is not.
        """
        expert, router = step.found.tolist()
        if not self.is_good(step):
            _check_finite(self.data.train, step.rows, self.mixture.config.reads)
            raise StageError(
                f"train: the loss is not finite in epoch {self._epoch}: lower train.lr (now {self.settings.lr:g})"
            )
        self._sums.expert_loss += expert
        self._sums.router_loss += router
        return (expert + router) / len(step.rows)

    # ------------------------------------------------------------------------------------------- a step

    def _losses(self, rows: Rows) -> Tensor:
        """``[2]`` the experts' and the router's loss, summed over this process's share of a batch; counts its λ."""
        mixture, data = self.mixture, self.data
        labels = data.train_labels[rows]
        truth = torch.from_numpy(labels).long().to(self._device)
        parts = self._share(labels)
        for part in parts:
            self._sums.load[part.expert] += len(part.inside)
            lam = torch.from_numpy(part.mixing.lam).to(self._device)
            self._sums.mixing.index_add_(0, truth[part.inside], torch.minimum(lam, 1 - lam))
        needed = np.unique(np.concatenate([own for part in parts for own in (part.own, part.partners, part.other)]))
        tokens = read_tokens(data.train, rows[needed], self._device, mixture.config.reads)
        routed = np.sort(np.concatenate([part.own for part in parts]))
        with self._autocast:
            expert_loss = torch.zeros((), device=self._device)
            for part in parts:
                if len(part.own) + len(part.other):
                    first, second, other = (
                        tokens[np.searchsorted(needed, own)] for own in (part.own, part.partners, part.other)
                    )
                    both, targets = self._mixed(part, first, second, other, truth)
                    _, outputs = mixture.experts[part.expert](both)
                    expert_loss = expert_loss + soft_cross_entropy(outputs, targets)
            seen = tokens[np.searchsorted(needed, routed)]
            router_loss = nn.functional.cross_entropy(mixture.class_logits(seen), truth[routed], reduction="sum")
        return torch.stack([expert_loss, router_loss])

    def _share(self, labels: Labels) -> list[_Part]:
        """What each expert learns from a batch of rows with these labels, and which of it this process computes."""
        rng, group = self._rng, self.mixture.group.cpu().numpy()[labels]
        parts = []
        for expert in range(self.mixture.n_experts):
            inside, outside = np.flatnonzero(group == expert), np.flatnonzero(group != expert)
            if len(inside) == 0:
                continue
            outside = rng.permutation(outside)[: len(inside) if self.settings.other_weight else 0]
            mixing = draw_mixing(self._alpha[labels[inside]], rng)
            own = np.arange(len(inside) + len(outside))[self._ranks.share]
            mine, others = own[own < len(inside)], own[own >= len(inside)] - len(inside)
            drawn = Mixing(mixing.lam[mine], mixing.partner[mine])
            parts.append(_Part(expert, inside, mixing, inside[mine], inside[drawn.partner], drawn.lam, outside[others]))
        return parts

    def _mixed(self, part: _Part, first: Tokens, second: Tokens, other: Tokens, truth: Tensor) -> tuple[Tokens, Tensor]:
        """An expert's own rows mixed with their partners, and rows of other groups as they are, with soft targets."""
        mixture, settings = self.mixture, self.settings
        lam = torch.from_numpy(part.lam).to(self._device)
        mixed = first.combine(second, lambda x, y: interpolate(x, y, lam))
        own, partners = (
            mixture.class_targets(truth[rows], part.expert, settings.label_smoothing)
            for rows in (part.own, part.partners)
        )
        targets = interpolate(own, partners, lam)
        if len(part.other) == 0:
            return mixed, targets
        weighted = settings.other_weight * mixture.class_targets(truth[part.other], part.expert)
        return mixed.concatenate(other), torch.cat([targets, weighted])

    # ------------------------------------------------------------------------------------------- what it came to

    def judge(self) -> Record:
        """End the epoch: its losses, and what unmixed held-out rows say in evaluation mode."""
        sums, n = self._sums, self.n_rows
        counts = np.bincount(self.data.train_labels[self._rows], minlength=self.data.n_classes)
        self._progress.advance(0, load="/".join(map(str, sums.load)))
        record = EpochRecord(
            epoch=self._epoch,
            loss=round(sums.expert_loss / n + sums.router_loss / n, 6),
            expert_loss=round(sums.expert_loss / n, 6),
            router_loss=round(sums.router_loss / n, 6),
            lr=self._optimiser.param_groups[0]["lr"],
            load=sums.load,
            alpha=[round(float(a), 6) for a in self._alpha],
            mixing=np.round(sums.mixing.cpu().numpy() / np.maximum(counts, 1), 6).tolist(),
        )
        self.judge_held_out(record)
        self._progress.advance(0, accuracy=record.select_accuracy, router=record.router_accuracy)
        return asdict(record)

    @torch.inference_mode()
    def judge_held_out(self, record: EpochRecord) -> None:
        """Fill in what select rows say: loss, accuracy, and the running accuracy per class."""
        network, data, select = self.judged.eval(), self.data, self.data.split.select
        labels, reads = data.held_out_labels, network.config.reads
        correct = torch.zeros(data.n_classes, dtype=torch.float64, device=self._device)
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)  # right and arrived, arrived, loss
        for batch in _batches_of(select[self._ranks.share]):
            tokens = read_tokens(data.held_out, batch, self._device, reads)
            truth = torch.from_numpy(labels[batch]).long().to(self._device)
            with self._autocast:
                out = network(tokens, network.group[truth])
                loss = nn.functional.cross_entropy(out.logits, truth, reduction="sum")
                loss = loss + nn.functional.cross_entropy(network.class_logits(tokens), truth, reduction="sum")
            right = out.logits.argmax(1) == truth
            arrived = out.gate.argmax(1) == network.group[truth]
            correct += torch.bincount(truth[right], minlength=data.n_classes)
            sums += torch.stack([(right & arrived).sum(), arrived.sum(), loss])
        self._ranks.add(correct)
        both, arrivals, loss_sum = self._ranks.add(sums).tolist()
        if not math.isfinite(loss_sum):
            for batch in _batches_of(select):
                _check_finite(data.held_out, batch, reads)
            raise StageError(f"train: the held-out loss is not finite after epoch {record.epoch}: lower train.lr")
        record.select_loss = round(loss_sum / len(select), 6)
        record.select_accuracy = round(both / len(select), 6)
        record.router_accuracy = round(arrivals / len(select), 6)
        counts = np.bincount(labels[select], minlength=data.n_classes)
        record.accuracy = next_accuracy(self._history, correct.cpu().numpy(), counts)


def _batches_of(rows: Rows) -> Iterator[Rows]:
    """Rows to judge by, some at a time."""
    for start in range(0, len(rows), REFINE_BATCH):
        yield rows[start : start + REFINE_BATCH]


def _check_finite(cache: FeatureCache, rows: Rows, reads: Sequence[str]) -> None:
    """Say which image it is where the features are to blame for a loss that is not finite."""
    for name, values in vars(read_tokens(cache, rows, reads=reads)).items():
        if not torch.isfinite(values).all():
            raise not_finite(cache, rows, values.numpy(), name)
