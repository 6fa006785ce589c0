"""Mixtures on cached features: their losses beside the CPU's, their rows a second beside bare steps, their memory."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from stages.config import BackboneConfig, TrainConfig
from stages.context import Context
from stages.extract import extract_set
from stages.id_data.rows import IdData, id_data
from stages.id_data.split import Rows
from stages.id_data.tokens import read_tokens
from stages.inputs.images import list_images
from stages.networks.backbone import Backbone
from stages.train import TrainedMixture, start_mixture, train_mixture
from stages.training.checkpoint import Checkpoints
from stages.training.recipes import resolve_settings
from tests.bench.gpu.step import Bench
from tests.bench.gpu.subjects import named_network, network, placed, rate

# Relative, of an epoch's loss: rounding that every step adds to.
LOSS_TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}
EPOCHS = 2
_numbers = itertools.count()


class Subject:
    """A network, and the ID side of a study on its cached features of scikit-learn's digits.

    Args:
        bench: of the step.
        config: the network.
    """

    def __init__(self, bench: Bench, config: BackboneConfig) -> None:
        self._bench = bench
        self.backbone: Backbone = placed(network(config), config, bench.device)
        images = list_images(f"sklearn:digits[{bench.sizes.digits}]/train")
        spec = self.backbone.feature_spec("float16", "full")
        root = bench.scratch / "digits"
        cache = extract_set(config.name, images, spec, root, lambda: self.backbone)
        self.data: IdData = id_data(cache, None, 0.2)

    @property
    def some_rows(self) -> Rows:
        """Rows of a training whose loss is compared."""
        rows = self.data.split.final_train
        return np.sort(np.random.default_rng(0).permutation(rows)[: self._bench.sizes.trained_rows])

    def train(self, rows: Rows, data: IdData, context: Context, **settings: Any) -> TrainedMixture:
        """A mixture, from start to end."""
        resolved = resolve_settings(TrainConfig(**{"epochs": EPOCHS} | settings), data.n_classes)
        groups = [number % resolved.experts for number in range(data.n_classes)]
        mixture = start_mixture(data, rows, groups, resolved, self.backbone.end, 0)
        path = self._bench.scratch / f"{next(_numbers)}.checkpoint"
        trained = train_mixture(mixture, data, rows, resolved, 0, Checkpoints(path), context)
        path.unlink(missing_ok=True)
        return trained


def mixture(bench: Bench, name: str) -> None:
    """Train in every precision as on the CPU, then for speed."""
    subject = Subject(bench, named_network(bench, name))
    rows = subject.some_rows
    exact = subject.train(rows, subject.data, Context(device="cpu"), experts=2, precision="float32")
    for precision, tolerance in LOSS_TOLERANCES.items():
        reset_peak(bench)
        ours = subject.train(rows, subject.data, Context(device=bench.device), experts=2, precision=precision)
        for epoch, (found, there) in enumerate(zip(ours.history, exact.history, strict=True)):
            error = abs(found.loss - there.loss) / there.loss
            bench.measure(f"{precision}, epoch {epoch}: loss, relative to the CPU's", error, at_most=tolerance)
        say_peak(bench, f"{precision}: peak memory")
    speed(bench, subject)


def same_bits(bench: Bench, name: str) -> None:
    """Train twice, and count weights that are not the same bits."""
    subject = Subject(bench, named_network(bench, name))
    rows, context = subject.some_rows, Context(device=bench.device)
    for precision in LOSS_TOLERANCES:
        once, again = (
            subject.train(rows, subject.data, context, experts=2, precision=precision).mixture.state_dict()
            for _ in range(2)
        )
        differ = sum(int((once[name] != again[name]).sum()) for name in once)
        bench.measure(f"{precision}: weights that differ", differ, at_most=0)


def speed(bench: Bench, subject: Subject) -> None:
    """Rows a second that experts get: in epochs, and in bare steps of one expert on tokens in memory."""
    data = one_held_out(subject.data)
    rows = data.split.final_train
    limit = rate(bench, len(rows), bare_steps(bench, subject, rows))
    bench.measure("bare forward, backward, AdamW of one expert", limit, "rows/s")
    for experts in (1, min(4, data.n_classes)):
        reset_peak(bench)
        context = Context(device=bench.device)
        # Each of several is shown as many rows of other groups as of its own.
        n_rows = bench.sizes.timed_epochs * len(rows) * (1 if experts == 1 else 2)
        settings = {"experts": experts, "epochs": bench.sizes.timed_epochs}
        ours = rate(bench, n_rows, partial(subject.train, rows, data, context, **settings))
        bench.measure(f"E = {experts}: epochs", ours, "rows/s")
        bench.measure(f"E = {experts}: epochs / bare", ours / limit)
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


def one_held_out(data: IdData) -> IdData:
    """The same with one row to judge by, which takes no time."""
    folds = tuple(replace(fold, select=fold.select[:1]) for fold in data.split.folds)
    return replace(data, split=replace(data.split, folds=folds))


def reset_peak(bench: Bench) -> None:
    """Begin to watch the memory of a GPU."""
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def say_peak(bench: Bench, what: str) -> None:
    """Say the most that torch has held of it since."""
    if bench.device == "cuda":
        bench.measure(what, torch.cuda.max_memory_allocated() / 2**20, "MiB")
