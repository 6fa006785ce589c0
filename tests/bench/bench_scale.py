"""What each step after extraction costs at 10⁴, 10⁵ and 10⁶ rows: time, memory, and their slopes. ``make bench-scale``.

Rows of 384 features around the means of 1,000 classes, as given arrays; a study of N training rows has N / 20 held-out
ID rows, N / 20 ID test rows and 5 x N / 100 OOD rows. Every step runs in a process of its own, and its line is kept in
``<folder>/steps.jsonl`` once it is there: what is interrupted goes on, ``--again`` measures anew. Nothing here is a
test.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.scale.drawn import DrawnStudy
from tests.bench.scale.measured import Cost
from tests.bench.scale.steps import STEPS
from tests.bench.scale.whole import run_study

ROWS = (10_000, 100_000)
# A step is more than linear where its time grows faster than this power of the rows, and time that matters is taken.
_LINEAR, _MATTERS = 1.15, 1.0
_FLAT_BYTES = 768  # of memory for each further row: what its features take in the cache


@dataclass(frozen=True)
class Line:
    """One step at one size."""

    step: str
    rows: int
    cost: Cost


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    asked = _arguments().parse_args()
    if asked.step:
        print(json.dumps(asdict(STEPS[asked.step].cost_of(asked.folder, asked.rows[0]))))
        return
    if asked.study:
        Console(width=120).print(
            table_of_study({rows: run_study(DrawnStudy(asked.folder, rows)) for rows in asked.rows})
        )
        return
    names = [name for name in STEPS if not asked.only or any(word in name for word in asked.only)]
    done = {} if asked.again else {(line.step, line.rows): line for line in _read(asked.folder / "steps.jsonl")}
    for rows in asked.rows:
        for name in names:
            if (name, rows) not in done and not asked.print:
                done[name, rows] = _measure(asked.folder, name, rows)
    lines = [line for line in done.values() if line.step in names and line.rows in asked.rows]
    Console(width=120).print(table_of(lines, names, sorted(asked.rows)))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="training rows")
    parser.add_argument("--only", nargs="+", default=(), help="steps whose names hold one of these")
    parser.add_argument("--folder", type=Path, default=Path("runs/scale"), help="of caches and of what was measured")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--print", action="store_true", help="measure nothing, print what is known")
    parser.add_argument("--study", action="store_true", help="run a whole study instead, by the command line")
    parser.add_argument("--step", choices=tuple(STEPS), help=argparse.SUPPRESS)  # a process of its own
    return parser


def _measure(folder: Path, name: str, rows: int) -> Line:
    command = [sys.executable, "-m", "tests.bench.bench_scale", "--step", name, "--rows", str(rows), "--folder", folder]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
    line = Line(name, rows, Cost(**json.loads(done.stdout.splitlines()[-1])))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "steps.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(line)) + "\n")
    print(
        f"{name} of {rows:,}: {line.cost.cpu_s:.2f} s of CPU, {line.cost.peak_bytes / 2**20:.0f} MiB", file=sys.stderr
    )
    return line


def _read(path: Path) -> Iterable[Line]:
    """What was measured; of a step that was measured again the last."""
    if path.exists():
        for text in path.read_text("utf-8").splitlines():
            known: dict[str, Any] = json.loads(text)
            yield Line(known["step"], known["rows"], Cost(**known["cost"]))


def table_of(lines: Sequence[Line], names: Sequence[str], sizes: Sequence[int]) -> Table:
    """Costs by size; slopes between the two largest sizes that a step was measured at."""
    table = Table(title="CPU seconds / peak MiB beside what stood before; slope: power of the rows; of 384 features")
    for column in ("step", *(f"{rows:,}" for rows in sizes), "slope", "bytes a row", ""):
        table.add_column(column, justify="left" if column in ("step", "") else "right")
    cost = {(line.step, line.rows): line.cost for line in lines}
    for name in names:
        own = [(rows, cost[name, rows]) for rows in sizes if (name, rows) in cost]
        cells = [
            f"{found.cpu_s:.2f} / {found.peak_bytes / 2**20:.0f}" if (found := cost.get((name, rows))) else "–"
            for rows in sizes
        ]
        slope = slopes(own)
        shown = ("–", "–", "") if slope is None else (f"{slope.time:.2f}", f"{slope.bytes_per_row:.0f}", slope.says)
        if own:
            table.add_row(name, *cells, *shown)
    return table


def table_of_study(stages: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Seconds of the wall and the most memory of each stage of whole studies, by their rows."""
    table = Table(title="seconds of the wall / GB of memory of whole studies; of 384 features")
    table.add_column("stage")
    for rows in stages:
        table.add_column(f"{rows:,}", justify="right")
    for name in next(iter(stages.values())):
        own = [found[name] for found in stages.values()]
        table.add_row(name, *(f"{stage['duration_s']:.0f} / {stage['peak_memory_bytes'] / 1e9:.1f}" for stage in own))
    return table


@dataclass(frozen=True)
class Slope:
    """How a step grows: its time as a power of the rows, its memory by the row, and what is worth saying of it."""

    time: float
    bytes_per_row: float
    says: str


def slopes(costs: Sequence[tuple[int, Cost]]) -> Slope | None:
    """Between the two largest sizes; None of fewer than two."""
    if len(costs) < 2:
        return None
    (few, before), (many, after) = sorted(costs, key=lambda own: own[0])[-2:]
    power = math.log(max(after.cpu_s, 1e-3) / max(before.cpu_s, 1e-3)) / math.log(many / few)
    held = (after.peak_bytes - before.peak_bytes) / (many - few)
    says = ["more than linear"] if power > _LINEAR and after.cpu_s > _MATTERS else []
    says += ["not flat"] if held > _FLAT_BYTES else []
    return Slope(power, held, "; ".join(says))


if __name__ == "__main__":
    main()
