"""The process that runs steps, one after the other, as it is told on standard input, a name a line.

What comes of it goes to standard output, a JSON object a line; what libraries print goes to standard error. It ends
when its input does, even within a step: nothing outlives the check.
"""

import gc
import importlib
import json
import os
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, cast

from tests.bench.gpu.step import SIZES, Bench, NotRun, Step

TRACEBACK_LINES = 20


def main(arguments: Sequence[str]) -> None:
    """Run what is asked for: ``module:list of steps``, device, name of the sizes, scratch folder."""
    listing, device, sizes, scratch = arguments
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    steps: Sequence[Step] = named(listing)
    asked = _lines_of(sys.stdin)

    def say(kind: str, what: Any) -> None:
        results.write(json.dumps({kind: what}) + "\n")

    say("ready", {} if device == "cpu" else named("tests.bench.gpu.machine:gpu")())
    folder = Path(scratch)
    bench = Bench(device, SIZES[cast(Any, sizes)], folder, folder, lambda value: say("value", asdict(value)))
    while True:
        name = asked.get()
        step = next(step for step in steps if step.name == name)
        run_step(step, bench, say)


def run_step(step: Step, bench: Bench, say: Callable[[str, Any], None]) -> None:
    """Run one step in a folder of its own.

    Says ``begun`` once all that it needs is imported, then ``done``, ``not run`` or ``failed``.
    """
    started = time.monotonic()
    try:
        function = named(step.run)
        gc.freeze()  # modules stay: what is left to collect after a step is its own
        say("begun", round(time.monotonic() - started, 2))
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="step-", dir=bench.shared, ignore_cleanup_errors=True) as own:
            function(replace(bench, scratch=Path(own)), **step.given)
    except NotRun as reason:
        say("not run", str(reason))
    except Exception as error:
        said = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        lines = traceback.format_exc().splitlines()[-TRACEBACK_LINES:]
        say("failed", {"error": said[:300], "traceback": lines})
    else:
        say("done", round(time.monotonic() - started, 2))
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def named(place: str) -> Any:
    """What ``module:name`` names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _lines_of(stream: IO[str]) -> "queue.Queue[str]":
    """Lines as they come; the end of the process, whatever it does, once there will be no more."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line.rstrip("\n"))
        # Nobody listens any more: end, with all that a step has started, if this process leads a group.
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
