"""Who does the work: this process, local processes, or a Dask cluster. The only door to dask.

An engine is a ``map`` over independent work items inside one stage. Items and functions are plain and picklable, so
that the same code runs on one core and on many, and gives the same results. Dask schedules, transports and tries
again; what is added here is whose fault it is when a worker dies.
"""

import logging
import signal
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self

from stages.context import Item, Result
from stages.errors import InputError, StageError
from stages.progress import NullProgress, Progress

# What workers need and takes seconds to import: local ones are forked from a process that has it.
_PRELOADED = ("distributed", "torch", "timm", "faiss", "h5py", "pydantic")
_PER_WORKER = 2  # items in flight: one that runs and one that waits, so that nobody is idle and memory stays flat
_COUNTED_EVERY_S = 1.0  # workers
_PATIENCE_S = 60.0  # with workers that do nothing, before it is asked whether there are any
_TRIES = 3  # of an item that raises what nobody foresaw, as a disk of the network may
_ALLOWED_DEATHS = 1  # of local workers, beside the first, while an item was theirs; of a cluster, as it is configured
_MOST_FAILED = 16  # items; where more fail, it is not theirs
_SHOWN = 5  # of them, in the message
_LONGEST_NAME = 120
_GONE = "the Dask scheduler went away; what is finished is kept: run the same again"


class EngineError(StageError):
    """Workers or their scheduler are gone; finished items are kept, the same command goes on."""


class ItemsFailedError(StageError):
    """Some items cannot be done; all others are."""


def engine_for(
    scheduler: str | None, workers: int, shared: Sequence[Path] = (), progress: Progress | None = None
) -> "DaskEngine | None":
    """The engine for ``--scheduler`` and ``--workers``; None where this process does the work itself.

    Args:
        scheduler: address of the one.
        workers: number of the others.
        shared: as in `DaskEngine`.
        progress: likewise.
    """
    if scheduler is None and workers == 1:
        return None
    return DaskEngine(scheduler, workers, shared=shared, progress=progress)


def _ignore_interrupt() -> None:
    # Ctrl-C reaches every process of the terminal; this one decides what happens, its workers need not die noisily.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


async def _shake_hands(address: str, answer_s: float) -> None:
    # A Client that finds something else at its address waits for it without end; this does not.
    import asyncio

    from distributed.comm import connect

    async with asyncio.timeout(answer_s):
        comm = await connect(address, timeout=answer_s)
    await comm.close()


@contextmanager
def _scheduler_there() -> Iterator[None]:
    from distributed.client import ClosedClientError

    try:
        yield
    except (OSError, ClosedClientError) as error:
        raise EngineError(_GONE) from error


def _sees(path: str, content: str) -> bool:
    """Whether a worker reads there what was written by another process."""
    try:
        return Path(path).read_text(encoding="utf-8") == content
    except OSError:
        return False


class DaskEngine:
    """Local processes, or the workers of a Dask cluster; started when the first item is to be done, or by ``with``."""

    def __init__(
        self,
        address: str | None = None,
        workers: int = 1,
        answer_s: float = 8,
        shared: Sequence[Path] = (),
        progress: Progress | None = None,
    ) -> None:
        """Describe an engine.

        Args:
            address: of a scheduler (``tcp://host:8786``); ``None`` starts local processes.
            workers: number of local processes, one thread each.
            answer_s: how long a scheduler and its workers may take to answer.
            shared: folders that workers on other machines must see as this process does; made where they are missing.
            progress: told where the dashboard is.
        """
        self._address, self._workers, self._answer_s = address, workers, answer_s
        self._shared, self._progress = shared, progress or NullProgress()
        self._started = ExitStack()
        self._client: Any = None

    def __enter__(self) -> Self:
        """As `start`."""
        self.start()
        return self

    def start(self) -> None:
        """Start local workers or connect to the cluster, unless that is done.

        Raises:
            InputError: no scheduler answers at the address, it has no workers, or they do not see the shared folders.
        """
        if self._client is not None:
            return
        for name in ("distributed", "distributed.client"):  # what went wrong is raised, once
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if self._address is None:
            self._start_workers()
        else:
            self._connect(self._address)
        client: Any = self._client
        n = len(client.nthreads())
        self._progress.note(f"dask: {n} worker{'' if n == 1 else 's'}; dashboard {client.dashboard_link}")

    def _start_workers(self) -> None:
        import dask
        from distributed import Client, LocalCluster
        from distributed.utils import get_mp_context

        # For as long as there are workers: others take the place of those that die.
        self._started.enter_context(dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}))
        get_mp_context().set_forkserver_preload(list(_PRELOADED))  # in place of Dask's own list, which it gives once
        with dask.config.set({"distributed.scheduler.allowed-failures": _ALLOWED_DEATHS}):
            cluster = LocalCluster(
                n_workers=self._workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address="127.0.0.1:0",  # None would take port 8787, and warn where a neighbour has it
                memory_limit=0,  # an item is bounded by its shard, and memory-mapped pages are no reason to kill
                silence_logs=logging.CRITICAL,
            )
        self._started.callback(cluster.close)
        self._client = Client(cluster, set_as_default=False)
        self._started.callback(self._client.close)
        self._client.run(_ignore_interrupt)

    def _connect(self, address: str) -> None:
        import asyncio  # and in `_shake_hands`: every verb imports this module, few connect

        from distributed import Client

        try:
            asyncio.run(_shake_hands(address, self._answer_s))
            self._client = Client(address, timeout=self._answer_s, set_as_default=False)
            self._started.callback(self._client.close)
        except (OSError, ValueError, MemoryError) as error:  # memory: a web server's greeting, read as a length
            raise InputError(
                f"--scheduler {address}: no Dask scheduler answers there; "
                "start one with `dask scheduler`, or leave the option out"
            ) from error
        try:
            if not self._client.nthreads():
                raise InputError(f"--scheduler {address}: it has no workers; start some with `dask worker`")
            for folder in self._shared:
                self._probe(address, folder)
        except BaseException:
            self.close()
            raise

    def _probe(self, address: str, folder: Path) -> None:
        """Refuse workers that do not read what this process writes."""
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        content = uuid.uuid4().hex
        probe = folder / f".probe-{content}"
        try:
            probe.write_text(content, encoding="utf-8")
            found = self._client.run(_sees, str(probe), content)
        finally:
            probe.unlink(missing_ok=True)
        if blind := sorted(worker for worker, sees in found.items() if not sees):
            raise InputError(
                f"--scheduler {address}: {len(blind)} of {len(found)} workers do not see {folder}, where this process "
                f"writes ({blind[0]}): give all of them that folder, under that path"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """As `close`."""
        self.close()

    def close(self) -> None:
        """Disconnect, and stop local workers; the next item starts them again."""
        self._client = None
        self._started.close()

    def map(self, fn: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results as they complete; leaving early cancels what has not run.

        A worker that dies takes with it what it ran and what waited there, and Dask blames all of that. So an item
        that Dask has given up because of its workers' deaths is done once more when all others are, with nothing
        beside it: what then kills is itself.

        Raises:
            StageError: as an item raised it; the others are not gone on with.
            ItemsFailedError: items that kill their workers, or raised anything else `_TRIES` times; all others are
                done. What a single item raised comes as itself.
            EngineError: the scheduler is gone, or as many items failed as cannot be the items' fault.
        """
        self.start()
        undone = _Undone[Item]()
        yield from self._flow(fn, items, self._width(), undone)
        suspects, undone.killed = undone.killed, []
        yield from self._flow(fn, suspects, lambda: 1, undone)
        undone.complain()

    def _width(self) -> Callable[[], int]:
        """How many items are to be in flight, as workers come and go."""
        known, until = 0, 0.0

        def now() -> int:
            nonlocal known, until
            if time.monotonic() >= until:
                known = max(1, _PER_WORKER * self._n_threads())
                until = time.monotonic() + _COUNTED_EVERY_S
            return known

        return now

    def _n_threads(self) -> int:
        with _scheduler_there():
            return sum(self._client.nthreads().values())

    def _flow(
        self, fn: Callable[[Item], Result], items: Iterable[Item], width: Callable[[], int], undone: "_Undone[Item]"
    ) -> Iterator[Result]:
        """Do items, so many at a time; what fails is noted."""
        from distributed import CancelledError, KilledWorker

        with closing(self._ended(fn, items, width)) as ended:
            for item, result, error in ended:
                if error is None:
                    yield result
                elif isinstance(error, KilledWorker):
                    undone.killed.append(item)
                elif isinstance(error, CancelledError):
                    raise EngineError(_GONE) from error
                elif isinstance(error, StageError):
                    raise error
                else:
                    undone.raised(item, error)

    def _ended(
        self, fn: Callable[[Item], Result], items: Iterable[Item], width: Callable[[], int]
    ) -> Generator[tuple[Item, Any, Exception | None], None, None]:
        """Items as they end, their results, and what they raised; the next are handed out before that is said.

        Raises:
            EngineError: nobody is left who could do them.
        """
        queue, resources = iter(items), self._resources()
        in_flight: dict[Any, Item] = {}

        def submit() -> list[Any]:
            wanted = list(islice(queue, max(0, width() - len(in_flight))))
            with _scheduler_there():
                # pure=False: items are work to be done, not values to be looked up by their hash.
                futures = {
                    self._client.submit(fn, item, pure=False, retries=_TRIES - 1, resources=resources): item
                    for item in wanted
                }
            in_flight.update(futures)
            return list(futures)

        running, alone = self._running(submit()), 0
        try:
            while in_flight:
                try:
                    future, result = next(running)
                except TimeoutError:  # that of `running` since it was made, and nothing is there now
                    alone = 0 if self._n_threads() else alone + 1
                    if self._address is None and alone > 1:  # others may queue for a node; these do not come again
                        raise EngineError(
                            "all local workers are gone, and none came in their place (out of memory?); what is "
                            "finished is kept: run the same again, with fewer --workers"
                        ) from None
                    running = self._running(list(in_flight))
                    continue
                item = in_flight.pop(future)
                running.update(submit())
                error = result[1] if future.status == "error" else result if future.cancelled() else None
                yield item, result, error
        finally:
            with suppress(Exception):  # of a scheduler that is gone
                self._client.cancel(list(in_flight))

    def _running(self, futures: Sequence[Any]) -> Any:
        """Futures and their results as they come; what went wrong is told and not raised."""
        from distributed import as_completed

        return as_completed(futures, loop=self._client.loop, with_results=True, raise_errors=False, timeout=_PATIENCE_S)

    def _resources(self) -> dict[str, float] | None:
        """One GPU an item, where workers were started with ``--resources GPU=1``."""
        with _scheduler_there():
            workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        return {"GPU": 1} if any(worker.get("resources", {}).get("GPU") for worker in workers) else None


@dataclass
class _Undone(Generic[Item]):
    """What became of items that were not done.

    Attributes:
        killed: given up by Dask, because workers died while they held them.
        failed: those that raised, and what.
    """

    killed: list[Item] = field(default_factory=list)
    failed: list[tuple[Item, Exception]] = field(default_factory=list)

    def raised(self, item: Item, error: Exception) -> None:
        """One more that raised.

        Raises:
            EngineError: these are too many.
        """
        self.failed.append((item, error))
        if len(self.failed) > _MOST_FAILED:
            raise EngineError(
                f"more than {_MOST_FAILED} items failed, the last, {_name(item)}, with {type(error).__name__}: "
                f"{error}; what is finished is kept: put that right and run the same again"
            ) from error

    def complain(self) -> None:
        """Say what could not be done, if anything."""
        if not self.killed and len(self.failed) == 1:
            raise self.failed[0][1]
        lines = [f"{_name(item)}: its worker died (killed, or out of memory?)" for item in self.killed]
        lines += [f"{_name(item)}: {type(error).__name__}: {error}" for item, error in self.failed]
        if lines:
            more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
            raise ItemsFailedError(
                f"{len(lines)} item{'' if len(lines) == 1 else 's'} failed, each of its own; all others are done and "
                f"kept: {'; '.join(lines[:_SHOWN])}{more}"
            )


def _name(item: object) -> str:
    name = str(item)
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"
