"""What scoring again costs: 50,000 ID and 5 x 10,000 OOD rows, bank of 100,000, D = 384, C = 100. ``make bench-score``.

All scores of logits and features and all metrics are one sum, which is to stay below 10 s on two cores. What compares
every row with the bank, or with a matrix of each class, fits and intervals are timed by themselves. Nothing here is a
test.
"""

import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from stages.heads.affine import LinearHead
from stages.machine import usable_cores
from stages.metrics.bootstrap import bootstrap_each, resample_counts
from stages.metrics.ranking import ood_metrics
from stages.scorers import SCORERS, get_scorer
from stages.scorers.inputs import ScoreInputs

BANK, SELECT, ID, OOD, SETS, DIM, CLASSES = 100_000, 10_000, 50_000, 10_000, 5, 384, 100
# Compare every row with every row of the bank; gmm multiplies it with C matrices of D x D, 1.5e12 products in all.
SEARCHED = ("knn", "knn-mean", "nnguide", "relation", "gmm")
GIVEN = {"features", "logits", "head", "bank", "select", "labels"}  # all that every study has
SOME = 2_000  # rows that those are timed on, and scaled to all
INTERVALS = 1000


def main() -> None:
    """Measure and print the table."""
    table = Table(
        title=f"{BANK:,} bank, {ID:,} ID, {SETS} x {OOD:,} OOD rows, D = {DIM}, C = {CLASSES}; {cores()} cores"
    )
    for column in ("score", "fit, s", "score all rows, s"):
        table.add_column(column, justify="left" if column == "score" else "right")
    train, select, ids, *oods = rows(BANK, 0), rows(SELECT, 1), rows(ID, 2), *(rows(OOD, 3 + i) for i in range(SETS))
    spent, fitted = 0.0, 0.0
    for name in SCORERS:
        if name in SEARCHED or not SCORERS[name].needs <= GIVEN:
            continue
        scorer = get_scorer(name)
        fit = seconds(lambda scorer=scorer: scorer.fit(train, select))
        score = seconds(lambda scorer=scorer: [scorer.score(x) for x in (ids, *oods)])
        table.add_row(name, f"{fit:.2f}", f"{score:.2f}")
        spent, fitted = spent + score, fitted + fit
    metrics, intervals = of_metrics(table.row_count)
    table.add_row(f"metrics of {table.row_count} scores", "", f"{metrics:.2f}")
    table.add_row("all of these", f"{fitted:.2f}", f"{spent + metrics:.2f}", end_section=True)
    some = ids.take(slice(0, SOME))
    for name in SEARCHED:
        if name in SCORERS and SCORERS[name].needs <= GIVEN:
            scorer = get_scorer(name)
            fit = seconds(lambda scorer=scorer: scorer.fit(train, select))
            score = seconds(lambda scorer=scorer: scorer.score(some)) * (ID + SETS * OOD) / SOME
            table.add_row(f"{name} (from {SOME:,} rows)", f"{fit:.2f}", f"{score:.1f}")
    table.add_row(f"{INTERVALS} bootstrap replicates of one score", "", f"{intervals:.1f}")
    Console().print(table)


def rows(n: int, seed: int) -> ScoreInputs:
    """Rows around class means that are not negative, farther away with every seed, and a linear head's logits."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(99).normal(size=(CLASSES, DIM)).astype(np.float32)
    labels = rng.integers(CLASSES, size=n)
    features = np.maximum(means[labels] + (0.5 + 0.1 * seed) * rng.standard_normal((n, DIM), dtype=np.float32), 0)
    head = LinearHead(0.1 * means, np.zeros(CLASSES, dtype=np.float32))
    return ScoreInputs(features, head.logits(features), labels, head=head)


def of_metrics(n_scores: int) -> tuple[float, float]:
    """Seconds for the metrics of so many scores, and for the bootstrap of one."""
    rng = np.random.default_rng(0)
    ids = rng.standard_normal(ID, dtype=np.float32)
    oods = [rng.standard_normal(OOD, dtype=np.float32) + 1 for _ in range(SETS)]
    metrics = seconds(lambda: [ood_metrics(ids, ood) for _ in range(n_scores) for ood in oods])
    counts = [resample_counts(n, INTERVALS, seed) for seed, n in enumerate((ID, OOD))]
    return metrics, seconds(lambda: bootstrap_each(ids, oods, counts[0], SETS * [counts[1]]))


def seconds(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cores() -> int:
    """Cores that may be used."""
    return usable_cores()


if __name__ == "__main__":
    main()
