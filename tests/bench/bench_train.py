"""How far stage two is from bare training, and what it saves. ``make bench-train``.

    epochs of `train_mixture` on the cache   /  forward and backward of one expert on the same tokens in memory
    its processed row                          against  a row of an end-to-end step (forward, backward, AdamW on all
                                               weights), and of training a head alone, on images in memory

    experts of a batch stacked as one network  /  one after another: why a CPU does the latter

A mixture of several experts shows each of them out-of-group rows as well; rates count every row that an expert gets.
Epochs are all that `train_mixture` does: it makes the experts, reads, mixes, steps and stores a checkpoint.
Ours and the limit in turn; medians. Nothing here is a test.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from stages.config import BackboneConfig, ExpertKind, TrainConfig
from stages.extract import extract_set
from stages.id_data.rows import IdData, id_data
from stages.id_data.split import Rows
from stages.id_data.tokens import read_tokens
from stages.inputs.images import list_images
from stages.mixture.config import MixtureConfig
from stages.mixture.model import build_mixture
from stages.networks.backbone import Backbone, build_architecture, load_backbone
from stages.train import start_mixture, train_mixture
from stages.training.checkpoint import Checkpoints
from stages.training.recipes import resolve_settings
from tests.bench.gpu.experts import mixture_of, shown, step
from tests.bench.timing import RUNS, in_turn, rates, row

LITE0 = BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=224)
VIT = BackboneConfig(name="vit_small_patch14_dinov2", image_size=224)
EPOCHS = 4
IMAGES = 32  # of an end-to-end step
STACKED = 32  # rows of a batch whose experts run both ways
SIZES: tuple[tuple[ExpertKind, int], ...] = (
    ("end", 1), ("end", 2), ("end", 4), ("end", 7), ("dense", 4), ("adapter", 7)
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What is measured on: a backbone, its cached features, and some of their rows."""

    name: str
    backbone: Backbone
    data: IdData
    rows: Rows
    scratch: Path

    def groups(self, experts: int) -> list[int]:
        """``[C]`` group of each class."""
        return [number % experts for number in range(self.data.n_classes)]

    def train(self, experts: int, seen: list[int] | None = None) -> None:
        """Some epochs; adds the rows of every batch that an expert gets to `seen`."""
        path = self.scratch / f"{next(_NUMBERS)}.checkpoint"
        settings = resolve_settings(TrainConfig(experts=experts, epochs=EPOCHS), self.data.n_classes)

        def make_end() -> nn.Module:
            end = self.backbone.end()
            if seen is not None:
                end.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0].cls)))
            return end

        mixture = start_mixture(self.data, self.rows, self.groups(experts), settings, make_end, 0)
        train_mixture(mixture, self.data, self.rows, settings, 0, Checkpoints(path))

    def tidy(self) -> None:
        """Remove what `train` left."""
        for path in self.scratch.glob("*.checkpoint"):
            path.unlink()


_NUMBERS = count()


def main() -> None:
    """Measure and print the tables."""
    title = f"median of {RUNS} runs each, in turn; {torch.get_num_threads()} threads"
    speed, ways, saved = rates(title), rates(f"limit: one after another, ours: stacked; {title}"), Table(title=title)
    for column in ("what", "rows/s", "time of a row, against an end-to-end step"):
        saved.add_column(column, justify="left" if column == "what" else "right")
    size = Table(title="trained, and held in memory while training: weights, their average, gradients, AdamW's moments")
    for column in ("what", "expert", "E", "parameters", "MiB"):
        size.add_column(column, justify="left" if column in ("what", "expert") else "right")
    for name, backbone, n_rows in (
        ("EfficientNet-Lite0, 224 px", load_backbone(LITE0), 512),
        ("ViT-S/14, 224 px", build_architecture(VIT), 64),
    ):
        with tempfile.TemporaryDirectory() as scratch:
            subject = cached(name, backbone, n_rows, Path(scratch))
            ours = 0.0
            for experts in (1, 4):
                limit, ours = epochs(subject, experts)
                row(speed, f"{name}, E = {experts}", "rows/s", limit, ours)
            whole, head = on_images(backbone)
            for what, rate in (("epochs on the cache, E = 4", ours), ("head alone", head), ("end to end", whole)):
                saved.add_row(f"{name}: {what}", f"{rate:.1f}", f"1/{rate / whole:.1f}")
            for experts in (4, 16):
                loop, stacked = both_ways(backbone, experts)
                row(ways, f"{name}, E = {experts}", "rows/s", loop, stacked)
            for kind, experts in SIZES:
                parameters, nbytes = held(subject, experts, kind)
                size.add_row(name, kind, str(experts), f"{parameters:,}", f"{nbytes / 2**20:.1f}")
    for table in (speed, saved, size, ways):
        Console(width=120).print(table)


def cached(name: str, backbone: Backbone, n_rows: int, scratch: Path) -> Subject:
    """Features of scikit-learn's digits 0 to 6, scaled up."""
    images = list_images("sklearn:digits[0-6]/train")
    cache = extract_set("bench", images, backbone.feature_spec("float16", "full"), scratch, lambda: backbone)
    data = id_data(cache, None, 0.2)
    rows = np.random.default_rng(0).permutation(data.split.final_train)[:n_rows]
    folds = tuple(replace(fold, select=fold.select[:1]) for fold in data.split.folds)  # judging takes no time
    return Subject(name, backbone, replace(data, split=replace(data.split, folds=folds)), np.sort(rows), scratch)


def epochs(subject: Subject, experts: int) -> tuple[float, float]:
    """Rows per second that experts get: bare forward and backward of one, epochs of the mixture."""
    seen: list[int] = []
    subject.train(experts, seen)
    n_rows, batch = sum(seen), resolve_settings(TrainConfig(), subject.data.n_classes).batch_size
    tokens = read_tokens(subject.data.train, subject.rows)
    end = subject.backbone.end()

    def bare() -> None:
        left = n_rows
        while left:
            start = (n_rows - left) % len(tokens.cls)
            part = tokens[start : start + min(batch, left)]
            end.zero_grad(set_to_none=True)
            end(part).sum().backward()
            left -= len(part.cls)

    return in_turn(n_rows, bare, lambda: subject.train(experts), tidy=subject.tidy)


def both_ways(backbone: Backbone, experts: int) -> tuple[float, float]:
    """Rows per second that experts get of a batch, forwards and backwards: one after another, and stacked."""
    counts = shown(experts, STACKED)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        tokens = backbone.encode(torch.randn(8, 3, 224, 224, generator=generator)).map(torch.clone)
    place = torch.arange(sum(counts)) % len(tokens)
    mixture = mixture_of(backbone, experts, "cpu")
    one_step = step("cpu", mixture, lambda rows: tokens[place[rows]], counts)

    def run(stacked: bool) -> None:
        mixture.stacked.forced = stacked
        one_step()

    return in_turn(sum(counts), lambda: run(False), lambda: run(True))


def on_images(backbone: Backbone) -> tuple[float, float]:
    """Images per second in memory: a step of all weights, a step of a linear head on the frozen network."""
    model = copy.deepcopy(backbone.model).requires_grad_(True).train()
    for module in model.modules():
        module._forward_pre_hooks.clear()  # the backbone's tap
    head = nn.Linear(backbone.dim, 7)
    images, labels = torch.randn(IMAGES, 3, 224, 224), torch.arange(IMAGES) % 7

    def step(trained: Sequence[nn.Parameter], features: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        optimiser = torch.optim.AdamW(trained, lr=1e-5)

        def run() -> None:
            optimiser.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(head(features(images)), labels).backward()
            optimiser.step()

        return run

    whole = step([*model.parameters(), *head.parameters()], model)
    return in_turn(IMAGES, whole, step([*head.parameters()], torch.no_grad()(model)))


def held(subject: Subject, experts: int, kind: ExpertKind) -> tuple[int, int]:
    """Trained parameters, and bytes of all that is held for them."""
    groups = [0] * subject.data.n_classes if kind == "dense" else subject.groups(experts)
    backbone = subject.backbone
    config = MixtureConfig(backbone.dim, backbone.tap_dim, tuple(groups), kind, copies=experts)
    mixture = build_mixture(config, backbone.end)
    trained = list(mixture.parameters())
    weights = sum(tensor.nbytes for tensor in mixture.state_dict().values())
    return sum(parameter.numel() for parameter in trained), 2 * weights + 3 * sum(p.nbytes for p in trained)


if __name__ == "__main__":
    main()
