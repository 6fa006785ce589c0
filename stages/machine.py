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

_OF_WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
_SPINS = "2000"  # tens of microseconds: longer than most gaps between operations, shorter than a turn of a core


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


def in_company(load: float | None = None) -> bool:
    """Whether other processes were at work on more than half of the usable cores in the last minute.

    Args:
        load: runnable threads, on average; what the system says by default, where it says that.

    >>> in_company(0.0), in_company(1000.0)
    (False, True)
    """
    if load is None:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return load > usable_cores() / 2


def wait_briefly() -> None:
    """Let threads of OpenMP that wait for each other fall asleep soon, and leave their cores to other processes.

    GNU's runtime, which torch and FAISS bring along on Linux, spins some milliseconds at the end of every parallel
    operation. Where two processes have as many threads each as there are cores, the thread that is waited for does not
    run because others spin. Alone, threads that must be woken cost time: so this is for company. Results do not depend
    on it.

    The runtime reads it when it is loaded, and processes that this one starts inherit it: call it before torch is
    imported. Where the environment says anything of how threads wait, nothing is done.
    """
    if not _OF_WAITING & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS


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
