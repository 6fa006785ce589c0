"""What workers add: extraction and the search of neighbours with one and with two of them, and what an item costs.

``make bench-cluster``, ``ARGS="--only knn"`` for a part. Workers are started before anything is timed. Not a test.
"""

import argparse
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

import pipeline.__main__  # noqa: F401  the process is set up as the command line sets it up
from pipeline.engine import DaskEngine
from tests.bench.timing import RUNS

N_IMAGES, SHARD = 192, 16
BANK, QUERIES, DIM, K = 32_768, 16_384, 384, 200
N_EMPTY, N_MANY = 500, 100_000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts: dict[str, Callable[[Console], None]] = {"extract": extract, "knn": knn, "empty": empty, "memory": memory}
    parser.add_argument("--only", choices=parts)
    only = parser.parse_args().only
    for name, part in parts.items():
        if only in (None, name):
            part(Console())


def one_and_two(console: Console, what: str, unit: str, amount: float, work: Callable[[DaskEngine], object]) -> None:
    """Print the rates of a piece of work with one worker and with two, in turn after one warm-up."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with DaskEngine(workers=1) as one, DaskEngine(workers=2) as two:
        for run in range(RUNS + 1):
            for n, engine in ((1, one), (2, two)):
                start = time.perf_counter()
                work(engine)
                if run:
                    seconds[n].append(time.perf_counter() - start)
    rates = {n: amount / statistics.median(own) for n, own in seconds.items()}
    table = Table("what", "unit", "1 worker", "2 workers", "2 / 1")
    table.add_row(what, unit, f"{rates[1]:.1f}", f"{rates[2]:.1f}", f"{rates[2] / rates[1]:.2f}")
    console.print(table)


def extract(console: Console) -> None:
    """Images per second of extraction."""
    from stages.config import BackboneConfig
    from stages.extract import ExtractOptions, extract_set
    from stages.inputs.images import list_images
    from stages.networks.backbone import load_backbone
    from tests.bench.bench_extract import write_jpegs

    backbone = load_backbone(BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=224))
    spec, versions = backbone.feature_spec("float16", "full"), count()
    with tempfile.TemporaryDirectory() as scratch:
        write_jpegs(Path(scratch) / "jpeg", N_IMAGES)
        samples = list_images(str(Path(scratch) / "jpeg"))

        def work(engine: DaskEngine) -> None:
            options = ExtractOptions(shard_rows=SHARD, mapper=engine.map)
            extract_set("bench", samples, spec, Path(scratch) / str(next(versions)), lambda: backbone, options=options)

        what = f"extraction, EfficientNet-Lite0 at 224 px, {N_IMAGES} images in shards of {SHARD}"
        one_and_two(console, what, "images/s", N_IMAGES, work)


def knn(console: Console) -> None:
    """Queries per second of the search of neighbours."""
    from stages.scorers.neighbours.bank import FeatureBank
    from stages.scorers.neighbours.cluster import cluster_distances

    rng = np.random.default_rng(0)
    bank = FeatureBank(rng.standard_normal((BANK, DIM), dtype=np.float32), device="cpu")
    queries = rng.standard_normal((QUERIES, DIM), dtype=np.float32)
    with tempfile.TemporaryDirectory() as scratch:

        def work(engine: DaskEngine) -> None:
            cluster_distances(bank, queries, K, engine, Path(scratch) / "found")

        one_and_two(console, f"kNN, {QUERIES:,} queries in {BANK:,} x {DIM}, k = {K}", "queries/s", QUERIES, work)


def empty(console: Console) -> None:
    """Items per second that do nothing."""

    def work(engine: DaskEngine) -> None:
        deque(engine.map(abs, range(N_EMPTY)), 0)

    one_and_two(console, f"{N_EMPTY:,} empty items", "items/s", N_EMPTY, work)


def memory(console: Console) -> None:
    """Memory that many empty items take of the process of scheduler and client, which are one here."""
    with DaskEngine(workers=2) as engine:
        deque(engine.map(abs, range(N_EMPTY)), 0)
        process = psutil.Process()
        before, start = process.memory_info().rss, time.perf_counter()
        deque(engine.map(abs, range(N_MANY)), 0)
        grown, seconds = process.memory_info().rss - before, time.perf_counter() - start
    console.print(
        f"{N_MANY:,} empty items: scheduler and client hold {before / 2**20:.0f} MiB before and "
        f"{grown / 2**20:.0f} MiB more after; {1000 * seconds / N_MANY:.2f} ms an item"
    )


if __name__ == "__main__":
    main()
