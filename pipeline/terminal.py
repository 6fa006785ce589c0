"""What a command prints, and what an error becomes for who reads it.

    0    done
    1    a stage failed (StageError, CacheError, a full disk); what is finished is kept
    2    bad usage or bad input: nothing was begun
    130  interrupted; the same command goes on

Results go to standard output; progress, notes and errors, one line each, to standard error.
"""

import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import click

from stages.errors import InputError, StageError

INTERRUPTED = 130
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
Lines = list[Any]  # what a verb says: text, or tables of rich


def explain(error: BaseException) -> tuple[int, str]:
    """Exit status and message of an error."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; what is finished is kept: the same command goes on where it was"
    if isinstance(error, click.UsageError):
        return 2, error.format_message()
    if isinstance(error, StageError):
        return (2 if isinstance(error, InputError) else 1), str(error)
    if isinstance(error, OSError):
        return 1, f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    from cache.errors import CacheError, CacheMismatchError, CacheNotFoundError

    if isinstance(error, CacheError):
        return (2 if isinstance(error, CacheMismatchError | CacheNotFoundError) else 1), str(error)
    return 1, f"unexpected {type(error).__name__}: {error}; this is a defect of the program, --debug says where"


def complain(line: str) -> None:
    """Print one line on standard error, whatever line breaks or other control characters the text has.

    What cannot be printed there is let go: that costs nothing that was computed.
    """
    with suppress(OSError):
        click.echo(_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", " ".join(line.split())), err=True)


def show(result: Any) -> None:
    """Print what a verb returned: nothing, text, lines or tables of rich."""
    if result is None:
        return
    if not isinstance(result, str) and isinstance(result, Iterable):
        for part in result:
            show(part)
        return
    if isinstance(result, str):
        click.echo(result, color=True)  # as it is: names of files may have what looks like colours
        return
    from rich.console import Console

    # A pipe or a file has no width: as wide as the table needs, where rich would cut it to 80 columns.
    Console(width=None if sys.stdout.isatty() else 1000).print(result)
