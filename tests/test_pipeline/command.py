"""The command line, run in this process or in one forked from it: what it answers, and what it leaves on disk."""

import io
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from pipeline.cli import main


class Answer(NamedTuple):
    """Exit status, standard output and standard error of one command."""

    status: int
    out: str
    err: str


def pipeline(*arguments: object) -> Answer:
    """``python -m pipeline ARGUMENTS`` without the seconds that a new process takes to import torch."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return Answer(status, out.getvalue(), err.getvalue())


class Running:
    """A command in a process that was forked from this one: real signals, without the seconds of imports.

    As a terminal starts it, it leads a group of its own.

    Attributes:
        pid: the process.
        err: its standard error, to be read as it comes.
    """

    def __init__(self, *arguments: object) -> None:
        self._out = tempfile.TemporaryFile("w+")  # noqa: SIM115 (until `finish`)
        read, write = os.pipe()
        command = ([str(argument) for argument in arguments], self._out.fileno(), write)
        self._process = multiprocessing.get_context("fork").Process(target=_command, args=command, daemon=True)
        self._process.start()
        os.close(write)
        self.pid, self.err = self._process.pid or 0, os.fdopen(read)

    def send(self, number: signal.Signals) -> None:
        """A signal to it alone."""
        os.kill(self.pid, number)

    def finish(self, timeout: float = 120) -> Answer:
        """What it has answered, once it and all that it has started have ended; ``err``: what was not read before."""
        late = threading.Timer(timeout, os.killpg, (self.pid, signal.SIGKILL))
        late.start()
        with self.err, self._out:
            err = self.err.read()  # it is open for as long as one of them lives
            late.cancel()
            self._process.join()
            self._out.seek(0)
            return Answer(self._process.exitcode or 0, self._out.read(), err)

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.is_alive()


def _command(arguments: list[str], out: int, err: int) -> None:
    os.setsid()
    for to, stream in ((1, out), (2, err)):
        os.dup2(stream, to)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tqdm.set_lock(threading.RLock())  # the one that it has inherited would stay locked for its parent if it is killed
    sys.exit(main(arguments))


def done(*arguments: object) -> Answer:
    """The same, for a command that must succeed."""
    answer = pipeline(*arguments)
    assert answer.status == 0, answer.err
    return answer


def refused(*arguments: object) -> str:
    """The one line that a command says which must end with status 2, having done nothing."""
    answer = pipeline(*arguments)
    assert answer.status == 2, answer
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1, answer.err
    return answer.err.removeprefix("error: ").rstrip("\n")


def settings(*pairs: str) -> list[str]:
    """``--set`` for each pair."""
    return [part for pair in pairs for part in ("--set", pair)]


def snapshot(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every file below some folders with its size and the time of its last change."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
