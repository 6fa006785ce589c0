"""Runs the steps in processes of their own, within the time there is, and keeps what was measured at every moment.

One process runs step after step until one of them raises, ends it or has to be stopped; the next goes on with the
others. It is killed with all that it has started.
"""

import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from tests.bench.gpu.step import Step, Value
from tests.bench.gpu.worker import TRACEBACK_LINES, named

ROOT = Path(__file__).resolve().parents[3]
LEAST_S = 3.0  # a step is not begun with less
START_S = 120.0  # in which a process has to be up
_LONGEST = 300  # letters of a line that is kept
_COMMAND = (sys.executable, "-X", "faulthandler", "-m", "tests.bench.gpu.worker")


class NoGpuError(Exception):
    """No GPU answers."""


Verdict = Literal["waiting", "running", "passed", "failed", "timed out", "crashed", "not run", "out of time"]
BAD: tuple[Verdict, ...] = ("failed", "timed out", "crashed")
UNTRIED: tuple[Verdict, ...] = ("waiting", "running", "out of time")


@dataclass
class Outcome:
    """What came of a step.

    Attributes:
        step: which.
        verdict: "failed" by a value outside its limits or an exception; "not run" where something is missing; "out of
            time" where that of all steps was up before it began, or before it had as much as it may take.
        seconds: that it took.
        values: in the order of their measurement; those of a step that was stopped stay.
        said: why it failed or did not run.
        diagnostics: last lines of the traceback, or of what its process printed.
    """

    step: Step
    verdict: Verdict = "waiting"
    seconds: float = 0.0
    values: list[Value] = field(default_factory=list)
    said: str = ""
    diagnostics: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        listing: ``module:name`` of the steps.
        device: where.
        sizes: name of the sizes.
        scratch: an empty folder.
        seconds: for all.
        only: names of those that are run, in this order; none: all, as they are listed.
    """

    listing: str
    device: str
    sizes: str
    scratch: Path
    seconds: float
    only: tuple[str, ...] = ()

    def outcomes(self) -> list[Outcome]:
        """Of all steps that are run, none of which has.

        Raises:
            KeyError: a name that no step has.
        """
        steps: Sequence[Step] = named(self.listing)
        by_name = {step.name: step for step in steps}
        return [Outcome(by_name[name]) for name in dict.fromkeys(self.only or by_name)]


@dataclass
class Check:
    """A run of the steps, as far as it has come.

    Attributes:
        plan: of it.
        outcomes: of all steps, in their order.
        gpu: as torch sees it.
        about: machine, versions and commit.
    """

    plan: Plan
    outcomes: list[Outcome]
    gpu: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def run_steps(check: Check, keep: Callable[[], None], note: Callable[[str], None] = lambda line: None) -> None:
    """Run steps in their order.

    Args:
        check: filled in.
        keep: called whenever it has changed.
        note: told of each step that has ended, in a line.

    Raises:
        NoGpuError: before any step, where none answers.
    """
    plan = check.plan
    until = time.monotonic() + plan.seconds
    worker: _Worker | None = None
    with _ending_on_term():
        try:
            for outcome in check.outcomes:
                if until - time.monotonic() < LEAST_S:
                    outcome.verdict = "out of time"
                    keep()
                    continue
                started, outcome.verdict = time.monotonic(), "running"
                if worker is None:
                    worker = _Worker(plan)
                ended = _run(worker, outcome, until, keep)
                check.gpu = worker.gpu or check.gpu
                outcome.seconds = outcome.seconds or round(time.monotonic() - started, 2)
                keep()
                note(f"{outcome.step.name}: {outcome.verdict} ({outcome.seconds:.1f} s) {outcome.said}".rstrip())
                if ended:
                    worker.kill()
                    worker = None
        finally:
            if worker is not None:
                worker.kill()


def _run(worker: "_Worker", outcome: Outcome, until: float, keep: Callable[[], None]) -> bool:
    """Run one step; whether its process is of no more use."""
    now = time.monotonic()
    if worker.gpu is None:
        ready = next(worker.messages(min(until, now + START_S)), None)
        if ready is None:
            return _stopped(worker, outcome, "to start", until - now, START_S)
        worker.gpu = ready[1]
        if worker.gpu is None:
            raise NoGpuError
        now = time.monotonic()
    worker.ask(outcome.step.name)
    begun = next(worker.messages(min(until, now + START_S)), None)
    if begun is None:
        return _stopped(worker, outcome, "to import what it needs", until - now, START_S)
    now = time.monotonic()
    limit = max(0.0, min(until - now, outcome.step.limit_s))
    for kind, what in chain([begun], worker.messages(now + limit)):
        if kind == "begun":
            continue
        if kind == "value":
            outcome.values.append(Value(**what))
            keep()
        elif kind == "not run":
            outcome.verdict, outcome.said = "not run", what
            return False
        elif kind == "failed":
            outcome.verdict, outcome.said, outcome.diagnostics = "failed", what["error"], what["traceback"]
            return True  # what CUDA refuses once, it may refuse ever after
        else:
            wrong = [value.what for value in outcome.values if not value.holds]
            outcome.verdict, outcome.seconds = "failed" if wrong else "passed", what
            outcome.said = f"outside its limit: {'; '.join(wrong)}" if wrong else ""
            return False
    return _stopped(worker, outcome, "to run", until - now, outcome.step.limit_s)


def _stopped(worker: "_Worker", outcome: Outcome, what: str, left_s: float, limit_s: float) -> bool:
    """The process ended by itself, or its time is up, which it may have had less of than it may take."""
    code = worker.wait(0.5)
    if code is None:
        worker.dump()
    worker.kill()
    if code is None:
        if left_s < limit_s:
            outcome.verdict, outcome.said = "out of time", f"{max(0.0, left_s):.0f} s of {limit_s:.0f} were left {what}"
        else:
            outcome.verdict, outcome.said = "timed out", f"it had {limit_s:.0f} s {what}"
    else:
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        outcome.verdict, outcome.said = "crashed", f"its process ended with {how}"
    outcome.diagnostics = worker.last_lines()
    return True


class _Worker:
    """A process of `tests.bench.gpu.worker`."""

    _number = 0

    def __init__(self, plan: Plan) -> None:
        _Worker._number += 1
        self.gpu: dict[str, Any] | None = None  # once it is up; empty where the check runs on the CPU
        self._log = plan.scratch / f"worker-{_Worker._number}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*_COMMAND, plan.listing, plan.device, plan.sizes, str(plan.scratch)],
                cwd=ROOT,
                env=os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if plan.device == "cpu" else {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a group that can be killed as one
            )
        self._said: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.put(line.decode("utf-8", "replace"))
        self._said.put(None)

    def ask(self, name: str) -> None:
        """Have a step run."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone, which is found out by what it does not say
            self._process.stdin.write(f"{name}\n".encode())
            self._process.stdin.flush()

    def messages(self, until: float) -> Iterator[tuple[str, Any]]:
        """What it says, until then or until it ends."""
        while True:
            try:
                line = self._said.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return
            if line is None:
                return
            (message,) = json.loads(line).items()
            yield message

    def wait(self, seconds: float) -> int | None:
        """Its exit status, where it ends within so many seconds."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def dump(self) -> None:
        """Have it print where it is, and end."""
        self._process.send_signal(signal.SIGABRT)
        self.wait(1)

    def kill(self) -> None:
        """End it and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def last_lines(self) -> list[str]:
        """What it printed last; of a dump where its main thread was."""
        before, dumped, stack = self._log.read_text("utf-8", "replace").rpartition("Current thread ")
        lines = [*before.splitlines()[-10:], *(dumped + stack).splitlines()] if dumped else stack.splitlines()
        lines = lines[: 10 + TRACEBACK_LINES] if dumped else lines[-TRACEBACK_LINES:]
        return [line[:_LONGEST] for line in lines]


@contextmanager
def _ending_on_term() -> Iterator[None]:
    """SIGTERM as Ctrl-C: what was measured is kept, and no process stays behind."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """As it stands in ``gpu.json``."""
    about = asdict(outcome)
    step = about.pop("step")
    values = [
        # JSON has no NaN.
        asdict(value) | {"value": value.value if math.isfinite(value.value) else None, "holds": value.holds}
        for value in outcome.values
    ]
    return {"name": step["name"], "proves": step["proves"]} | about | {"values": values}


def from_json(stored: Mapping[str, Any]) -> Outcome:
    """An outcome as `as_json` has stored it."""
    names = [each.name for each in fields(Value)]
    values = [Value(**{name: value[name] for name in names} | _number(value["value"])) for value in stored["values"]]
    step = Step(stored["name"], stored["proves"], "")
    rest = {each.name: stored[each.name] for each in fields(Outcome) if each.name not in ("step", "values")}
    return Outcome(step, values=values, **rest)


def _number(stored: float | None) -> dict[str, float]:
    return {"value": math.nan if stored is None else stored}
