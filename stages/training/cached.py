"""Training on cached features: batches of rows, and how experts and router learn from them."""

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cache import FeatureCache
from stages.context import Context
from stages.errors import StageError
from stages.id_data.rows import IdData, Labels, epoch_windows, not_finite, unit
from stages.id_data.split import Rows
from stages.id_data.tokens import as_tokens, bytes_of_row, read_tokens, stored_tokens
from stages.mixture.mixup import interpolate, next_accuracy, next_alpha
from stages.mixture.model import MixtureOfFeatureExperts, soft_cross_entropy
from stages.mixture.refine import REFINE_BATCH
from stages.networks.repeatable import Backward
from stages.networks.tokens import Tokens
from stages.networks.transfer import Fetched, Tensors, array_for, sent_ahead
from stages.training.expert_rows import Draw, draw_rows
from stages.training.loop import Step
from stages.training.optim import PullToStart, follow, mixture_optimiser, rate_share, warm_cosine
from stages.training.recipes import TrainSettings
from stages.training.run import Record


@dataclass
class EpochRecord:
    """A line of ``metrics.jsonl``."""

    epoch: int  # from 0; −1 is the start, of which there is nothing but what held-out rows say
    loss: float | None
    expert_loss: float | None
    router_loss: float | None
    lr: float | None
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


class DrawnBatch(NamedTuple):
    """A batch on the device where it is learnt from.

    Attributes:
        batch: its rows.
        draw: what each expert learns from them.
        columns: their tokens as they are stored, and what is sent of the draw.
    """

    batch: CachedBatch
    draw: Draw
    columns: Tensors


@dataclass
class _Sums:
    """What an epoch has counted so far.

    Attributes:
        mixing: ``[C]`` sum of min(λ, 1 − λ), on the host, where λ is drawn.
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
        self._outputs = mixture.outputs.to("cpu")
        self._group = self._outputs.group.numpy()
        self._parameters, self._averaged = list(mixture.parameters()), list(self.judged.parameters())
        self._backward = Backward(self._parameters)
        self._optimiser = mixture_optimiser(mixture, settings)
        self._pull = PullToStart(mixture, settings.l2_sp)
        gpu = self._device.type == "cuda"
        mixed = settings.precision == "bfloat16" or (settings.precision == "auto" and gpu)
        # GPUs older than bfloat16 have float16, whose small gradients need a scale.
        half = torch.bfloat16 if not gpu or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        self._autocast = torch.autocast(self._device.type, dtype=half, enabled=mixed)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=mixed and half is torch.float16)
        self._steps = 0  # in all epochs
        self._epoch, self._history = 0, list[Record]()
        self._alpha = np.zeros(data.n_classes)
        self._rng = np.random.default_rng(seed)
        self._drawn: dict[str, Any] = {}  # where it was when what the last step learnt from was drawn
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
        return vars(self._sums) | {"drawn": self._drawn}

    def go_on(self, counted: Mapping[str, Any]) -> None:
        """Go on from what was `counted`."""
        self._sums = _Sums(**{name: counted[name] for name in vars(self._sums)})
        self._rng.bit_generator.state = self._drawn = counted["drawn"]

    # ------------------------------------------------------------------------------------------- an epoch

    def plan(self, epoch: int, history: Sequence[Record]) -> list[CachedBatch]:
        """Begin an epoch: every row once, windows of them that fit into memory one after the other."""
        data, settings = self.data, self.settings
        self._epoch, self._history = epoch, list(history)
        self._alpha = next_alpha(history, data.n_classes, settings)
        self._sums = _Sums(torch.zeros(data.n_classes), [0] * self.mixture.n_experts)
        self._rng = np.random.default_rng((self.seed, epoch))
        row_bytes = bytes_of_row(data.train, self.mixture.config.reads)
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

    def load(self, batches: Sequence[CachedBatch]) -> Iterator[DrawnBatch]:
        """The batches, drawn in this order, with their tokens; for a GPU the next are read while it computes."""
        data, reads, share = self.data, self.mixture.config.reads, self._ranks.share
        drawn: deque[tuple[CachedBatch, Draw]] = deque()
        new = array_for(self._device)

        def read(rows: Rows, draw: Draw, labels: Labels) -> Tensors:
            columns = draw.columns(labels)
            return stored_tokens(data.train, rows, reads, new) | columns | {"targets": self._targets(draw, columns)}

        def jobs() -> Iterator[Callable[[], Tensors]]:
            for batch in batches:
                labels = data.train_labels[batch.rows]
                others = self.settings.other_weight > 0
                draw = draw_rows(labels, self._group, self._alpha, share, others, self._rng)
                drawn.append((batch, draw))
                yield partial(read, batch.rows[draw.needed], draw, labels)

        for columns in sent_ahead(jobs(), self._device):
            yield DrawnBatch(*drawn.popleft(), columns)

    def step(self, loaded: DrawnBatch) -> Step:
        """Learn from one batch. Whether its loss was a number is looked at a step later: `count` then ends the run."""
        mixture, optimiser, batch = self.mixture, self._optimiser, loaded.batch
        self._drawn = loaded.draw.state
        self._count_draw(batch.rows, loaded.draw)
        optimiser.zero_grad(set_to_none=True)
        losses = self._backward(lambda: self._forward(loaded))
        self._ranks.add_gradients(self._parameters)
        rate = rate_share(self.settings, batch.length) * warm_cosine(self.settings, batch.done, batch.length)
        for group in optimiser.param_groups:
            group["lr"] = group["initial_lr"] * rate
        self._scaler.unscale_(optimiser)
        self._pull.add_gradients()
        nn.utils.clip_grad_norm_(self._parameters, self.settings.gradient_clip)
        self._scaler.step(optimiser)
        self._scaler.update()
        if self.judged is not mixture:
            follow(self._averaged, self._parameters, self.settings.ema, self._steps)
        self._steps += 1
        return Step(batch.rows, Fetched(self._ranks.add(losses)))

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

    def _count_draw(self, rows: Rows, draw: Draw) -> None:
        for part in draw.parts:
            self._sums.load[part.expert] += len(part.inside)
            lam, labels = torch.from_numpy(part.mixing.lam), self.data.train_labels[rows[part.inside]]
            self._sums.mixing.index_add_(0, torch.from_numpy(labels).long(), torch.minimum(lam, 1 - lam))

    def _forward(self, loaded: DrawnBatch) -> tuple[Tensor, Tensor]:
        """What is minimised, and ``[2]`` the experts' and the router's loss over this process's share, summed."""
        mixture, tokens = self.mixture, as_tokens(loaded.columns)
        truth, targets = loaded.columns["truth"], loaded.columns["targets"]
        rows = loaded.draw.placed(loaded.columns, mixture.n_experts)

        def mixed(at: Any) -> Tokens:
            lam = rows.lam[at]
            return tokens[rows.own[at]].combine(tokens[rows.partners[at]], lambda x, y: interpolate(x, y, lam))

        with self._autocast:
            expert_loss = torch.zeros((), device=self._device)
            for made in mixture.refine(rows.counts, mixed):
                own = targets[made.rows, : made.outputs.shape[1]]
                expert_loss = expert_loss + soft_cross_entropy(made.outputs, own)
            logits = mixture.class_logits(tokens[rows.routed])
            router_loss = nn.functional.cross_entropy(logits, truth[rows.routed], reduction="sum")
        losses = torch.stack([expert_loss, router_loss])
        return self._scaler.scale(losses.sum() / len(loaded.batch.rows)), losses.detach().double()

    def _targets(self, draw: Draw, columns: Tensors) -> Tensor:
        """``[n, O]`` soft targets of the rows that experts learn from, as far as they weigh; made on the host.

        They are many small operations, each of which a GPU would take longer to be given than a core to do.
        """
        outputs, settings, truth = self._outputs, self.settings, columns["truth"]
        rows = draw.placed(columns, len(outputs.n_outputs))
        own, partners = (
            outputs.class_targets(truth[numbers], rows.expert, settings.label_smoothing)
            for numbers in (rows.own, rows.partners)
        )
        other = settings.other_weight * outputs.class_targets(truth[rows.own], rows.expert)
        return torch.where(rows.is_other[:, None], other, interpolate(own, partners, rows.lam))

    # ------------------------------------------------------------------------------------------- what it came to

    def judge_start(self) -> Record:
        """What held-out rows say of the mixture before it has learned anything, as the record of epoch −1."""
        self._epoch, self._history = -1, []
        record = EpochRecord(-1, None, None, None, None, [0] * self.mixture.n_experts)
        self.judge_held_out(record)
        return asdict(record)

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
            mixing=np.round(sums.mixing.numpy() / np.maximum(counts, 1), 6).tolist(),
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

        new = array_for(self._device)

        def read(batch: Rows) -> Tensors:
            truth = torch.from_numpy(labels[batch]).long()
            return stored_tokens(data.held_out, batch, reads, new) | {"truth": truth}

        jobs = (partial(read, batch) for batch in _batches_of(select[self._ranks.share]))
        for columns in sent_ahead(jobs, self._device):
            tokens, truth = as_tokens(columns), columns["truth"]
            with self._autocast:
                out = network(tokens, network.group[truth])
                loss = nn.functional.cross_entropy(out.logits, truth, reduction="sum")
                loss = loss + nn.functional.cross_entropy(network.class_logits(tokens), truth, reduction="sum")
            right = out.logits.argmax(1) == truth
            arrived = out.gate.argmax(1) == network.group[truth]
            correct.index_add_(0, truth, right.double())
            sums += torch.stack([(right & arrived).sum(), arrived.sum(), loss])
        self._ranks.add(correct)
        both, arrivals, loss_sum = self._ranks.add(sums).tolist()
        if not math.isfinite(loss_sum):
            for batch in _batches_of(select):
                _check_finite(data.held_out, batch, reads)
            if record.epoch < 0:
                raise StageError("train: the held-out loss is not finite before anything is learnt: scale the features")
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
