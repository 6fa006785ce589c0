"""Progress as one line: redrawn on a terminal, written anew every few seconds in a log file."""

import sys
from threading import Timer
from typing import Any, TextIO

from tqdm import tqdm

_LOG_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _WholeLines:
    """File for tqdm whose every redrawing becomes a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")  # tqdm returns the carriage and pads with blanks to wipe the line before
        if line and line != self._last:
            self._stream.write(f"{line}\n")
            self._last = line

    def flush(self) -> None:
        self._stream.flush()


class TqdmProgress:
    """Progress with rate, remaining time and the stage's own fields, on standard error."""

    def __init__(self, stream: TextIO | None = None, every_s: float = 10.0) -> None:
        """Show progress.

        Args:
            stream: where to; standard error by default.
            every_s: seconds between two lines where the stream is no terminal.
        """
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._every_s = 0.2 if self._terminal else every_s
        self._bar: Any = None
        self._later: Timer | None = None
        self._fields: dict[str, object] = {}

    def start(self, total: int, unit: str, description: str, after_s: float = 0.0) -> None:
        """Begin a task of ``total`` units."""
        self.close()
        self._fields = {}
        self._bar = tqdm(
            total=total,
            unit=f" {unit}",
            desc=description,
            file=self._stream if self._terminal else _WholeLines(self._stream),
            mininterval=self._every_s,
            miniters=1,
            delay=after_s,
            dynamic_ncols=self._terminal,
            bar_format=None if self._terminal else _LOG_LINE,
        )
        if after_s:  # the first unit of many may take minutes
            self._later = Timer(after_s, _show, [self._bar])
            self._later.daemon = True
            self._later.start()

    def advance(self, n: int = 1, **fields: object) -> None:
        """Count ``n`` more units as done and show the fields."""
        if self._bar is not None:
            if fields:
                self._fields |= fields
                self._bar.set_postfix(self._fields, refresh=False)
            self._bar.update(n)

    def note(self, line: str) -> None:
        """Say one line that stays, above the line of progress."""
        if self._bar is not None and self._terminal:
            self._bar.clear()
        print(line, file=self._stream, flush=True)
        if self._bar is not None and self._terminal:
            self._bar.refresh()

    def close(self) -> None:
        """End the task with a last line as things stand."""
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _show(bar: Any) -> None:
    """What was not shown until now."""
    bar.delay = 0
    bar.refresh()
