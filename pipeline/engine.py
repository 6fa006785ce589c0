"""Who does the work: this process, local processes, or a Dask cluster. The only door to dask.

An engine is a ``map`` over independent work items inside one stage. Items and functions are plain and picklable, so
that the same code runs on one core and on many, and gives the same results.
"""

import asyncio
import logging
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from types import TracebackType
from typing import Any, Self, TypeVar

from stages.errors import InputError, StageError

Item = TypeVar("Item")
Result = TypeVar("Result")

_PER_WORKER = 2  # items in flight: one that runs and one that waits, so that nobody is idle and memory stays flat


class EngineError(StageError):
    """Workers or their scheduler are gone; finished items are kept, the same command goes on."""


def engine_for(scheduler: str | None, workers: int) -> "DaskEngine | nullcontext[None]":
    """The engine for ``--scheduler`` and ``--workers``; what gives None where this process does the work itself."""
    return nullcontext() if scheduler is None and workers == 1 else DaskEngine(scheduler, workers)


def _ignore_interrupt() -> None:
    # Ctrl-C reaches every process of the terminal; this one decides what happens, its workers need not die noisily.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


async def _shake_hands(address: str, answer_s: float) -> None:
    # A Client that finds something else at its address waits for it without end; this does not.
    from distributed.comm import connect

    async with asyncio.timeout(answer_s):
        comm = await connect(address, timeout=answer_s)
    await comm.close()


class DaskEngine:
    """Local processes, or the workers of a Dask cluster."""

    def __init__(self, address: str | None = None, workers: int = 1, answer_s: float = 8) -> None:
        """Describe an engine; ``with`` starts it.

        Args:
            address: of a scheduler (``tcp://host:8786``); ``None`` starts local processes.
            workers: number of local processes, one thread each.
            answer_s: how long a scheduler and its workers may take to answer.
        """
        self._address, self._workers, self._answer_s = address, workers, answer_s
        self._cluster: Any = None
        self._client: Any = None

    def __enter__(self) -> Self:
        """Start local workers or connect to the cluster.

        Raises:
            InputError: no scheduler answers at the address, or it has no workers.
        """
        from distributed import Client, LocalCluster

        for name in ("distributed", "distributed.client"):  # what went wrong is raised, once
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if self._address is None:
            self._cluster = LocalCluster(
                n_workers=self._workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address="127.0.0.1:0",  # None would take port 8787, and warn where a neighbour has it
                memory_limit=0,  # an item is bounded by its shard, and memory-mapped pages are no reason to kill
                silence_logs=logging.CRITICAL,
            )
            self._client = Client(self._cluster, set_as_default=False)
            self._client.run(_ignore_interrupt)
            return self
        try:
            asyncio.run(_shake_hands(self._address, self._answer_s))
            self._client = Client(self._address, timeout=self._answer_s, set_as_default=False)
        except (OSError, ValueError, MemoryError) as error:  # memory: a web server's greeting, read as a length
            raise InputError(
                f"--scheduler {self._address}: no Dask scheduler answers there; "
                "start one with `dask scheduler`, or leave the option out"
            ) from error
        if not self._client.nthreads():
            self._client.close()
            raise InputError(f"--scheduler {self._address}: it has no workers; start some with `dask worker`")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect, and stop local workers."""
        for resource in (self._client, self._cluster):
            if resource is not None:
                resource.close()

    def map(self, fn: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results as they complete; leaving early cancels what has not run."""
        from distributed import CancelledError, KilledWorker, as_completed

        queue = iter(items)
        in_flight: set[Any] = set()

        def submit(n: int) -> list[Any]:
            # pure=False: items are work to be done, not values to be looked up by their hash.
            futures = [self._client.submit(fn, item, pure=False) for item in islice(queue, n)]
            in_flight.update(futures)
            return futures

        try:
            n_threads = sum(self._client.nthreads().values())
            running = as_completed(submit(_PER_WORKER * n_threads), loop=self._client.loop)
            for future in running:
                result = future.result()
                in_flight.discard(future)
                running.update(submit(1))
                yield result
        except KilledWorker as error:
            raise EngineError(
                "a worker process died again and again on the same item (killed, or out of memory?); "
                "what is finished is kept: try fewer --workers"
            ) from error
        except CancelledError as error:
            raise EngineError("the Dask scheduler went away; what is finished is kept: run the same again") from error
        finally:
            self._client.cancel(list(in_flight))
