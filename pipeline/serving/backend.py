"""The process that computes, as the one that holds the connections knows it: asked, watched, and replaced when lost."""

import asyncio
import json
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context, resource_tracker
from typing import Any, Self

from pipeline.deciding import Serving
from pipeline.serving.frames import HUNG, LIMIT, OWN, READY, Answer, BodyKind, Question, read_answer
from pipeline.terminal import complain
from stages.errors import InputError, StageError

WorkerMain = Callable[
    [socket.socket], None
]  # what a worker does, given where it is asked; it travels to another process

# What the process has loaded that workers are forked from: the next is there in a second. It uses none of it, so that
# it has no threads, and it holds no connection, which a fork would keep open.
_LOADED = ("pipeline.__main__", "pipeline.serving.worker")


class WorkerLostError(Exception):
    """The worker is gone that was to answer."""


class Backend:
    """A worker, and its successors.

    Args:
        work: what a worker does; `pipeline.serving.worker.run_worker`, of a bundle.
        asked: how long a request may take and a worker may be silent; and what runs the network, whose libraries are
            loaded before a worker is needed.

    Attributes:
        info: what the worker said of its detector.
        lost: how many workers were lost.
        why: how the last of them was.
    """

    def __init__(self, work: WorkerMain, asked: Serving) -> None:
        self._work, self._silence, self._slower = work, asked.timeout + asked.silent, asked.slower
        self._loaded = [*_LOADED, f"stages.detection.{asked.runtime}_runtime"]
        self._loading = 2 * asked.timeout  # seconds until a worker that replaces another has to answer, at least
        self._worker: _Worker | None = None
        self._ready = asyncio.Event()
        self.info: dict[str, Any] = {}
        self.lost, self.why = 0, ""

    @property
    def is_ready(self) -> bool:
        """Whether a worker answers."""
        return self._ready.is_set()

    async def start(self) -> None:
        """Wait until there is a worker that answers.

        Raises:
            InputError, StageError: it cannot.
        """
        self._loading = max(self._loading, self._slower * await self._begin())

    async def _begin(self) -> float:
        """Seconds that the worker took until it answered."""
        self._worker = await _Worker.started(self._work, self._loaded)
        begun = asyncio.get_running_loop().time()
        self.info = await self._worker.ready()
        self._ready.set()
        return asyncio.get_running_loop().time() - begun

    async def keep(self) -> None:
        """Take what it answers, and start another where it is lost; until it is cancelled.

        Each that does not load is followed by one that has twice as long: the machine may be busier than it was.

        Raises:
            InputError, StageError: another cannot start.
        """
        loading = self._loading
        while self._worker is not None:
            if self.is_ready:
                why = await self._worker.lived(self._silence)
                loading = self._loading
            else:  # the one that was to take its place
                why = f"hung: it has not loaded the detector in {loading:.0f} s"
                self._worker.kill()
                loading *= 2
            self._ready.clear()
            self.lost, self.why = self.lost + 1, why
            complain(f"serve: the worker {why}; another takes its place")
            with suppress(TimeoutError):
                async with asyncio.timeout(loading):
                    await self._begin()

    async def ask(self, kind: BodyKind, body: bytes, nearest: int, seconds: float) -> Answer:
        """Answer of the worker, which is waited for where there is none.

        Raises:
            WorkerLostError: it was lost meanwhile.
        """
        while not self.is_ready:
            await self._ready.wait()
        assert self._worker is not None
        return await self._worker.ask(kind, body, nearest, seconds)

    def kill(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.kill()


def _start(process: Any) -> None:
    """Ctrl-C goes to the whole group, but is nothing to workers, nor to the process that they are forked from."""
    resource_tracker.ensure_running()  # before, since it unblocks SIGINT where the start of a process begins it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which both inherit
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class _Worker:
    def __init__(self, process: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._asked = 0
        self._waiting: dict[int, asyncio.Future[Answer]] = {}

    @classmethod
    async def started(cls, work: WorkerMain, loaded: list[str]) -> Self:
        """A process that was forked from one which has loaded the libraries, and knows no connection."""
        context = get_context("forkserver")
        context.set_forkserver_preload(loaded)
        ours, theirs = socket.socketpair()
        with theirs:
            process = context.Process(target=work, args=(theirs,), name="serve", daemon=True)
            await asyncio.to_thread(_start, process)
        return cls(process, *await asyncio.open_connection(sock=ours, limit=LIMIT))

    async def ready(self) -> dict[str, Any]:
        """What it says of its detector once it answers.

        Raises:
            InputError, StageError: it cannot.
        """
        try:
            said = await read_answer(self._reader)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise StageError(f"serve: the worker died before it answered ({self._end()})") from error
        if said.status != READY:
            raise (InputError if said.status == 2 else StageError)(said.body.decode())
        info: dict[str, Any] = json.loads(said.body)
        return info

    async def ask(self, kind: BodyKind, body: bytes, nearest: int, seconds: float) -> Answer:
        self._asked += 1
        number = self._asked
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            await self._writer.drain()  # of one that does not read, bodies wait here for their timeout
            self._writer.write(Question(number, kind, nearest, seconds, body).packed())
            return await answer
        except OSError:
            return await answer  # `lived` says how it was lost
        finally:
            self._waiting.pop(number, None)

    async def lived(self, silence: float) -> str:
        """Give what it answers to those who wait, until it is lost; how that was.

        Args:
            silence: seconds, after which it is taken as hung.
        """
        why = f"hung: nothing was heard of it for {silence:g} s"
        try:
            while True:
                async with asyncio.timeout(silence):
                    said = await read_answer(self._reader)
                if said.number == OWN and said.status == HUNG:
                    why = said.body.decode()
                    break
                waiting = self._waiting.get(said.number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(said)
        except TimeoutError:
            pass
        except (asyncio.IncompleteReadError, OSError):
            why = f"died ({self._end()})"
        self.kill()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(WorkerLostError(f"the worker {why}, and another takes its place: ask again"))
        return why

    def _end(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def kill(self) -> None:
        """End it, if it has not ended."""
        self._writer.close()
        with suppress(ValueError):  # where it never began
            self._process.kill()
            self._process.join()
