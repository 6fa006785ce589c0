"""A step on the CPU in sizes of nothing."""

from pathlib import Path

from tests.bench.gpu.step import TINY, Bench, Step, Value
from tests.bench.gpu.worker import run_step


def run(step: Step, scratch: Path) -> None:
    """Run it in this process; it has to end well, with values that hold, or to say what is missing."""
    values, ends = list[Value](), list[tuple[str, object]]()
    run_step(step, Bench("cpu", TINY, scratch, scratch, values.append), lambda *said: ends.append(said))
    (_, _), (kind, what) = ends
    assert kind in ("done", "not run"), what
    assert [value for value in values if not value.holds] == []
    assert values or kind == "not run"
