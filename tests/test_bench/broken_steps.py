"""Steps that go wrong in every way there is, between some that do not."""

import os
import signal
import subprocess
import sys
import time

from tests.bench.gpu.step import Bench, NotRun, Step

HERE = "tests.test_bench.broken_steps"


def good(bench: Bench, value: float = 1.0) -> None:
    bench.measure("a number", value, "rows/s", at_most=2)


def raising(bench: Bench) -> None:
    bench.measure("before it raises", 1)
    raise ValueError("the kernel\nis not there")


def hanging(bench: Bench) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    bench.measure("process", child.pid)
    time.sleep(60)


def dying(bench: Bench) -> None:
    bench.measure("before it dies", 1)
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def lacking(bench: Bench) -> None:
    raise NotRun("faiss has no GPU build here")


def leaving(bench: Bench) -> None:
    bench.measure("files that another step left", len(list(bench.scratch.iterdir())), at_most=0)
    (bench.scratch / "0.checkpoint").touch()


STEPS = (
    Step("first", "steps run", f"{HERE}:good"),
    Step("raises", "an exception is said", f"{HERE}:raising"),
    Step("hangs", "time is up at some time", f"{HERE}:hanging", limit_s=1),
    Step("dies", "a process that is gone is noticed", f"{HERE}:dying"),
    Step("missing", "a module that is not there fails its own steps", "tests.test_bench.nowhere:run"),
    Step("lacks", "what cannot run here is no failure", f"{HERE}:lacking"),
    Step("outside", "values are held to their limits", f"{HERE}:good", {"value": 3.0}),
    Step("not a number", "NaN is within no limit", f"{HERE}:good", {"value": float("nan")}),
    Step("last", "the others run nevertheless", f"{HERE}:good"),
)
LONG = (Step("hangs for long", "the time of all may be up first", f"{HERE}:hanging", limit_s=600),)
