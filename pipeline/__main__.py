"""``python -m pipeline``."""

import sys

from stages.machine import in_company, keep_freed_memory, wait_briefly

if in_company():
    wait_briefly()  # before torch brings its threads
keep_freed_memory()  # before anything else is imported: what starts threads takes arenas of its own

from pipeline.cli import main  # noqa: E402

if __name__ == "__main__":  # workers import this module when they start
    sys.exit(main())
