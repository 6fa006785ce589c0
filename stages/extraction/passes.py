"""Threads that run forward passes side by side, each as a pass alone would be: one thread for each operation."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Lock
from typing import Generic, TypeVar

import torch

from stages.networks.compute import COMPUTE_THREADS

Shared = TypeVar("Shared")


@contextmanager
def one_thread_a_pass() -> Iterator[int]:
    """One thread for each of torch's operations, which fixes their order of summation; gives the threads there were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(COMPUTE_THREADS)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


@contextmanager
def pool_of_passes(n: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that compute a pass each, with one thread for each operation; left, they drop what has not begun."""
    threads = ThreadPoolExecutor(n, initializer=lambda: torch.set_num_threads(COMPUTE_THREADS))
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


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
