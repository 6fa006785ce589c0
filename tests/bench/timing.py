"""How the benchmarks time and print: ours and the limit in turn, in one run."""

import statistics
import time
from collections.abc import Callable

from rich.table import Table

RUNS = 3


def rates(title: str) -> Table:
    """An empty table of rates."""
    table = Table(title=title)
    for column in ("what", "unit", "limit", "ours", "ours / limit"):
        table.add_column(column, justify="left" if column in ("what", "unit") else "right")
    return table


def row(table: Table, what: str, unit: str, limit: float, ours: float) -> None:
    """Add a line of rates."""
    table.add_row(what, unit, f"{limit:.1f}", f"{ours:.1f}", f"{ours / limit:.2f}")


def in_turn(
    amount: float,
    limit: Callable[[], object],
    ours: Callable[[], object],
    runs: int = RUNS,
    tidy: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """Rates of two functions that each do `amount` of work, run in turn after one warm-up; `tidy` is not timed."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 1):
        for measured, function in zip(seconds, (limit, ours), strict=True):
            start = time.perf_counter()
            function()
            if run:
                measured.append(time.perf_counter() - start)
            tidy()
    return amount / statistics.median(seconds[0]), amount / statistics.median(seconds[1])
