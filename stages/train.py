"""Verb: stage two on cached features. The linear probe, and the Mixture of Feature Experts with its refitted heads.

No image is opened and no backbone runs: experts start from the backbone's own end and read cached tokens.
"""

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cache import FeatureCache, FeatureSpec
from cache.fingerprint import fingerprint
from stages.config import ExpertKind, RouterInput, TrainConfig
from stages.context import Context
from stages.errors import InputError, StageError
from stages.files.documents import digest_of, read_document, read_whole, write_document, write_text
from stages.heads.choose import (
    STRENGTHS,
    ChosenHead,
    FitRows,
    FittedHeads,
    HeadRows,
    choose_head,
    fit_heads,
    load_heads,
    save_heads,
)
from stages.id_data.lazy import LazyArray, Rows2D
from stages.id_data.rows import IdData, Labels, epoch_windows, lazy_rows, not_finite, read_blocks, read_tokens, unit
from stages.id_data.split import Rows
from stages.mixture.config import MixtureConfig
from stages.mixture.grouping import experts_for, group_training_classes, grouping_content, numbers_as_in
from stages.mixture.mixup import Mixing, class_alpha, draw_mixing, interpolate, running_accuracy
from stages.mixture.model import (
    Expert,
    MixtureOfFeatureExperts,
    build_mixture,
    cannot_read,
    soft_cross_entropy,
)
from stages.mixture.refine import (
    LEFT_OUT,
    REFINE_BATCH,
    PartBank,
    Refined,
    Routes,
    load_refined,
    part_bank,
    refine_to,
    refined_digest,
    refined_identity,
    refined_path,
    training_routes,
)
from stages.mixture.storage import load_mixture, run_folder, save_weights
from stages.networks.end_check import runs_on
from stages.networks.tokens import Tokens
from stages.progress import NullProgress, Progress
from stages.training.checkpoint import Checkpoints, load_checkpoint
from stages.training.distributed import current
from stages.training.tensorboard import require_tensorboard, scalar_log, scalars_of_metrics

TRAIN_SEMANTICS = 5  # raise it when the same settings would train another model


@dataclass(frozen=True)
class TrainSettings:
    """`TrainConfig` with every default filled in."""

    experts: int
    grouping: str
    mixup: str
    epochs: int = 8  # with these rates the held-out ID loss is lowest after four to seven
    expert: ExpertKind = "end"
    router_input: RouterInput = "tap_cls"
    patience: int | None = None
    batch_size: int = 64
    lr: float = 1e-5  # of the experts' ends, which start from trained weights: three times more costs far-OOD
    head_lr: float = 1e-2  # new layers; with a tenth of it they lag, and what they teach the ends is late
    router_lr: float = 1e-2
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    other_weight: float = 0.1
    warmup_epochs: float = 1.0
    alpha_min: float = 0.1
    alpha_max: float = 0.8
    alpha_power: float = 1.0
    gradient_clip: float = 1.0
    ema: float = 0.99  # decay of the moving average of the weights
    precision: Literal["auto", "float32", "bfloat16"] = "auto"


# The official code's recipe, where METHOD-relevant settings differ from ours; its α_min = α_max is not copied, since
# with it the difficulty of a class cannot matter. It keeps no average of the weights.
PAPER = {"epochs": 20, "label_smoothing": 0.1, "lr": 3.5e-5, "head_lr": 3.5e-5, "router_lr": 3.5e-5, "ema": 0.0}

# Keys of [train] that say how or where to work, or stand for others; the result is the same whatever they are.
_NOT_SETTINGS = {"preset", "tensorboard"}


def resolve_settings(config: TrainConfig, n_classes: int, spec: FeatureSpec | None = None) -> TrainSettings:
    """Fill in the preset's values.

    Args:
        config: as the experiment has it.
        n_classes: C.
        spec: what there is to train on; by default all tokens, and a backbone whose end reads them.

    Raises:
        InputError: ``alpha_min`` not below ``alpha_max`` with dynamic mixup; experts that need tokens, or the end of a
            backbone, where there is none.
    """
    given = {k: v for k, v in config.model_dump().items() if v is not None and k not in _NOT_SETTINGS}
    has_end, has_tap = (spec is None or spec.expert_blocks > 0), (spec is None or spec.tap_dim > 0)
    if given["expert"] == "auto":
        given["expert"] = "end" if has_end else "adapter"
    if given["router_input"] == "auto":
        given["router_input"] = "tap_cls" if has_tap else "cls"
    if given["expert"] in ("end", "dense") and not has_end:
        raise InputError(
            f'train.expert: "{given["expert"]}" is made of copies of a backbone\'s end, which read tokens: give '
            'features with tap_cls and patches and a [backbone], or take "adapter"'
        )
    if given["router_input"] == "tap_cls" and not has_tap:
        raise InputError('train.router_input: the features have no tap_cls: give it, or take "cls"')
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
    mixing: list[float] | None = None  # mean of min(λ, 1 − λ) per class: 0 leaves rows alone, ½ is the strongest


@dataclass(frozen=True)
class TrainedMixture:
    """A trained model, on the CPU, with its history and the epoch that it is from."""

    mixture: MixtureOfFeatureExperts
    history: list[EpochRecord]
    best_epoch: int


def train_mixture(
    data: IdData,
    rows: Rows,
    select: Rows,
    groups: Sequence[int],
    settings: TrainSettings,
    make_end: Callable[[], nn.Module],
    seed: int,
    checkpoint: Path,
    progress: Progress | None = None,
    device: str = "cpu",
) -> TrainedMixture:
    """Train experts and router on cached tokens.

    In-group rows go to their true group's expert (teacher forcing), mixed with each other; as many out-of-group rows
    of the same batch teach it "other" with weight ``other_weight``. Killed, it goes on where it was stored last, to the
    same bits. Processes that are joined (`stages.training.distributed`) train one mixture together: all give the same
    arguments.

    Args:
        data: ID features.
        rows: training rows of id-train.
        select: rows of the held-out set that stop early and measure difficulty.
        groups: ``[C]`` group of each class.
        settings: resolved.
        make_end: gives a fresh copy of the backbone's end.
        seed: fixes order, partners and λ; all is drawn anew from (seed, epoch), so a resumed run is the same run.
        checkpoint: file that a killed run goes on from, stored after an epoch and within a long one, though not so
            often that it slows the training (`Checkpoints`); left to the caller to remove.
        progress: counts images.
        device: where to train; on ``"cuda"`` in mixed precision, unless the settings say otherwise.

    Raises:
        InputError: features that are not finite, or that the experts cannot run on.
        StageError: the loss is not finite.
    """
    ranks = current()
    progress = progress if progress is not None and ranks.first else NullProgress()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        spec, kind, reads = data.train.spec, settings.expert, settings.router_input
        config = MixtureConfig(spec.cls_dim, spec.tap_dim, tuple(groups), kind, reads, settings.experts)
        mixture = build_mixture(config, make_end)
    _check_experts(mixture, data.train, rows)
    mixture.router.standardise(
        torch.from_numpy(values) for _, values in read_blocks(data.train, settings.router_input, rows)
    )
    training = _Training(mixture.to(device), data, settings, progress)
    history: list[EpochRecord] = []
    best: dict[str, Tensor] = {}
    begun = training.begin()
    stored = ranks.agree(load_checkpoint(checkpoint, say=progress.note) if ranks.first else None)
    if stored is not None:
        training.restore(stored["training"])
        best = stored["best"]
        history = [EpochRecord(**record) for record in stored["history"]]
        begun = _Begun(**stored["begun"])
    progress.start(
        settings.epochs * len(rows), unit(data.train), f"train {checkpoint.stem.rpartition('-')[0]}, seed {seed}"
    )
    progress.advance(len(history) * len(rows))
    accuracy = np.asarray(history[-1].accuracy) if history and history[-1].accuracy is not None else None
    store = Checkpoints(checkpoint) if ranks.first else None

    def keep() -> None:
        assert store is not None
        records = [asdict(record) for record in history]
        store.save({"training": training.state(), "best": best, "history": records, "begun": asdict(begun)})

    def keep_within_epoch() -> None:
        if store is not None and store.overdue:
            keep()

    while not _done(history, settings):
        epoch = len(history)
        alpha = (
            np.full(data.n_classes, settings.alpha_min)
            if accuracy is None
            else class_alpha(accuracy, settings.alpha_min, settings.alpha_max, settings.alpha_power)
        )
        record = training.epoch(rows, alpha, seed, epoch, begun, keep_within_epoch)
        begun = training.begin()
        # Rounded as the record has it: a resumed run reads it there, and must go on with the same numbers.
        accuracy = np.round(training.evaluate(select, accuracy, record), 6)
        record.accuracy = accuracy.tolist()
        history.append(record)
        if _best_epoch(history) == epoch:
            best = {name: tensor.cpu().clone() for name, tensor in training.average.state_dict().items()}
        if store is not None and (store.due or _done(history, settings)):
            keep()
    progress.close()
    mixture.to("cpu").load_state_dict(best)
    return TrainedMixture(mixture.eval(), history, _best_epoch(history))


def _best_epoch(history: list[EpochRecord]) -> int:
    """The first of the epochs with the lowest held-out loss."""
    return int(np.argmin([record.select_loss for record in history if record.select_loss is not None]))


def _done(history: list[EpochRecord], settings: TrainSettings) -> bool:
    """Whether every epoch was trained, or patience has run out."""
    if len(history) >= settings.epochs:
        return True
    if settings.patience is None or not history:
        return False
    return len(history) - 1 - _best_epoch(history) >= settings.patience


@dataclass
class _Begun:
    """How far an epoch is, and what it has counted so far.

    Attributes:
        mixing: ``[C]`` sum of min(λ, 1 − λ).
        load: ``[E]`` rows that each expert has learned from as its own.
        steps: that were taken.
        expert_loss, router_loss: sums over rows.
        drawn: state of the random generator after the last step; None before the first.
    """

    mixing: Tensor
    load: list[int]
    steps: int = 0
    expert_loss: float = 0.0
    router_loss: float = 0.0
    drawn: Mapping[str, Any] | None = None


class _Part(NamedTuple):
    """What one expert learns from a batch, rows counted in the batch; all but `inside` is this process's share."""

    expert: int
    inside: NDArray[np.int64]  # rows of its group, of all processes
    mixing: Mixing  # of all of them
    own: NDArray[np.int64]  # rows of its group
    partners: NDArray[np.int64]  # what each of `own` is mixed with
    lam: NDArray[np.float32]  # their λ
    other: NDArray[np.int64]  # rows of other groups


class _Training:
    """A mixture while it is trained: its weights, their moving average, and the optimiser.

    Attributes:
        mixture: what is trained.
        average: what is judged and kept: the moving average of the weights, or the mixture itself where ``ema`` is 0.
    """

    def __init__(
        self, mixture: MixtureOfFeatureExperts, data: IdData, settings: TrainSettings, progress: Progress
    ) -> None:
        self.mixture, self.data, self.settings, self.progress = mixture, data, settings, progress
        self.average = copy.deepcopy(mixture).requires_grad_(False).eval() if settings.ema else mixture
        self.steps = 0
        self.ranks = current()
        self.device = mixture.group.device
        parameters = _parameter_groups(mixture, settings)
        self.optimiser = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay, fused=True)
        gpu = self.device.type == "cuda"
        mixed = settings.precision == "bfloat16" or (settings.precision == "auto" and gpu)
        # GPUs older than bfloat16 have float16, whose small gradients need a scale.
        half = torch.bfloat16 if not gpu or torch.cuda.is_bf16_supported() else torch.float16
        self.autocast = torch.autocast(self.device.type, dtype=half, enabled=mixed)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=mixed and half is torch.float16)

    def state(self) -> dict[str, Any]:
        """All that another process needs to go on to the same bits."""
        return {
            "mixture": self.mixture.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "steps": self.steps,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.mixture.load_state_dict(state["mixture"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps = state["steps"]

    def begin(self) -> _Begun:
        """An epoch without a step."""
        return _Begun(torch.zeros(self.data.n_classes), [0] * self.mixture.n_experts)

    def epoch(
        self,
        rows: Rows,
        alpha: NDArray[np.float64],
        seed: int,
        epoch: int,
        begun: _Begun,
        before_step: Callable[[], None],
    ) -> EpochRecord:
        """Train on every row once, or on those that are left of the epoch, mixing by α per class ``[C]``.

        Counts in `begun`, which is whole whenever `before_step` is called.
        """
        data, settings = self.data, self.settings
        rng = np.random.default_rng((seed, epoch))
        stored, reads = data.train.spec.datasets(), self.mixture.config.reads
        row_bytes = sum(math.prod(stored[name][0]) * stored[name][1].itemsize for name in reads if name in stored)
        windows = epoch_windows(rows, [shard.start for shard in data.train.manifest.shards], row_bytes, rng)
        # Batches as equal as can be, so that no small one at a window's end weighs as much as a whole one.
        batches = [
            batch for window in windows for batch in np.array_split(window, -(-len(window) // settings.batch_size))
        ]
        begun.mixing = begun.mixing.to(self.device)
        self.progress.advance(sum(map(len, batches[: begun.steps])))
        if begun.drawn is not None:
            rng.bit_generator.state = begun.drawn
        self.mixture.train()
        for index in range(begun.steps, len(batches)):
            before_step()
            batch = np.sort(batches[index])  # sorted rows read the shards forwards
            lr = _lr_factor(settings, epoch + index / len(batches), 1 / len(batches))
            losses = self._step(batch, alpha, lr, rng, begun)
            if not all(map(math.isfinite, losses)):
                _check_finite(data.train, batch, self.mixture.config.reads)
                raise StageError(
                    f"train: the loss is not finite in epoch {epoch}: lower train.lr (now {settings.lr:g})"
                )
            begun.steps += 1
            begun.expert_loss, begun.router_loss = begun.expert_loss + losses[0], begun.router_loss + losses[1]
            begun.drawn = rng.bit_generator.state
            self.progress.advance(len(batch), epoch=epoch, loss=sum(losses) / len(batch))
        expert_mean, router_mean = begun.expert_loss / len(rows), begun.router_loss / len(rows)
        counts = np.bincount(data.train_labels[rows], minlength=data.n_classes)
        self.progress.advance(0, load="/".join(map(str, begun.load)))
        return EpochRecord(
            epoch=epoch,
            loss=round(expert_mean + router_mean, 6),
            expert_loss=round(expert_mean, 6),
            router_loss=round(router_mean, 6),
            lr=self.optimiser.param_groups[0]["lr"],
            load=begun.load,
            alpha=[round(float(a), 6) for a in alpha],
            mixing=np.round(begun.mixing.cpu().numpy() / np.maximum(counts, 1), 6).tolist(),
        )

    def _step(
        self,
        batch: Rows,
        alpha: NDArray[np.float64],
        lr: float,
        rng: np.random.Generator,
        begun: _Begun,
    ) -> tuple[float, float]:
        """Learn from one batch; counts rows and λ in `begun`. Returns the experts' and router's loss.

        Nothing is learned where a loss is not finite.
        """
        mixture, settings, data = self.mixture, self.settings, self.data
        labels = data.train_labels[batch]
        truth = torch.from_numpy(labels).long().to(self.device)
        parts = self._share(labels, alpha, rng)
        for part in parts:
            begun.load[part.expert] += len(part.inside)
            lam = torch.from_numpy(part.mixing.lam).to(self.device)
            begun.mixing.index_add_(0, truth[part.inside], torch.minimum(lam, 1 - lam))
        needed = np.unique(np.concatenate([rows for part in parts for rows in (part.own, part.partners, part.other)]))
        tokens = read_tokens(data.train, batch[needed], self.device, mixture.config.reads)
        routed = np.sort(np.concatenate([part.own for part in parts]))
        with self.autocast:
            expert_loss = torch.zeros((), device=self.device)
            for part in parts:
                if len(part.own) + len(part.other):
                    first, second, other = (
                        tokens[np.searchsorted(needed, rows)] for rows in (part.own, part.partners, part.other)
                    )
                    both, targets = self._mixed(part, first, second, other, truth)
                    _, outputs = mixture.experts[part.expert](both)
                    expert_loss = expert_loss + soft_cross_entropy(outputs, targets)
            seen = tokens[np.searchsorted(needed, routed)]
            router_loss = nn.functional.cross_entropy(mixture.class_logits(seen), truth[routed], reduction="sum")
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale((expert_loss + router_loss) / len(labels)).backward()
        self.ranks.add_gradients(list(mixture.parameters()))
        expert, router = self.ranks.add(torch.stack([expert_loss, router_loss]).detach().double()).tolist()
        if math.isfinite(expert) and math.isfinite(router):
            for parameters in self.optimiser.param_groups:
                parameters["lr"] = parameters["initial_lr"] * lr
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(mixture.parameters(), settings.gradient_clip)
            self.scaler.step(self.optimiser)
            self.scaler.update()
            self._follow()
        return expert, router

    def _share(self, labels: Labels, alpha: NDArray[np.float64], rng: np.random.Generator) -> list[_Part]:
        """What each expert learns from a batch of rows with these labels, and which of it this process computes."""
        group = self.mixture.group.cpu().numpy()[labels]
        parts = []
        for expert in range(self.mixture.n_experts):
            inside, outside = np.flatnonzero(group == expert), np.flatnonzero(group != expert)
            if len(inside) == 0:
                continue
            outside = rng.permutation(outside)[: len(inside) if self.settings.other_weight else 0]
            mixing = draw_mixing(alpha[labels[inside]], rng)
            own = np.arange(len(inside) + len(outside))[self.ranks.share]
            mine, others = own[own < len(inside)], own[own >= len(inside)] - len(inside)
            drawn = Mixing(mixing.lam[mine], mixing.partner[mine])
            parts.append(_Part(expert, inside, mixing, inside[mine], inside[drawn.partner], drawn.lam, outside[others]))
        return parts

    def _mixed(self, part: _Part, first: Tokens, second: Tokens, other: Tokens, truth: Tensor) -> tuple[Tokens, Tensor]:
        """An expert's own rows mixed with their partners, and rows of other groups as they are, with soft targets."""
        mixture, settings = self.mixture, self.settings
        lam = torch.from_numpy(part.lam).to(self.device)
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

    @torch.no_grad()
    def _follow(self) -> None:
        """Draw the average after the weights; young, it forgets faster. Buffers are frozen: none is averaged."""
        if self.average is not self.mixture:
            decay = min(self.settings.ema, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(list(self.average.parameters()), list(self.mixture.parameters()), 1 - decay)
        self.steps += 1

    @torch.inference_mode()
    def evaluate(self, select: Rows, accuracy: NDArray[np.float64] | None, record: EpochRecord) -> NDArray[np.float64]:
        """Judge by unmixed held-out rows in evaluation mode: fills `record`, returns the running accuracy per class."""
        network, labels = self.average.eval(), self.data.held_out_labels
        n_classes = self.data.n_classes
        correct = torch.zeros(n_classes, dtype=torch.float64, device=self.device)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # right and arrived, arrived, loss
        own = select[self.ranks.share]
        for start in range(0, len(own), REFINE_BATCH):
            batch = own[start : start + REFINE_BATCH]
            tokens = read_tokens(self.data.held_out, batch, self.device, network.config.reads)
            truth = torch.from_numpy(labels[batch]).long().to(self.device)
            with self.autocast:
                out = network(tokens, network.group[truth])
                loss = nn.functional.cross_entropy(out.logits, truth, reduction="sum")
                loss = loss + nn.functional.cross_entropy(network.class_logits(tokens), truth, reduction="sum")
            right = out.logits.argmax(1) == truth
            arrived = out.gate.argmax(1) == network.group[truth]
            correct += torch.bincount(truth[right], minlength=n_classes)
            sums += torch.stack([(right & arrived).sum(), arrived.sum(), loss])
        self.ranks.add(correct)
        both, arrivals, loss_sum = self.ranks.add(sums).tolist()
        if not math.isfinite(loss_sum):
            for start in range(0, len(select), REFINE_BATCH):
                _check_finite(self.data.held_out, select[start : start + REFINE_BATCH], network.config.reads)
            raise StageError(f"train: the held-out loss is not finite after epoch {record.epoch}: lower train.lr")
        record.select_loss = round(loss_sum / len(select), 6)
        record.select_accuracy = round(both / len(select), 6)
        record.router_accuracy = round(arrivals / len(select), 6)
        self.progress.advance(0, accuracy=record.select_accuracy, router=record.router_accuracy)
        counts = np.bincount(labels[select], minlength=n_classes)
        return running_accuracy(accuracy, correct.cpu().numpy(), counts)


def _check_experts(mixture: MixtureOfFeatureExperts, cache: FeatureCache, rows: Rows) -> None:
    """Refuse experts that cannot run on the patches that were cached, or that see nothing in them."""
    if cache.spec.patches == "full" or mixture.config.kind not in ("end", "dense"):
        return
    if not runs_on(cast(Expert, mixture.experts[0]).end, read_tokens(cache, rows[:8])):
        raise cannot_read(mixture.config.kind, cache.spec.backbone, cache.spec.patches)


def _check_finite(cache: FeatureCache, rows: Rows, reads: Sequence[str]) -> None:
    """Say which image it is where the features are to blame for a loss that is not finite."""
    for name, values in vars(read_tokens(cache, rows, reads=reads)).items():
        if not torch.isfinite(values).all():
            raise not_finite(cache, rows, values.numpy(), name)


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
        {"params": parameters, "lr": lr, "initial_lr": lr} | ({} if decay else {"weight_decay": 0.0})
        for (lr, decay), parameters in groups.items()
    ]


def _lr_factor(settings: TrainSettings, done: float, step: float) -> float:
    """Linear warm-up, then a cosine to zero; `done` and the length of a step are counted in epochs."""
    if done < settings.warmup_epochs:
        return (done + step) / (settings.warmup_epochs + step)
    return 0.5 * (1 + math.cos(math.pi * (done - settings.warmup_epochs) / (settings.epochs - settings.warmup_epochs)))


# ------------------------------------------------------------------------------------------- the whole of stage two


def train_probe(data: IdData, folder: Path) -> FittedHeads:
    """Fit the linear probe on frozen ``cls``, or read it where it is fresh.

    Writes ``probe.safetensors`` and, last, ``probe.json``. Of processes that are joined, rank 0 fits and the others
    wait.

    Raises:
        PeerLostError: rank 0 has ended.
    """
    ranks = current()
    fitted = _fitted_probe(data, folder) if ranks.first else None
    ranks.agree(None)  # nobody goes on before the files are there
    return _fitted_probe(data, folder) if fitted is None else fitted


def _fitted_probe(data: IdData, folder: Path) -> FittedHeads:
    identity = fingerprint({"data": data.identity, "semantics": TRAIN_SEMANTICS})
    stored = load_heads(folder, "probe", identity)
    if stored is not None:
        return stored["probe"]
    for cache in (data.train, data.held_out):
        for _ in read_blocks(cache, "cls", np.arange(cache.n_rows)):
            pass  # rows that are not finite are refused here, by their names
    train, held_out = (lazy_rows(cache, "cls", cache.spec.cls_dim) for cache in (data.train, data.held_out))
    models = [_head_rows(data, train, held_out, rows, data.split.select) for rows in data.train_rows().values()]
    parts = [(train[rows := data.split.without(part)], data.train_labels[rows]) for part in data.split.parts]
    heads = {"probe": fit_heads(models, data.n_classes, parts)}
    save_heads(folder, "probe", heads, identity)
    return heads["probe"]


def train_mofe(
    data: IdData,
    config: TrainConfig,
    make_end: Callable[[], nn.Module],
    seed: int,
    folder: Path,
    progress: Progress | None = None,
    device: str = "cpu",
) -> bool:
    """Train one variant with one seed, refit its heads, keep the refined features of its bank.

    Writes ``mofe.safetensors``, ``metrics.jsonl``, ``heads.safetensors`` and, last, ``mofe.json`` into `folder`;
    under cross-fitting the folds' models into ``fold-<i>`` below it. Of processes that are joined, all train and rank
    0 does the rest.

    Returns:
        Whether anything was done: False where the folder is fresh.

    Raises:
        InputError: settings that do not fit the data.
        StageError: the loss is not finite.
    """
    ranks = current()
    if config.tensorboard:
        require_tensorboard("train.tensorboard")
    settings = resolve_settings(config, data.n_classes, data.train.spec)
    identity = mixture_identity(data, settings, seed)
    if ranks.agree(mixture_is_fresh(folder, identity, data)):
        if config.tensorboard and ranks.first:
            scalars_of_metrics(folder)
        return False
    groups = ranks.agree(_groups_of_runs(data, settings, seed))
    n_groups = max(groups["final"]) + 1
    if ranks.first and progress is not None and settings.expert != "dense" and n_groups < settings.experts:
        progress.note(f"{folder}: {settings.experts} experts asked for, {n_groups} made: classes that look the same")
    runs = {}
    for name, rows in data.train_rows().items():
        checkpoint = _checkpoint_path(folder, name, identity)
        trained = train_mixture(
            data, rows, data.split.select, groups[name], settings, make_end, seed, checkpoint, progress, device
        )
        runs[name] = _numbered_as_in(trained, groups["final"])
    if ranks.first:
        about = {"identity": identity, "settings": asdict(settings), "seed": seed}
        about |= {"best_epoch": runs["final"].best_epoch}
        history = [{"run": name, **asdict(record)} for name, run in runs.items() for record in run.history]
        mixtures = {name: run.mixture for name, run in runs.items()}
        _finish(data, mixtures, history, about, folder, progress, config.tensorboard, device)
    return True


def finish_joint(
    data: IdData,
    source: Path,
    make_end: Callable[[], nn.Module],
    folder: Path,
    progress: Progress | None = None,
) -> bool:
    """Make a variant of the mixture that a fine-tune trained together with the backbone of these features.

    Nothing is trained: heads are refitted and the bank refined as `train_mofe` does it, into the same files.

    Args:
        data: features of the fine-tuned backbone; without cross-fitting.
        source: folder with the fine-tune's ``finetune.json``, ``mofe.safetensors`` and ``mofe.json``.
        make_end: gives a copy of the backbone's end, whatever its weights.
        folder: where the variant goes.
        progress: counts images.

    Returns:
        Whether anything was done: False where the folder is fresh.

    Raises:
        InputError: `source` holds no whole mixture.
    """
    ranks = current()
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
        _finish(data, {"final": mixture}, history, about, folder, progress)
    return True


def joint_identity(data: IdData, source: Path) -> str:
    """What such a variant is made of: features, split, and the fine-tune that left it in `source`.

    Raises:
        InputError: no fine-tune stands there, or one without experts.
    """
    tuned, about = (read_document(source / name) or {} for name in ("finetune.json", "mofe.json"))
    made_by = tuned.get("identity")
    if made_by is None or about.get("identity") != made_by:
        raise InputError(f"{source} holds no backbone with experts that were trained together: run make finetune")
    joint = {"joint": made_by, "weights": about["files"]}
    return fingerprint({"data": data.identity, **joint, "semantics": TRAIN_SEMANTICS})


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


def _finish(
    data: IdData,
    mixtures: Mapping[str, MixtureOfFeatureExperts],
    history: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    folder: Path,
    progress: Progress | None,
    tensorboard: bool = False,
    device: str = "auto",
) -> None:
    """The second half, wherever the experts were trained: refined features of the bank, refitted heads, all files.

    Args:
        data: features that the experts read from now on.
        mixtures: trained, by the name of the run (`IdData.train_rows`).
        history: lines of ``metrics.jsonl``.
        about: what ``mofe.json`` says of the training: ``identity``, ``settings``, ``seed``, ``best_epoch``.
        folder: where to.
        progress: counts images.
        tensorboard: whether the history is written as scalars as well.
        device: where the bank is refined; see `stages.mixture.refine.refine`.
    """
    final = mixtures["final"]
    # From here on the folder is of this training, or of none: what an older one left must not be taken for whole.
    (folder / "mofe.json").unlink(missing_ok=True)
    places = {name: run_folder(folder, name) for name in mixtures}
    weights = {name: save_weights(places[name], mixture) for name, mixture in mixtures.items()}
    bank = {
        name: _refine_to(
            refined_path(folder, name, "id-train"),
            mixtures[name],
            weights[name],
            data.train,
            training_routes(rows, mixtures[name].group.numpy()[data.train_labels]),
            progress,
            device,
        )
        for name, rows in data.train_rows().items()
    }
    held_out = bank
    if data.held_out is not data.train:
        held_out = {
            name: _refine_to(
                refined_path(folder, name, "id-val"),
                mixtures[name],
                weights[name],
                data.held_out,
                None,
                progress,
                device,
            )
            for name in data.train_rows()
        }
    left_out = {
        name: _refine_to(
            refined_path(folder, name, LEFT_OUT),
            mixtures[name],
            weights[name],
            data.train,
            mixtures[name].group.numpy()[data.train_labels[fold.calibrate]],
            progress,
            device,
            fold.calibrate,
        )
        for name, fold in data.runs()
        if data.split.cross_fitted
    }
    heads = _refit_heads(data, mixtures, bank, held_out, left_out)
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    with scalar_log(folder, tensorboard, history):
        pass
    made_of = {run: refined_digest(refined_path(folder, run, "id-train")) for run in bank}
    left = {run: refined_digest(refined_path(folder, run, LEFT_OUT)) for run in left_out}
    fitted_on = [refined_digest(refined_path(folder, run, "id-val")) for run in held_out]
    heads_of = fingerprint(
        {"data": data.identity, "features": [made_of, left, fitted_on], "semantics": TRAIN_SEMANTICS}
    )
    save_heads(folder, "heads", heads, heads_of)
    for line in (line for kind, fitted in heads.items() for line in fitted.notes(kind)):
        (progress or NullProgress()).note(f"{folder}: {line}")
    description = {
        **about,
        "classes": list(data.class_names),
        "data": data.identity,
        "features": data.train.spec.fingerprint,
        "parameters": sum(parameter.numel() for parameter in final.parameters()),
        "heads": heads_of,
        "bank": made_of,
        "left_out": left,
    }
    names = ["mofe.safetensors", "heads.json", "heads.safetensors", "metrics.jsonl"]
    for name in mixtures.keys() - {"final"}:
        own = {"groups": _groups(data, mixtures[name]), "files": {"mofe.safetensors": weights[name]}}
        write_document(places[name] / "mofe.json", description | own)
        names += [f"{name}/mofe.json", f"{name}/mofe.safetensors"]
    files = {name: digest_of(folder / name) for name in sorted(names)}
    write_document(folder / "mofe.json", description | {"groups": _groups(data, final), "files": files})
    for checkpoint in folder.glob("*.checkpoint"):  # of runs with other settings, too
        checkpoint.unlink()


def _groups(data: IdData, mixture: MixtureOfFeatureExperts) -> dict[str, int]:
    """Group of each class, by its name."""
    return dict(zip(data.class_names, mixture.group.tolist(), strict=True))


def _refine_to(
    path: Path,
    mixture: MixtureOfFeatureExperts,
    weights: str,
    cache: FeatureCache,
    routes: NDArray[np.int64] | None,
    progress: Progress | None,
    device: str,
    rows: Rows | None = None,
) -> Refined:
    asked = Routes(routes, rows)
    context = Context(progress or NullProgress(), device)
    return refine_to(path, refined_identity(weights, cache, asked), mixture, cache, asked, context)


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


def _checkpoint_path(folder: Path, run: str, identity: str) -> Path:
    """Its name holds the identity, so that no run goes on from a checkpoint of other settings."""
    return folder / f"{run}-{identity[:8]}.checkpoint"


def mixture_identity(data: IdData, settings: TrainSettings, seed: int) -> str:
    """What a trained mixture is made of: features, split, settings (a grouping file by its content) and seed."""
    own = asdict(settings) | {"grouping": grouping_content(settings.grouping)}
    return fingerprint({"data": data.identity, "settings": own, "seed": seed, "semantics": TRAIN_SEMANTICS})


def mixture_is_fresh(folder: Path, identity: str, data: IdData) -> bool:
    """Whether a folder holds the trained mixture of this identity, with all its files, and these as they were left."""
    description = read_whole(folder / "mofe.json", unread=("metrics.jsonl",))  # which nothing is made of but the report
    if description is None or description.get("identity") != identity:
        return False
    banks = [(run, "id-train", description["bank"].get(run)) for run in data.train_rows()]
    if data.split.cross_fitted:
        banks += [(run, LEFT_OUT, description["left_out"].get(run)) for run, _ in data.runs()]
    return all(_bank_is_whole(refined_path(folder, run, name), digest) for run, name, digest in banks)


def _bank_is_whole(path: Path, digest: str | None) -> bool:
    return load_refined(path, {"files": {path.name: digest}}) is not None


def _refit_heads(
    data: IdData,
    mixtures: Mapping[str, MixtureOfFeatureExperts],
    bank: Mapping[str, Refined],
    held_out: Mapping[str, Refined],
    left_out: Mapping[str, Refined],
) -> dict[str, FittedHeads]:
    """Heads for scoring. The heads that train the experts are bad OOD scorers (saturated, and taught "other").

    Args:
        data: whose rows these are.
        mixtures: trained, by the name of the run.
        bank: their refined rows of id-train.
        held_out: those of the held-out set.
        left_out: of each fold's calibrate rows as its bank would have them; none without cross-fitting.
    """
    names = [name for name, _ in data.runs()]
    parts = [
        part_bank(data.split, part, bank[names[part.fold]], left_out[names[part.fold]]) for part in data.split.parts
    ]
    runs = [
        _heads_of_run(data, mixtures[name].group.numpy(), rows, bank[name], held_out[name])
        for name, rows in data.train_rows().items()
    ]
    # A fold with fewer groups than the final model has no row of the others.
    experts = {"refit": None} | {f"refit-group-{expert}": expert for expert in range(len(runs[-1]) - 1)}
    return {
        kind: FittedHeads.of(
            [run.get(kind, run["refit"]) for run in runs],
            data.n_classes,
            [_rows_of_head(data, part, expert) for part in parts],
        )
        for kind, expert in experts.items()
    }


def _rows_of_head(data: IdData, part: PartBank, expert: int | None) -> FitRows:
    """What is left without a part of the rows of an expert, or of all where it has none."""
    own = np.ones(len(part.rows), dtype=bool) if expert is None else part.expert == expert
    own = own if own.any() else ~own
    return part.features[own], data.train_labels[part.rows[own]]


def _heads_of_run(
    data: IdData, group: NDArray[np.int64], train: Rows, bank: Refined, held_out: Refined
) -> dict[str, ChosenHead]:
    """The heads of one model by their kinds: ``refit``, and ``refit-group-<e>`` for each expert."""
    select = data.split.select
    refit = choose_head(_head_rows(data, bank.features, held_out.features, train, select), data.n_classes)
    heads = {"refit": refit}
    for expert in range(group.max() + 1):
        own = train[bank.expert[train] == expert]
        # Judged on select rows that the router sent to the right expert: only they can be classified at all.
        right = select[(held_out.expert[select] == expert) & (group[data.held_out_labels[select]] == expert)]
        rows = _head_rows(data, bank.features, held_out.features, own, right)
        strengths = STRENGTHS if len(right) else [refit.strength]
        heads[f"refit-group-{expert}"] = choose_head(rows, data.n_classes, strengths)
    return heads


def _head_rows(data: IdData, train: Rows2D, held_out: Rows2D, rows: Rows, select: Rows) -> HeadRows:
    return HeadRows(
        _taken(train, rows), data.train_labels[rows], _taken(held_out, select), data.held_out_labels[select]
    )


def _taken(features: Rows2D, rows: Rows) -> LazyArray:
    """Some rows of a memory-mapped or lazy array, not read yet."""
    return features[rows] if isinstance(features, LazyArray) else LazyArray.of(features, rows)
