"""Mixtures on cached features: their losses beside the CPU's, their rows a second beside bare steps, their memory."""

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from stages.config import TrainConfig
from stages.context import Context
from stages.extract import extract_set
from stages.id_data.rows import IdData, id_data
from stages.id_data.split import Rows
from stages.id_data.tokens import read_tokens
from stages.inputs.images import list_images
from stages.networks.backbone import Backbone
from stages.networks.repeatable import repeatable
from stages.progress import NullProgress
from stages.train import TrainedMixture, start_mixture, train_mixture
from stages.training.cached import CachedTrainer
from stages.training.checkpoint import Checkpoints
from stages.training.recipes import resolve_settings
from tests.bench.gpu.step import Bench
from tests.bench.gpu.subjects import named_network, network, placed, rate

# Relative, of an epoch's loss: rounding that every step adds to.
LOSS_TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}
EPOCHS = 2
_numbers = itertools.count()


class Subject:
    """A network, and the ID side of a study on its cached features of scikit-learn's digits, which steps share.

    Args:
        bench: of the step.
        name: of the network.
    """

    def __init__(self, bench: Bench, name: str) -> None:
        config = named_network(bench, name, batch=bench.sizes.tuned_batch)
        self._bench = bench
        self.backbone: Backbone = placed(network(config), config, bench.device)
        images = list_images(f"sklearn:digits[{bench.sizes.digits}]/train")
        spec = self.backbone.feature_spec("float16", "full")
        root = bench.shared / "digits"
        cache = extract_set(config.name, images, spec, root, lambda: self.backbone)
        self.data: IdData = id_data(cache, None, 0.2)

    @property
    def some_rows(self) -> Rows:
        """Rows of a training whose loss is compared."""
        rows = self.data.split.final_train
        return np.sort(np.random.default_rng(0).permutation(rows)[: self._bench.sizes.trained_rows])

    @property
    def some_data(self) -> IdData:
        """The same data with a third as many rows to judge that training by."""
        return judged_by(self.data, self._bench.sizes.trained_rows // 3)

    def train(self, rows: Rows, data: IdData, context: Context, **settings: Any) -> TrainedMixture:
        """A mixture, from start to end."""
        resolved = resolve_settings(TrainConfig(**{"epochs": EPOCHS} | settings), data.n_classes)
        groups = [number % resolved.experts for number in range(data.n_classes)]
        mixture = start_mixture(data, rows, groups, resolved, self.backbone.end, 0)
        path = self._bench.scratch / f"{next(_numbers)}.checkpoint"
        trained = train_mixture(mixture, data, rows, resolved, 0, Checkpoints(path), context)
        path.unlink(missing_ok=True)
        return trained


def losses(trained: TrainedMixture) -> list[float]:
    """Of each epoch of a training; its start is judged before any step, and has none."""
    return [record.loss for record in trained.history if record.epoch >= 0]


def mixture(bench: Bench, name: str) -> None:
    """Train in every precision as on the CPU, then for speed."""
    subject = Subject(bench, name)
    rows, data = subject.some_rows, subject.some_data
    exact = subject.train(rows, data, Context(device="cpu"), experts=2, precision="float32")
    for precision, tolerance in LOSS_TOLERANCES.items():
        reset_peak(bench)
        ours = subject.train(rows, data, Context(device=bench.device), experts=2, precision=precision)
        for epoch, (found, there) in enumerate(zip(losses(ours), losses(exact), strict=True)):
            error = abs(found - there) / there
            bench.measure(f"{precision}, epoch {epoch}: loss, relative to the CPU's", error, at_most=tolerance)
        say_peak(bench, f"{precision}: peak memory")
    speed(bench, subject)


def same_bits(bench: Bench, name: str) -> None:
    """Train twice, and count weights that are not the same bits."""
    subject = Subject(bench, name)
    rows, data, context = subject.some_rows, subject.some_data, Context(device=bench.device)
    for precision in LOSS_TOLERANCES:
        once, again = (
            subject.train(rows, data, context, experts=2, precision=precision).mixture.state_dict() for _ in range(2)
        )
        differ = sum(int((once[name] != again[name]).sum()) for name in once)
        bench.measure(f"{precision}: weights that differ", differ, at_most=0)


def speed(bench: Bench, subject: Subject) -> None:
    """Rows a second that experts get: in epochs, and in bare steps of one expert on tokens in memory."""
    data = judged_by(subject.data, 1)  # which takes no time
    rows = data.split.final_train
    limit = rate(bench, len(rows), bare_steps(bench, subject, rows))
    bench.measure("bare forward, backward, AdamW of one expert", limit, "rows/s")
    at_hand = rate(bench, *steps_at_hand(bench, subject, rows, data))
    bench.measure("E = 1: steps of batches that are on the device", at_hand, "rows/s")
    for experts in (1, min(4, data.n_classes)):
        reset_peak(bench)
        for _ in range(2):  # the first on a GPU waits for cuDNN, which chooses kernels for each number of rows
            pace = Pace(bench.sizes.mixture_s)
            with suppress(TimeIsUp):
                subject.train(rows, data, Context(pace, bench.device), experts=experts, epochs=1000, patience=None)
        # Each of several is shown as many rows of other groups as of its own.
        ours = pace.rows_per_second * (1 if experts == 1 else 2)
        bench.measure(f"E = {experts}: epochs", ours, "rows/s")
        bench.measure(f"E = {experts}: epochs / bare", ours / limit)
        # Epochs of these few rows are short: what a step takes, as it does in long ones, and the end of an epoch apart.
        steady = pace.rows_of_step / pace.step_s * (1 if experts == 1 else 2) if pace.step_s else 0.0
        bench.measure(f"E = {experts}: steps of an epoch", steady, "rows/s")
        bench.measure(f"E = {experts}: steps of an epoch / bare", steady / limit)
        bench.measure(f"E = {experts}: a step, median", 1e3 * pace.step_s, "ms")
        bench.measure(f"E = {experts}: from an epoch's last step to the next one's first", 1e3 * pace.turn_s, "ms")
        say_peak(bench, f"E = {experts}: peak memory")


def bare_steps(bench: Bench, subject: Subject, rows: Rows) -> Callable[[], None]:
    """An epoch of one expert, in the precision that a training takes."""
    tokens = read_tokens(subject.data.train, rows, bench.device)
    end = subject.backbone.end().to(bench.device).train()
    optimiser = torch.optim.AdamW(end.parameters(), lr=1e-5)
    batch = resolve_settings(TrainConfig(), subject.data.n_classes).batch_size
    autocast = torch.autocast(bench.device, torch.bfloat16, enabled=bench.device == "cuda")

    def epoch() -> None:
        for start in range(0, len(rows), batch):
            optimiser.zero_grad(set_to_none=True)
            with autocast:
                loss = end(tokens[start : start + batch]).float().sum()
            loss.backward()
            optimiser.step()

    return epoch


def steps_at_hand(bench: Bench, subject: Subject, rows: Rows, data: IdData) -> tuple[int, Callable[[], None]]:
    """How many rows a training's own steps learn from, and these steps: nothing is read or sent meanwhile."""
    settings = resolve_settings(TrainConfig(experts=1), data.n_classes)
    groups = [0] * data.n_classes
    mixture = start_mixture(data, rows, groups, settings, subject.backbone.end, 0).to(bench.device)
    trainer = CachedTrainer(mixture, data, rows, settings, 0, Context(device=bench.device))
    batches = list(trainer.load(trainer.plan(0, [])[:8]))

    def steps() -> None:
        with repeatable(bench.device, trains=True):
            for batch in batches:
                trainer.step(batch)

    return sum(len(batch.batch.rows) for batch in batches), steps


class TimeIsUp(Exception):
    """Ends a training that is timed."""


class Pace(NullProgress):
    """Counts rows of a training, which it ends after some time. What the first half of that computes is the warm-up.

    Args:
        seconds: from its first step on.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._done: list[tuple[float, int]] = []  # when, and how many rows by then
        self._epochs: list[object] = []  # of these

    def advance(self, n: int = 1, **fields: object) -> None:
        """See `Progress`; only steps have rows."""
        if not n:
            return
        self._done.append((time.perf_counter(), n + (self._done[-1][1] if self._done else 0)))
        self._epochs.append(fields.get("epoch"))
        if len(self._done) > 2 and self._done[-1][0] - self._done[0][0] >= self._seconds:
            raise TimeIsUp

    @property
    def rows_per_second(self) -> float:
        """In the second half."""
        (begun, _), (ended, rows) = self._done[0], self._done[-1]
        since, before = next(at for at in self._done if at[0] >= (begun + ended) / 2 or at is self._done[-2])
        return (rows - before) / (ended - since)

    @property
    def rows_of_step(self) -> float:
        """Mean of the rows of a step, over the whole run."""
        return self._done[-1][1] / len(self._done)

    @property
    def step_s(self) -> float:
        """Median of the seconds between two steps of one epoch."""
        return self._median(same_epoch=True)

    @property
    def turn_s(self) -> float:
        """The same between the last step of an epoch and the first of the next; 0 where there was but one epoch."""
        return self._median(same_epoch=False)

    def _median(self, same_epoch: bool) -> float:
        times, epochs = [at for at, _ in self._done], self._epochs
        between = zip(times, times[1:], epochs, epochs[1:], strict=False)
        seconds = [after - before for before, after, one, other in between if (one == other) is same_epoch]
        return statistics.median(seconds) if seconds else 0.0


def judged_by(data: IdData, n: int) -> IdData:
    """The same with a few rows to judge by."""
    folds = tuple(replace(fold, select=fold.select[:n]) for fold in data.split.folds)
    return replace(data, split=replace(data.split, folds=folds))


def reset_peak(bench: Bench) -> None:
    """Begin to watch the memory of a GPU."""
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def say_peak(bench: Bench, what: str) -> None:
    """Say the most that torch has held of it since."""
    if bench.device == "cuda":
        bench.measure(what, torch.cuda.max_memory_allocated() / 2**20, "MiB")
