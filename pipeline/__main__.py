"""``python -m pipeline``."""

import sys

from stages.machine import keep_freed_memory

keep_freed_memory()  # before anything else is imported: what starts threads takes arenas of its own

from pipeline.cli import main  # noqa: E402

if __name__ == "__main__":  # workers import this module when they start
    sys.exit(main())
