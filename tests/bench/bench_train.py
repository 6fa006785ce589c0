"""How far stage two is from bare training. ``make bench-train``.

The limit is forward and backward of one expert on the same tokens in memory; ours is an epoch of ``train_mixture`` from the
cache, with one expert. Both in turn; medians. Nothing here is a test.
"""

import tempfile
from itertools import count
from pathlib import Path

import torch
from rich.console import Console

from cache import FeatureCache
from stages.backbone import Backbone, load_backbone
from stages.config import BackboneConfig, TrainConfig
from stages.dataset import id_data, read_tokens
from stages.extract import extract_set
from stages.images import list_images
from stages.train import resolve_settings, train_mixture
from tests.bench.timing import RUNS, in_turn, rates, row


def main() -> None:
    """Measure and print the table."""
    table = rates(f"median of {RUNS} runs each, in turn; {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as scratch:
        small = load_backbone(BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=112))
        row(table, "train one expert, EfficientNet-Lite0, 112 px", "rows/s", *training(small, Path(scratch)))
    Console().print(table)


def training(backbone: Backbone, root: Path) -> tuple[float, float]:
    """Training rows per second, without out-of-group rows: a row goes through one expert once."""
    samples = list_images("sklearn:digits[0-6]/train")
    cache: FeatureCache = extract_set(
        "bench", samples, backbone.feature_spec("float16", "full"), root, lambda: backbone
    )
    data = id_data(cache, None, 0.2)
    rows = data.split.final_train
    settings = resolve_settings(TrainConfig(experts=1, epochs=1), data.n_classes)
    tokens = read_tokens(cache, rows)
    end = backbone.end()
    runs = count()

    def bare() -> None:
        for start in range(0, len(rows), settings.batch_size):
            end(tokens[start : start + settings.batch_size]).sum().backward()

    def epoch() -> None:
        train_mixture(
            data, rows, None, [0] * data.n_classes, settings, backbone.end, 0, root / f"{next(runs)}.checkpoint"
        )

    return in_turn(len(rows), bare, epoch)


if __name__ == "__main__":
    main()
