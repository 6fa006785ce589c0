"""``python -m pipeline``."""

import os
import signal
import sys


def _stop(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


# Imports take seconds, in which nothing is there yet that would be kept.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop)

from stages.machine import in_company, keep_freed_memory, wait_briefly  # noqa: E402

if in_company():
    wait_briefly()  # before torch brings its threads
keep_freed_memory()  # before anything else is imported: what starts threads takes arenas of its own

from pipeline.cli import main  # noqa: E402

if __name__ == "__main__":  # workers import this module when they start
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
