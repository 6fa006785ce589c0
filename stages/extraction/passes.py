"""Threads that run forward passes side by side, each as a pass alone would be: one thread for each operation."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from stages.networks.compute import COMPUTE_THREADS


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
    """Threads that compute a pass each, under `one_thread_a_pass`; left, they drop what has not begun."""
    threads = ThreadPoolExecutor(n, initializer=lambda: torch.set_num_threads(COMPUTE_THREADS))
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)
