"""Nearest neighbours by FAISS on the GPUs that it sees, beside a flat search on the CPU."""

import faiss
import numpy as np

from stages.scorers.neighbours.bank import FeatureBank
from tests.bench.gpu.step import Bench, NotRun
from tests.bench.gpu.subjects import rate

K = 50
COMPARED = 512  # queries
TOLERANCE = 1e-6  # of a distance, which the bank promises


def search(bench: Bench) -> None:
    """Distances and neighbours of the project's own bank, and queries a second."""
    if bench.device == "cuda" and not getattr(faiss, "get_num_gpus", int)():
        raise NotRun("faiss without GPU")
    rng = np.random.default_rng(0)
    sizes = bench.sizes
    features, queries = (rng.standard_normal((n, sizes.dim), dtype=np.float32) for n in (sizes.bank, sizes.queries))
    queries[: len(queries) // 8] = features[: len(queries) // 8] + 0.01  # some have a very near one
    ours, flat = FeatureBank(features), FeatureBank(features, device="cpu")
    some = queries[:COMPARED]
    (distances, rows), (exact, exact_rows) = ours.search(some, K), flat.search(some, K)
    bench.measure("distances: largest difference", np.abs(distances - exact).max(), at_most=TOLERANCE)
    bench.measure("neighbours that are the same, in their order", (rows == exact_rows).mean(), at_least=0.99)
    k_th = exact[:, -1:] + TOLERANCE
    bench.measure("neighbours as near as the k-th", (distances <= k_th).mean(), at_least=1)
    bench.measure(f"ours, {sizes.bank:,} x {sizes.dim}, k = {K}", timed(bench, ours, queries), "queries/s")
    bench.measure("flat, CPU", timed(bench, flat, some), "queries/s")
    if bench.device == "cuda":
        index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(sizes.dim))
        index.add(features)
        bare = rate(bench, len(queries), lambda: index.search(queries, K))
        bench.measure("bare search on the GPU", bare, "queries/s")


def timed(bench: Bench, bank: FeatureBank, queries: np.ndarray) -> float:
    """Queries a second."""
    return rate(bench, len(queries), lambda: bank.search(queries, K))
