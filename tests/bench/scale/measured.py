"""What a piece of work costs this process: CPU seconds, wall seconds, and the most memory beside what stood before."""

import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_EVERY_S = 0.005


@dataclass(frozen=True)
class Cost:
    """Of one step.

    Attributes:
        cpu_s: seconds of all its threads.
        wall_s: seconds that it took.
        peak_bytes: most memory of its own beside what the process held before; mapped files are the kernel's.
    """

    cpu_s: float
    wall_s: float
    peak_bytes: int


def cost_of(work: Callable[[], object]) -> Cost:
    """Do it once, and say what that took."""
    with _Peak() as peak:
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Cost(cpu, wall, peak.bytes)


class _Peak:
    """The most memory that this process holds while it is open, beside what it held when it was opened."""

    bytes = 0

    def __enter__(self) -> "_Peak":
        self._before, self._most = _held(), 0
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(_EVERY_S):
            self._most = max(self._most, _held())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watch.join()
        self.bytes = max(self._most, _held(), self._before) - self._before


def _held() -> int:
    """Bytes that are in memory and of no file; where nothing says so, the most that there ever was."""
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return sum(int(line[1]) * 1024 for line in lines if line[0] in ("RssAnon:", "RssShmem:"))
