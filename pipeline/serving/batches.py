"""Between requests and the network: several are decoded side by side, and those that are ready go through together."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar

from stages.machine import usable_cores

Prepared = TypeVar("Prepared")
Answered = TypeVar("Answered")
Given = TypeVar("Given")


class AtWork(NamedTuple):
    """What a thread is at, and for how long."""

    what: str
    seconds: float


class Batches(Generic[Prepared, Answered]):
    """Gathers what several ask, for one function that answers many at once.

    While batches run, the next gathers; it goes once nothing more is being prepared. All methods are of one event loop.

    Args:
        answer: of each item of a batch, in its order; called by as many threads as batches run side by side.
        most: items of a batch.
        whole: items that cost as much as fewer; by default the most. A batch waits for so many, takes more where they
            are ready, and leaves to the next what is beyond whole ones.
        patience: seconds that a batch waits for the next of what is being prepared, at most: on a CPU a pass that is
            not full costs as much as a full one, and decoding has the cores meanwhile.
        side_by_side: batches that run at once.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Prepared]], Sequence[Answered]],
        most: int,
        patience: float,
        side_by_side: int = 1,
        whole: int | None = None,
    ) -> None:
        self._answer, self._patience, self._side_by_side = answer, patience, side_by_side
        self._most, self._whole = most, min(most, whole or most)
        self._decoders = ThreadPoolExecutor(max(2, usable_cores()), "decode")
        self._network = ThreadPoolExecutor(side_by_side, "network")
        self._gathering = asyncio.Lock()  # one batch fills at a time
        self._ready: asyncio.Queue[tuple[Prepared, asyncio.Future[Answered]]] = asyncio.Queue()
        self._left: list[tuple[Prepared, asyncio.Future[Answered]]] = []  # by the last batch, for the next
        self._coming = 0  # that are being prepared
        self._begun: dict[object, tuple[str, float]] = {}  # what threads are at, and since when

    def at_work(self) -> AtWork | None:
        """What has been computed for the longest, and is not done; None where all threads wait."""
        if not (begun := list(self._begun.values())):
            return None
        what, since = min(begun, key=lambda each: each[1])
        return AtWork(what, time.monotonic() - since)

    async def prepared(self, function: Callable[[], Given]) -> Given:
        """What a function gives, by a thread of its own; raises what it raises."""
        return await self._by(self._decoders, "decoding", function)

    async def beside(self, function: Callable[[], Given]) -> Given:
        """What a function gives, in the place of a batch."""
        return await self._by(self._network, "the network", function)

    async def _by(self, pool: ThreadPoolExecutor, what: str, function: Callable[[], Given]) -> Given:
        def noted() -> Given:
            mark = object()
            self._begun[mark] = what, time.monotonic()
            try:
                return function()
            finally:
                del self._begun[mark]

        return await asyncio.get_running_loop().run_in_executor(pool, noted)

    async def ask(self, prepare: Callable[[], Prepared]) -> Answered:
        """The answer to what a function gives; raises what it raises, or what the batch raises."""
        self._coming += 1
        try:
            item = await self.prepared(prepare)
        finally:
            self._coming -= 1
        answer: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self._ready.put_nowait((item, answer))
        return await answer

    async def run(self) -> None:
        """Answer, until it is cancelled."""
        try:
            async with asyncio.TaskGroup() as running:
                for _ in range(self._side_by_side):
                    running.create_task(self._one_after_the_other())
        finally:
            self._decoders.shutdown(wait=False, cancel_futures=True)
            self._network.shutdown(wait=False, cancel_futures=True)

    async def _one_after_the_other(self) -> None:
        while True:
            async with self._gathering:
                batch = await self._gathered()
            asked = [(item, answer) for item, answer in batch if not answer.done()]  # others do not wait any more
            if asked:
                await self._answered(asked)

    async def _gathered(self) -> list[tuple[Prepared, "asyncio.Future[Answered]"]]:
        batch = self._left or [await self._ready.get()]
        self._left = []
        with suppress(TimeoutError):
            while len(batch) < self._whole and (self._coming or not self._ready.empty()):
                async with asyncio.timeout(self._patience):
                    batch.append(await self._ready.get())
        while len(batch) < self._most and not self._ready.empty():
            batch.append(self._ready.get_nowait())
        if len(batch) > self._whole:
            whole = len(batch) - len(batch) % self._whole
            batch, self._left = batch[:whole], batch[whole:]
        return batch

    async def _answered(self, asked: Sequence[tuple[Prepared, "asyncio.Future[Answered]"]]) -> None:
        try:
            items = [item for item, _ in asked]
            answers = await self.beside(lambda: self._answer(items))
        except Exception as error:
            for _, waiting in asked:
                if not waiting.done():
                    waiting.set_exception(error)
            return
        for (_, waiting), answer in zip(asked, answers, strict=True):
            if not waiting.done():
                waiting.set_result(answer)
