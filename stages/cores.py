"""How many cores there are for work side by side."""

import os
import sys


def usable_cores() -> int:
    """Cores that this process may run on: on Linux those that its container or scheduler leaves it, elsewhere all."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
