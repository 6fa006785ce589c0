"""How far each stage is from its limit: ours and the bare operation in turn, in one run. ``make bench``.

    stage one    extract_set on images     / the bare forward pass on tensors in memory, same batch, same threads
    stage two    an epoch of train_mixture / bare forward and backward of one expert on the same tokens in memory
    stage three  FeatureBank.search        / a bare FAISS search

Prints the median of several runs and their ratio (1.00 is the limit). These are timings: nothing here is a test.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import faiss
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cache import FeatureCache
from stages.backbone import COMPUTE_BATCH, Backbone, build_architecture, load_backbone
from stages.bank import FeatureBank, l2_normalise
from stages.config import BackboneConfig, TrainConfig
from stages.dataset import id_data, read_tokens
from stages.extract import extract_set
from stages.images import SampleTable, list_images
from stages.train import resolve_settings, train_mixture

RUNS = 3
BANK, QUERIES, DIM, K = 100_000, 2_000, 384, 50


def main() -> None:
    """Measure every stage and print the table."""
    table = Table(title=f"median of {RUNS} runs each, in turn; {torch.get_num_threads()} threads")
    for column in ("what", "unit", "limit", "ours", "ours / limit"):
        table.add_column(column, justify="left" if column in ("what", "unit") else "right")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lite0 = load_backbone(BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=224))
        photos = list_images("sklearn:photos")
        row(table, "extract EfficientNet-Lite0, 224 px", "images/s", *extraction(lite0, photos, folder / "lite0"))
        vit = build_architecture(BackboneConfig(name="vit_small_patch14_dinov2", image_size=224))
        row(table, "extract ViT-S/14, 224 px", "images/s", *extraction(vit, photos, folder / "vit"))
        small = load_backbone(BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=112))
        row(table, "train one expert, EfficientNet-Lite0, 112 px", "rows/s", *training(small, folder / "train"))
    row(table, f"kNN, {BANK:,} x {DIM}, k = {K}", "queries/s", *search())
    Console().print(table)


def row(table: Table, what: str, unit: str, limit: float, ours: float) -> None:
    """Add a line of rates."""
    table.add_row(what, unit, f"{limit:.1f}", f"{ours:.1f}", f"{ours / limit:.2f}")


def in_turn(amount: int, limit: Callable[[], object], ours: Callable[[], object]) -> tuple[float, float]:
    """Rates of two functions that each do `amount` of work, run in turn after one warm-up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for run in range(RUNS + 1):
        for measured, function in zip(seconds, (limit, ours), strict=True):
            start = time.perf_counter()
            function()
            if run:
                measured.append(time.perf_counter() - start)
    return amount / statistics.median(seconds[0]), amount / statistics.median(seconds[1])


def extraction(backbone: Backbone, samples: SampleTable, root: Path) -> tuple[float, float]:
    """Images per second."""
    spec = backbone.feature_spec("float16", "full")
    batch = torch.randn(COMPUTE_BATCH, 3, 224, 224)
    versions = count()

    def bare() -> None:
        for _ in range(-(-len(samples) // COMPUTE_BATCH)):
            backbone.encode(batch)

    def stage() -> None:
        extract_set("bench", samples, spec, root / str(next(versions)), lambda: backbone)

    return in_turn(len(samples), bare, stage)


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


def search() -> tuple[float, float]:
    """Queries per second."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((BANK, DIM), dtype=np.float32)
    queries = rng.standard_normal((QUERIES, DIM), dtype=np.float32)
    index = faiss.IndexFlatIP(DIM)
    index.add(l2_normalise(features))
    unit = l2_normalise(queries)
    bank = FeatureBank(features, device="cpu")
    return in_turn(QUERIES, lambda: index.search(unit, K), lambda: bank.search(queries, K))


if __name__ == "__main__":
    main()
