"""What the check found: a table for the terminal, ``gpu.json``, and a section of Markdown to paste."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from textwrap import fill

from rich.table import Table

from pipeline.record import git_revision, hardware, versions
from stages.files.documents import write_json
from tests.bench.gpu.runner import BAD, UNTRIED, Check, Outcome, Plan, as_json, from_json
from tests.bench.gpu.step import Value

_NAMED = ("torch", "torchvision", "timm", "numpy", "h5py", "faiss-gpu", "faiss-cpu")
_COLUMNS = ("step", "verdict", "s", "measured", "value", "held to")


class Kept:
    """``gpu.json``, written anew whenever something was found.

    Args:
        path: of the file.
        check: what it is about.
    """

    def __init__(self, path: Path, check: Check) -> None:
        self._path, self._check = path, check
        check.about = {"machine": hardware(), "versions": _versions(), "git": git_revision()}

    def write(self) -> None:
        """Write all that is known."""
        check, plan = self._check, self._check.plan
        steps = [as_json(outcome) for outcome in check.outcomes]
        asked = {"device": plan.device, "sizes": plan.sizes, "seconds": plan.seconds}
        found = {"verdict": verdict(check), "gpu": check.gpu}
        write_json(self._path, found | asked | check.about | {"steps": steps})


def read_kept(paths: Sequence[Path]) -> Check:
    """What one or several runs on one machine have kept; of a step that stands in several, the last that it ran in."""
    runs = [json.loads(path.read_text("utf-8")) for path in paths]
    first = runs[0]
    plan = Plan("", first["device"], first["sizes"], Path(), sum(run["seconds"] for run in runs))
    outcomes: dict[str, Outcome] = {}
    for outcome in (from_json(step) for run in runs for step in run["steps"]):
        if outcome.verdict not in UNTRIED or outcome.step.name not in outcomes:
            outcomes[outcome.step.name] = outcome
    about = {name: first[name] for name in ("machine", "versions", "git")}
    return Check(plan, list(outcomes.values()), first["gpu"], about)


def verdict(check: Check) -> str:
    """Of the whole: failed by any step, unfinished where one is waiting or out of time, else passed."""
    found = {outcome.verdict for outcome in check.outcomes}
    if found & set(BAD):
        return "failed"
    return "unfinished" if found & set(UNTRIED) or "passed" not in found else "passed"


def table(check: Check) -> Table:
    """All steps, a line a value."""
    shown = Table(title=_title(check))
    for column in _COLUMNS:
        shown.add_column(column, justify="right" if column in ("s", "value", "held to") else "left")
    for outcome in check.outcomes:
        for cells in _lines(outcome):
            shown.add_row(*cells)
    return shown


def markdown(check: Check) -> str:
    """The same as a section of `tests/bench/README.md`, with what each step proves."""
    rows = [f"| {' | '.join(_COLUMNS)} |", "|---|---|---:|---|---:|---:|"]
    rows += [f"| {' | '.join(cells)} |" for outcome in check.outcomes for cells in _lines(outcome)]
    proved = [f"- **{outcome.step.name}**: {outcome.step.proves}." for outcome in check.outcomes]
    return "\n".join([fill(f"{_title(check)}.", 120), "", *rows, "", *proved, ""])


def _title(check: Check) -> str:
    gpu = check.gpu
    where = (
        f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}, NCCL {gpu['nccl']}"
        if gpu
        else check.plan.device
    )
    found = check.about["versions"]
    shown = [f"{name} {found[name]}" for name in _NAMED if name in found]
    return ", ".join([where, f"{check.about['machine']['cores']} cores", *shown])


def _versions() -> dict[str, str]:
    """Of what the project runs on; of the most important also where a bare checkout runs."""
    found = versions()
    for name in _NAMED:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _lines(outcome: Outcome) -> Iterator[tuple[str, ...]]:
    about = (outcome.step.name, outcome.verdict, f"{outcome.seconds:.1f}" if outcome.seconds else "")
    if outcome.said:
        yield (*about, outcome.said.replace("|", "/"), "", "")
        about = ("", "", "")
    for value in outcome.values:
        yield (*about, value.what, _number(value.value, value.unit), _limit(value))
        about = ("", "", "")
    if about[0]:
        yield (*about, "", "", "")


def _number(value: float, unit: str) -> str:
    digits = ",.0f" if abs(value) >= 100 or value in (0, 1) else ".1f" if abs(value) >= 10 else ".2g"
    return f"{value:{digits}} {unit}".rstrip()


def _limit(value: Value) -> str:
    limits = []
    if value.at_least is not None:
        limits.append(f"≥ {_number(value.at_least, '')}")
    if value.at_most is not None:
        limits.append(f"≤ {_number(value.at_most, '')}")
    return ", ".join(limits) + ("" if value.holds else " ✗")
