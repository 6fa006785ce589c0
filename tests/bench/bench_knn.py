"""How far kNN is from a bare FAISS search. ``make bench-knn``. Both in turn; medians. Nothing here is a test."""

import faiss
import numpy as np
from rich.console import Console

from stages.bank import FeatureBank, l2_normalise
from tests.bench.timing import RUNS, in_turn, rates, row

BANK, QUERIES, DIM, K = 100_000, 2_000, 384, 50


def main() -> None:
    """Measure and print the table."""
    table = rates(f"median of {RUNS} runs each, in turn; {faiss.omp_get_max_threads()} threads")
    row(table, f"kNN, {BANK:,} x {DIM}, k = {K}", "queries/s", *search())
    Console().print(table)


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
