"""Ctrl-C, whenever it comes: a line, and status 130."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Set when this process was interrupted.

    `KeyboardInterrupt` alone does not tell: what is written in C may make any other error of it, above all where it
    comes while a module is imported. Who has a handler of their own, or ignores the signal, keeps that.
    """
    seen = threading.Event()

    def interrupt(*given: object) -> None:
        seen.set()
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()  # where alone handlers can be set
    ours = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield seen
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
