"""How far kNN is from a bare FAISS search, and from scikit-learn. ``make bench-knn``. Nothing here is a test.

Searches in turn, medians. Then stage three on features of one study: from the call to the first row of the table, when
all is searched, and with another k, when neighbours are known.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.neighbors import NearestNeighbors

from stages.config import ScoreConfig
from stages.detection.sources import BackboneSource, ScoredSet
from stages.extract import import_set
from stages.heads.affine import LinearHead
from stages.heads.choose import FittedHeads
from stages.id_data.rows import id_data
from stages.inputs.arrays import list_arrays
from stages.progress import NullProgress
from stages.score import score
from stages.scorers.neighbours.bank import FeatureBank
from stages.scorers.shared.arrays import l2_normalise
from tests.bench.timing import RUNS, in_turn, rates, row

BANK, QUERIES, DIM, K = 100_000, 2_000, 384, 50
ROWS = {"train": BANK, "val": 10_000, "test": 50_000} | {f"ood-{number}": 10_000 for number in range(5)}
CLASSES = 100


def main() -> None:
    """Measure and print the tables."""
    console = Console()
    threads = faiss.omp_get_max_threads()
    table = rates(f"median of {RUNS} runs each, in turn; {threads} threads; limit: bare FAISS")
    for what, limit, ours in searches():
        row(table, what, "queries/s", limit, ours)
    console.print(table)
    sizes = f"bank {BANK:,}, {ROWS['test']:,} ID and 5 x 10,000 OOD rows, D = {DIM}, C = {CLASSES}; {threads} threads"
    table = Table("kNN in stage three", "to the first row, s", "from there to its intervals, s", title=sizes)
    with tempfile.TemporaryDirectory() as folder:
        source = made_up(Path(folder))
        for k, what in ((K, "searched"), (10, "another k"), (100, "another k"), (200, "another k")):
            first, intervals = first_row(source, k, Path(folder) / "scores")
            table.add_row(f"k = {k}, {what}", f"{first:.2f}", f"{intervals:.2f}")
    console.print(table)


def searches() -> list[tuple[str, float, float]]:
    """Queries per second of bare FAISS and of another, run in turn."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((BANK, DIM), dtype=np.float32)
    queries = rng.standard_normal((QUERIES, DIM), dtype=np.float32)
    index = faiss.IndexFlatIP(DIM)
    index.add(l2_normalise(features))
    unit = l2_normalise(queries)
    held = FeatureBank(features, device="cpu")
    blocks = FeatureBank(features, device="cpu", held_bytes=0)
    others: dict[str, Callable[[], object]] = {
        f"ours, {BANK:,} x {DIM}, k = {K}": lambda: held.search(queries, K),
        "ours, a bank that is not held, by blocks": lambda: blocks.search(queries, K),
    }
    for metric in ("cosine", "euclidean"):  # cosine: what the official code searches with
        neighbours = NearestNeighbors(n_neighbors=K, metric=metric).fit(features if metric == "cosine" else held._unit)
        asked = queries if metric == "cosine" else unit
        others[f"scikit-learn, {metric}"] = lambda searched=neighbours, asked=asked: searched.kneighbors(asked)
    return [(what, *in_turn(QUERIES, lambda: index.search(unit, K), other)) for what, other in others.items()]


def made_up(folder: Path) -> BackboneSource:
    """Features around class means, in sealed caches, with a head that nobody fitted."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((2 * CLASSES, DIM), dtype=np.float32)
    caches = {}
    for name, n in ROWS.items():
        labels = np.arange(n) % CLASSES
        shift = CLASSES if name.startswith("ood") else 0
        features = means[labels + shift] + rng.standard_normal((n, DIM), dtype=np.float32)
        np.savez(folder / f"{name}.npz", cls=features.astype(np.float16), label=labels)
        table = list_arrays(str(folder / f"{name}.npz"))
        caches[name] = import_set(name, table, table.spec("made up", "float16"), folder)
    head = LinearHead(means[:CLASSES] / DIM, np.zeros(CLASSES, np.float32))
    groups = {"test": "id"} | {name: "far" for name in ROWS if name.startswith("ood")}
    return BackboneSource(
        name="pretrained",
        seed=None,
        data=id_data(caches["train"], caches["val"], 0.2),
        probe=FittedHeads((head,), head, 1.0, {}),
        finetuned_head=None,
        mixtures=(),
        tests=tuple(ScoredSet(name, group, caches[name]) for name, group in groups.items()),
        architecture=lambda: None,
    )


class FirstRow(NullProgress):
    """Remembers when the first row was said, and when its detector was done, intervals and all."""

    said: float | None = None
    done: float | None = None

    def note(self, line: str) -> None:
        """A row is said."""
        self.said = self.said or time.perf_counter()

    def advance(self, n: int = 1, **values: object) -> None:
        """A detector is done."""
        self.done = self.done or time.perf_counter()


def first_row(source: BackboneSource, k: int, folder: Path) -> tuple[float, float]:
    """Seconds to the first row of the table, and from there to its bootstrap intervals."""
    progress = FirstRow()
    start = time.perf_counter()
    score([source], ScoreConfig(scores=["knn"], k=k), folder, progress)  # of one row alone
    assert progress.said is not None
    assert progress.done is not None
    return progress.said - start, progress.done - progress.said


if __name__ == "__main__":
    main()
