"""Threads that run forward passes side by side, each as a pass alone would be: one thread for each operation."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import wait as _wait_for
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from threading import Lock
from typing import Any, Generic, TypeVar

import torch

from stages.networks.compute import COMPUTE_THREADS

Shared = TypeVar("Shared")


@contextmanager
def pool_of_passes(n: int, device: str) -> Iterator[Executor]:
    """Threads that compute a pass each, with one thread for each operation; left, they drop what has not begun.

    Those of a GPU are the process's and stay: cuDNN chooses its kernels anew in every thread, which takes a
    convolutional network seconds.

    Args:
        n: how many.
        device: kind of the one that computes.
    """
    passes = _Lent(_lasting(n)) if device == "cuda" else threads_of_passes(n)
    try:
        yield passes
    finally:
        passes.shutdown(cancel_futures=True)


def threads_of_passes(n: int) -> ThreadPoolExecutor:
    """Threads in which each of torch's operations has one thread."""
    return ThreadPoolExecutor(n, initializer=lambda: torch.set_num_threads(COMPUTE_THREADS))


_lasting = cache(threads_of_passes)


class _Lent(Executor):
    """Threads that others may use, too, and that stay when this is shut down."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads
        self._begun: set[Future[Any]] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor`."""
        future = self._threads.submit(fn, *args, **kwargs)
        self._begun.add(future)
        future.add_done_callback(self._begun.discard)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for what was submitted here."""
        asked = list(self._begun)
        if cancel_futures:
            asked = [future for future in asked if not future.cancel()]
        if wait:
            _wait_for(asked)


class Together(Generic[Shared]):
    """A context that threads are in together: the first enters it, the last leaves it.

    Args:
        begin: makes the context; it is never entered while threads are in it.
    """

    def __init__(self, begin: Callable[[], AbstractContextManager[Shared]]) -> None:
        self._begin = begin
        self._lock = Lock()
        self._inside = 0

    @contextmanager
    def __call__(self) -> Iterator[Shared]:
        """What the context gives, the same to all who are in it."""
        with self._lock:
            if not self._inside:
                self._stack = ExitStack()
                self._shared = self._stack.enter_context(self._begin())
            self._inside += 1
        try:
            yield self._shared
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._stack.close()
