"""What workers add: extraction, the search of neighbours and a linear head's step with one and with two of them, and
what an item costs.

Beside them two processes that know nothing of each other do the same: what two cores of this machine are worth.

``make bench-cluster``, ``ARGS="--only knn"`` for a part. Workers are started before anything is timed. Not a test.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

import pipeline.__main__  # noqa: F401  the process is set up as the command line sets it up
from pipeline.engine import DaskEngine
from tests.bench.timing import RUNS

if TYPE_CHECKING:
    from stages.networks.backbone import Backbone

N_IMAGES, SHARD = 192, 16
BANK, QUERIES, DIM, K = 32_768, 16_384, 384, 200
HEAD_ROWS, HEAD_CLASSES = 12 * 16_384, 500  # groups of blocks, more than memory keeps
N_EMPTY, N_MANY = 500, 100_000
LONG_S = 0.05  # an item whose successor waits at the worker, as shards do


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts: dict[str, Callable[[Console], None]] = {
        "extract": extract,
        "knn": knn,
        "head": head,
        "empty": empty,
        "memory": memory,
    }
    parser.add_argument("--only", choices=parts)
    only = parser.parse_args().only
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # of the bare processes, as Dask's workers have
    for name, part in parts.items():
        if only in (None, name):
            part(Console())


def one_and_two(
    console: Console,
    what: str,
    unit: str,
    amount: float,
    work: Callable[[Any], object],
    bare: Callable[[int], object] | None = None,
) -> None:
    """Print the rates of a piece of work with one worker and with two, in turn after one warm-up.

    Args:
        console: printed to.
        what: the work.
        unit: of the rates.
        amount: of work.
        work: does it with an engine.
        bare: does as much in a process of its own, the number of which it is given.
    """
    seconds: dict[str, list[float]] = {}
    with (
        DaskEngine(workers=1) as one,
        DaskEngine(workers=2) as two,
        ProcessPoolExecutor(2, get_context("spawn")) as pool,
    ):
        ways: dict[str, Callable[[], object]] = {"1 worker": partial(work, one), "2 workers": partial(work, two)}
        if bare is not None:
            ways |= {f"{n} bare": partial(lambda n: deque(pool.map(bare, range(n)), 0), n) for n in (1, 2)}
        for run in range(RUNS + 1):
            for way, function in ways.items():
                start = time.perf_counter()
                function()
                if run:
                    seconds.setdefault(way, []).append(time.perf_counter() - start)
    rates = {way: amount / statistics.median(own) for way, own in seconds.items()}
    table = Table("what", "unit", *rates, "2 / 1 worker", *(["2 / 1 bare"] if bare else []))
    if bare is not None:
        rates["2 bare"] *= 2
    pairs = [rates["2 workers"] / rates["1 worker"], *([rates["2 bare"] / rates["1 bare"]] if bare else [])]
    table.add_row(what, unit, *(f"{rate:.1f}" for rate in rates.values()), *(f"{pair:.2f}" for pair in pairs))
    console.print(table)


@lru_cache(maxsize=1)
def _backbone() -> "Backbone":
    from stages.config import BackboneConfig
    from stages.networks.backbone import load_backbone

    return load_backbone(BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=224))


def _extract(folder: Path, mapper: Any, out: str) -> None:
    from stages.extract import ExtractOptions, extract_set
    from stages.inputs.images import list_images

    spec, samples = _backbone().feature_spec("float16", "full"), list_images(str(folder / "jpeg"))
    options = ExtractOptions(shard_rows=SHARD, mapper=mapper)
    extract_set("bench", samples, spec, folder / out, _backbone, options=options)


def _extract_alone(folder: Path, number: int) -> None:
    """Shard after shard in this process, as a worker makes them."""
    _extract(folder, map, f"bare-{number}-{time.monotonic_ns()}")


def extract(console: Console) -> None:
    """Images per second of extraction."""
    from tests.bench.bench_extract import write_jpegs

    versions = count()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_jpegs(folder / "jpeg", N_IMAGES)

        def work(engine: DaskEngine) -> None:
            _extract(folder, engine.map, str(next(versions)))

        what = f"extraction, EfficientNet-Lite0 at 224 px, {N_IMAGES} images in shards of {SHARD}"
        one_and_two(console, what, "images/s", N_IMAGES, work, partial(_extract_alone, folder))


class _Here:
    """A cluster of this process alone."""

    map = staticmethod(map)


def _search(folder: Path, cluster: Any) -> None:
    from stages.scorers.neighbours.bank import FeatureBank
    from stages.scorers.neighbours.cluster import cluster_distances

    rng = np.random.default_rng(0)
    bank = FeatureBank(rng.standard_normal((BANK, DIM), dtype=np.float32), device="cpu")
    queries = rng.standard_normal((QUERIES, DIM), dtype=np.float32)
    cluster_distances(bank, queries, K, cluster, folder)


def _search_alone(folder: Path, number: int) -> None:
    _search(folder / f"bare-{number}", _Here)


def knn(console: Console) -> None:
    """Queries per second of the search of neighbours."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        what = f"kNN, {QUERIES:,} queries in {BANK:,} x {DIM}, k = {K}"
        one_and_two(
            console, what, "queries/s", QUERIES, partial(_search, folder / "found"), partial(_search_alone, folder)
        )


def _step(folder: Path, cluster: Any) -> None:
    from stages.files.handed import HandedFolder
    from stages.heads.affine import Standardisation
    from stages.heads.handed import HandedRows
    from stages.heads.sums import GivenRows, StandardisedRows, head_loss

    features = np.load(folder / "features.npy", mmap_mode="r")
    labels = np.arange(HEAD_ROWS, dtype=np.int32) % HEAD_CLASSES
    given = GivenRows(features, labels, Standardisation(np.zeros(DIM, np.float32), np.ones(1, np.float32)))
    with HandedFolder(folder / f"{os.getpid()}") as shared:
        rows = StandardisedRows(given, None, 1, np.float32, HandedRows(given, cluster, shared))
        head_loss(rows, np.zeros((HEAD_CLASSES, DIM)), np.zeros(HEAD_CLASSES))


def _step_alone(folder: Path, _number: int) -> None:
    _step(folder, _Here)


def head(console: Console) -> None:
    """Rows per second of a linear head's loss and gradient."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, (HEAD_ROWS, DIM))
        features[:] = np.random.default_rng(0).standard_normal((HEAD_ROWS, DIM), dtype=np.float32)
        del features
        what = f"loss and gradient of a head, {HEAD_ROWS:,} x {DIM}, C = {HEAD_CLASSES}"
        one_and_two(console, what, "rows/s", HEAD_ROWS, partial(_step, folder), partial(_step_alone, folder))


def empty(console: Console) -> None:
    """Items per second that do nothing."""

    def work(engine: DaskEngine) -> None:
        deque(engine.map(abs, range(N_EMPTY)), 0)

    one_and_two(console, f"{N_EMPTY:,} empty items", "items/s", N_EMPTY, work)
    with DaskEngine(workers=1) as engine:
        work(engine)
        busy, n = time.process_time(), 100
        work(engine)
        busy = (time.process_time() - busy) / N_EMPTY
        start = time.perf_counter()
        deque(engine.map(time.sleep, [LONG_S] * n), 0)
        more = (time.perf_counter() - start) / n - LONG_S
    console.print(
        f"an empty item: {1000 * busy:.1f} ms of CPU of the process that hands out; an item of {1000 * LONG_S:.0f} ms "
        f"takes {1000 * more:.1f} ms more"
    )


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
