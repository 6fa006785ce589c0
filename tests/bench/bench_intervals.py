"""How often the 95 % intervals of `stages.metrics.intervals` hold the truth, by simulation.

``python -m tests.bench.bench_intervals [DRAWS]``. ID scores are drawn from N(0, 1), OOD scores from N(m, 1) with m for
the FPR95 or AUROC that is asked; a line each.
"""

import sys

import numpy as np
from scipy.special import ndtri

from stages.metrics.intervals import SetParts, auroc_interval, fpr95_interval

SIZES = ((20, 20), (60, 30), (100, 30), (400, 50), (50, 1000), (400, 400), (1200, 1000))
TRUTHS = {"FPR95": (0.009, 0.05, 0.2, 0.5, 0.9), "AUROC": (0.6, 0.8, 0.95, 0.99, 0.999)}


def coverage(metric: str, truth: float, n_id: int, n_ood: int, draws: int) -> float:
    """Share of draws whose interval holds the truth."""
    rng = np.random.default_rng(0)
    shift = ndtri(0.95) - ndtri(truth) if metric == "FPR95" else np.sqrt(2) * ndtri(truth)
    interval = fpr95_interval if metric == "FPR95" else auroc_interval
    found = (interval([SetParts.of(rng.normal(size=n_id), rng.normal(shift, size=n_ood))]) for _ in range(draws))
    return float(np.mean([lo <= truth <= hi for lo, hi in found]))


def main(draws: int = 1000) -> None:
    """Print a table for each metric."""
    for metric, truths in TRUTHS.items():
        print(f"| {metric} | " + " | ".join(f"{n_id} ID, {n_ood} OOD" for n_id, n_ood in SIZES) + " |")
        print("|---" * (len(SIZES) + 1) + "|")
        for truth in truths:
            cells = (f"{100 * coverage(metric, truth, *sizes, draws):.1f}" for sizes in SIZES)
            print(f"| {100 * truth:g} % | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
