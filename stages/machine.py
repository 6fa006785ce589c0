"""The machine that a stage runs on: its cores, where networks run, and how its C library keeps memory.

Importing it loads the standard library alone.
"""

import ctypes
import os
import sys
from functools import cache
from multiprocessing import parent_process
from threading import Thread

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # glibc's malloc.h


def usable_cores() -> int:
    """Cores that this process may run on: on Linux those that its container or scheduler leaves it, elsewhere all."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_device() -> str:
    """Where networks run: on a GPU where there is one."""
    import torch  # not before somebody runs a network

    return "cuda" if torch.cuda.is_available() else "cpu"


def end_with_parent() -> None:
    """Let this process end when the one that started it is killed, and cannot end it itself."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(0)

    Thread(target=wait, daemon=True).start()


@cache
def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next batch, where it would give each back to the kernel.

    Every layer's output is a block of megabytes; by default each is mapped, filled with zeros page by page, and
    unmapped. A forward pass of 16 images of 224 px through EfficientNet-Lite0 costs half as much CPU time without
    that. One arena serves all threads, since the others cannot grow to such blocks: two threads that run that network
    side by side are a quarter faster so. What a process holds is then its peak. Does nothing with another C library.

    Call it before the first thread: an arena that exists by then (importing pyarrow starts threads, and so does the
    first parallel operation of torch) is handed on to later threads, and a forward pass in it maps and unmaps up to
    16 MB for an image.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 << 20)
