"""What linear heads cost: nine strengths, of which one is chosen, beside scikit-learn's fit of each.

``python -m tests.bench.bench_heads``: rows around the means of classes that overlap, float32, a fifth of them held out.
Seconds are of all threads' CPU. scikit-learn fits the same standardised rows in float64, each strength from zero, which
is how heads were fitted here before; of the larger size one strength alone (``--plain`` for all nine, an hour).
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression

from stages.heads import logistic
from stages.heads.affine import LinearHead
from stages.heads.choose import STRENGTHS, HeadRows, choose_head, log_likelihood
from stages.heads.sums import standardisation


class Size(NamedTuple):
    """Rows, features and classes, and how far apart class means are, in deviations of a feature."""

    rows: int
    dim: int
    classes: int
    apart: float

    def __str__(self) -> str:
        return f"{self.rows:,} x {self.dim}, C = {self.classes:,}"


SIZES = (Size(20_000, 384, 200, 0.12), Size(100_000, 768, 1000, 0.1))


def drawn(size: Size) -> HeadRows:
    """Rows to fit on, and a fifth to judge by."""
    rng = np.random.default_rng(0)
    means = size.apart * rng.standard_normal((size.classes, size.dim), np.float32)
    labels = rng.integers(0, size.classes, size.rows).astype(np.int32)
    features = means[labels] + rng.standard_normal((size.rows, size.dim), np.float32)
    fitted = size.rows - size.rows // 5
    return HeadRows(features[:fitted], labels[:fitted], features[fitted:], labels[fitted:])


def objective(head: LinearHead, rows: HeadRows, strength: float) -> float:
    """What is minimised, a row."""
    penalty = float(np.square(np.float64(head.weight)).sum()) / (2 * strength * len(rows.labels))
    return penalty - float(log_likelihood(head, rows.features, rows.labels).mean())


class Plain(NamedTuple):
    """scikit-learn's head of one strength, the steps that it took and seconds."""

    head: LinearHead
    steps: int
    seconds: float


def plainly(rows: HeadRows, strength: float) -> Plain:
    """From zero, in float64, to scikit-learn's own tolerance."""
    standardise = standardisation(rows.features)
    given: NDArray[np.float64] = standardise(np.asarray(rows.features), np.float64)
    start = time.process_time()
    found = LogisticRegression(C=strength, max_iter=1000).fit(given, rows.labels)
    seconds = time.process_time() - start
    return Plain(LinearHead(found.coef_, found.intercept_, standardise), int(found.n_iter_.max()), seconds)


def measure(size: Size, strengths: Sequence[float] | None, table: Table) -> None:
    """Ours, and scikit-learn's of the strengths that are given or of the chosen one."""
    rows, passes = drawn(size), 0
    plain_loss = logistic.head_loss

    def counted(*given: Any) -> Any:
        nonlocal passes
        passes += 1
        return plain_loss(*given)

    logistic.head_loss = counted
    start = time.process_time(), time.perf_counter()
    ours = choose_head(rows, size.classes)
    seconds = time.process_time() - start[0]
    wall = time.perf_counter() - start[1]
    logistic.head_loss = plain_loss
    fits = {strength: plainly(rows, strength) for strength in strengths or [ours.strength]}
    own = objective(ours.head, rows, ours.strength)
    table.add_row(
        str(size), f"ours, {len(ours.judged)} of {len(STRENGTHS)}", str(passes), f"{seconds:.1f}", f"{wall:.1f}",
        f"{ours.strength:g}", f"{own:.7f}",
    )  # fmt: skip
    theirs = f"{objective(fits[ours.strength].head, rows, ours.strength):.7f}" if ours.strength in fits else "–"
    spent = sum(fit.seconds for fit in fits.values())
    steps = sum(fit.steps for fit in fits.values())
    table.add_row("", f"scikit-learn, {len(fits)}", str(steps), f"{spent:.1f}", "", "", theirs)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", action="store_true", help="scikit-learn at all strengths, of the larger size too")
    parser.add_argument("--small", action="store_true", help="the smaller size alone")
    given = parser.parse_args()
    table = Table(
        "rows",
        "what",
        "passes, or steps",
        "CPU seconds",
        "seconds",
        "strength",
        "objective at it",
        title="linear heads",
    )
    for number, size in enumerate(SIZES[:1] if given.small else SIZES):
        measure(size, STRENGTHS if given.plain or not number else None, table)
    Console().print(table)


if __name__ == "__main__":
    main()
