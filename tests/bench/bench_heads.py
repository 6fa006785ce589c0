"""What linear heads cost: nine strengths, of which one is chosen, beside scikit-learn's fit of each.

``python -m tests.bench.bench_heads``: rows around the means of classes that overlap, float32, a fifth of them held out.
Seconds are of all threads' CPU. scikit-learn fits the same standardised rows in float64, each strength from zero, which
is how heads were fitted here before; of the larger size one strength alone (``--plain all`` for all nine, an hour).
``--device cuda`` fits ours on a GPU, ``--sizes imagenet-vit-s imagenet-vit-b`` heads of ImageNet-1K's rows.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression

from stages.context import Context
from stages.heads import logistic
from stages.heads.affine import LinearHead
from stages.heads.choose import STRENGTHS, HeadRows, choose_head
from stages.heads.places import summing_of
from stages.heads.summing import HERE, Summing
from stages.heads.sums import standardisation


class Size(NamedTuple):
    """Rows, features and classes, and how far apart class means are, in deviations of a feature."""

    rows: int
    dim: int
    classes: int
    apart: float

    def __str__(self) -> str:
        return f"{self.rows:,} x {self.dim}, C = {self.classes:,}"


SIZES = {
    "small": Size(20_000, 384, 200, 0.12),
    "large": Size(100_000, 768, 1000, 0.1),
    "imagenet-vit-s": Size(1_281_167, 384, 1000, 0.12),
    "imagenet-vit-b": Size(1_281_167, 768, 1000, 0.1),
}


def drawn(size: Size) -> HeadRows:
    """Rows to fit on, and a fifth to judge by."""
    rng = np.random.default_rng(0)
    means = size.apart * rng.standard_normal((size.classes, size.dim), np.float32)
    labels = rng.integers(0, size.classes, size.rows).astype(np.int32)
    features = rng.standard_normal((size.rows, size.dim), np.float32)
    features += means[labels]
    fitted = size.rows - size.rows // 5
    return HeadRows(features[:fitted], labels[:fitted], features[fitted:], labels[fitted:])


def objective(head: LinearHead, rows: HeadRows, strength: float, summing: Summing = HERE) -> float:
    """What is minimised, a row."""
    penalty = float(np.square(np.float64(head.weight)).sum()) / (2 * strength * len(rows.labels))
    return penalty - float(summing.log_likelihood(head, rows.features, rows.labels).mean())


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


def measure(name: str, device: str, strengths: Sequence[float] | None, table: Table) -> None:
    """Ours, and scikit-learn's of the strengths that are given; None: of the chosen one."""
    size = SIZES[name]
    rows, passes = drawn(size), 0
    plain_loss = logistic.head_loss

    def counted(*given: Any) -> Any:
        nonlocal passes
        passes += 1
        return plain_loss(*given)

    logistic.head_loss = counted
    summing = summing_of(Context(device=device), Path())
    start = time.process_time(), time.perf_counter()
    ours = choose_head(rows, size.classes, summing=summing)
    seconds = time.process_time() - start[0]
    wall = time.perf_counter() - start[1]
    logistic.head_loss = plain_loss
    own = objective(ours.head, rows, ours.strength, summing)
    table.add_row(
        str(size), f"ours, {len(ours.judged)} of {len(STRENGTHS)}", str(passes), f"{seconds:.1f}", f"{wall:.1f}",
        f"{ours.strength:g}", f"{own:.7f}",
    )  # fmt: skip
    fits = {strength: plainly(rows, strength) for strength in ([ours.strength] if strengths is None else strengths)}
    if not fits:
        return
    theirs = (
        f"{objective(fits[ours.strength].head, rows, ours.strength, summing):.7f}" if ours.strength in fits else "–"
    )
    spent = sum(fit.seconds for fit in fits.values())
    steps = sum(fit.steps for fit in fits.values())
    table.add_row("", f"scikit-learn, {len(fits)}", str(steps), f"{spent:.1f}", "", "", theirs)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "large"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where ours are fitted")
    parser.add_argument("--plain", choices=["none", "chosen", "all"], help="scikit-learn's; all of the small size else")
    given = parser.parse_args()
    heads = ("rows", "what", "passes, or steps", "CPU seconds", "seconds", "strength", "objective at it")
    table = Table(*heads, title=f"linear heads, {given.device}")
    for name in given.sizes:
        plain = given.plain or ("all" if name == "small" else "chosen")
        measure(name, given.device, {"none": [], "chosen": None, "all": STRENGTHS}[plain], table)
    Console().print(table)


if __name__ == "__main__":
    main()
