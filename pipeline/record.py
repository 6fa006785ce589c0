"""What ran, with what, on what, and for how long: ``<work>/record.json``.

The record also remembers the fingerprint of every stage that finished; a stage whose fingerprint is the same as then
is fresh and need not run again.
"""

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pipeline.config import RunConfig
from stages.files.documents import read_document, write_document

DISTRIBUTION = "mofe-feature-cache"
CHECKOUT = Path(__file__).resolve().parent.parent

Status = Literal["running", "done", "failed", "interrupted"]


@dataclass
class RunningStage:
    """A stage while it runs; set ``fresh`` where it finds nothing to do: the record keeps the run that did the work."""

    fresh: bool = False


@dataclass(frozen=True)
class StageRecord:
    """One run of one stage."""

    fingerprint: str  # of everything that the stage's output depends on
    started: str  # ISO 8601, UTC
    duration_s: float
    status: Status
    peak_memory_bytes: int = 0  # resident, of the process until then or of the largest of its workers; 0: not known


class RunRecord:
    """The record of a study; every change is on disk before the next line runs."""

    def __init__(self, path: Path, config: RunConfig, writes: bool = True) -> None:
        """Go on with the record at ``path``, or begin one; of several processes that work together one writes it.

        A record that cannot be read only costs the knowledge of what is fresh, so it is begun anew.
        """
        self.path = path
        self._config, self._writes = config, writes
        self._stages = _read_stages(path)

    @cached_property
    def _context(self) -> dict[str, Any]:
        """What stands beside the stages; asked of packages, git and the driver only where a stage runs."""
        return {
            "name": self._config.name,
            "config": self._config.to_dict(),
            "seeds": list(self._config.seeds),
            "versions": versions(),
            "git": git_revision(),
            "hardware": hardware(),
        }

    def stage(self, name: str) -> StageRecord | None:
        """The last run of a stage, if there was one."""
        return self._stages.get(name)

    def is_fresh(self, name: str, fingerprint: str) -> bool:
        """Whether the stage finished, from exactly this."""
        last = self._stages.get(name)
        return last is not None and last.status == "done" and last.fingerprint == fingerprint

    @contextmanager
    def running(self, name: str, fingerprint: str) -> Iterator[RunningStage]:
        """Record the run of a stage: its start, its duration and how it ended."""
        started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
        last, stage = self.stage(name) if self.is_fresh(name, fingerprint) else None, RunningStage()

        def write(status: Status) -> None:
            own = StageRecord(fingerprint, started, round(time.monotonic() - clock, 3), status, peak_memory_bytes())
            self._stages[name] = last if last and stage.fresh and status == "done" else own
            stages = {key: asdict(stage) for key, stage in self._stages.items()}
            if self._writes:
                write_document(self.path, self._context | {"stages": stages})

        write("running")
        try:
            yield stage
        except BaseException as error:
            write("failed" if isinstance(error, Exception) else "interrupted")
            raise
        write("done")


def _read_stages(path: Path) -> dict[str, StageRecord]:
    names = {field.name for field in fields(StageRecord)}
    required = {field.name for field in fields(StageRecord) if field.default is MISSING}
    stages = (read_document(path) or {}).get("stages")
    if not isinstance(stages, dict):
        return {}
    return {
        name: StageRecord(**stage)
        for name, stage in stages.items()
        if isinstance(stage, dict) and required <= stage.keys() <= names
    }


def peak_memory_bytes() -> int:
    """Largest resident memory so far of this process or of one that it waited for."""
    unit = 1 if sys.platform == "darwin" else 1024
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return unit * max(resource.getrusage(which).ru_maxrss for which in who)


def versions() -> dict[str, str]:
    """Python and every installed package that the project runs on, by name."""
    return dict(_installed())


@cache
def _installed() -> dict[str, str]:
    """Read once a process: what it has loaded stays as it is, and thirty packages' metadata are long."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # a bare checkout: nothing declares what it runs on
        requirements = []
    found = {"python": platform.python_version()}
    for requirement in requirements:
        if re.search(r"extra == .test.", requirement):
            continue
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # the other one of faiss-cpu and faiss-gpu
    return found


def git_revision(checkout: Path = CHECKOUT) -> dict[str, Any] | None:
    """Commit of a checkout (that which runs) and whether tracked files differ from it; ``None`` where none is."""
    if not (checkout / ".git").exists():
        return None
    commit = _output("git", "-C", str(checkout), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(checkout), "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "dirty": bool(changes)}


def hardware() -> dict[str, Any]:
    """The machine: platform, CPU, cores, memory and GPUs."""
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or ""
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus.splitlines(),
    }


def _cpu_model() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """What a command prints, or ``None`` where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
