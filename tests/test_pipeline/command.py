"""The command line, run in this process: what it answers, and what it leaves on disk."""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

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
