"""The process that holds the connections: it neither decodes nor computes, so it answers whatever its worker does."""

import asyncio
import signal
import socket
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress

import uvicorn

from pipeline.deciding import Serving
from pipeline.serving.app import application
from pipeline.serving.backend import Backend, WorkerMain

_IDLE = 75  # seconds that a connection without a request is kept
_SPARE = 2  # seconds beyond the timeout of a request that is in flight when the end is asked for


class _Server(uvicorn.Server):
    """uvicorn's, that is told to end by `answer_requests` alone."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Neither take signals nor raise them again when all is done."""
        yield

    def end(self) -> None:
        """Take no new requests, finish those in flight; the second time, do not."""
        self.force_exit = self.should_exit
        self.should_exit = True


async def answer_requests(work: WorkerMain, asked: Serving, listener: socket.socket, begun: Callable[[], None]) -> None:
    """Answer until SIGINT or SIGTERM, and finish then what is in flight; a second signal does not wait.

    Args:
        work: what workers do.
        asked: the limits.
        listener: bound socket.
        begun: is called once requests are answered.

    Raises:
        InputError, StageError: a worker cannot start.
    """
    backend = Backend(work, asked)
    server = _Server(
        uvicorn.Config(
            application(backend, asked),
            log_level="critical",
            access_log=False,
            ws="none",
            lifespan="off",
            server_header=False,
            timeout_keep_alive=_IDLE,
            timeout_graceful_shutdown=int(asked.timeout) + _SPARE,
        )
    )
    ended = asyncio.Event()
    with _told_to_end(server, ended):
        try:
            if not await _is_there(backend, ended):
                return
            keeping = asyncio.create_task(backend.keep())
            keeping.add_done_callback(lambda _: server.end())
            listener.listen(server.config.backlog)
            begun()
            await server.serve([listener])
            if keeping.done():
                keeping.result()
            keeping.cancel()
            with suppress(asyncio.CancelledError):
                await keeping
        finally:
            backend.kill()


async def _is_there(backend: Backend, ended: asyncio.Event) -> bool:
    """Wait for the first worker; False where the end is asked for before."""
    starting, ending = asyncio.create_task(backend.start()), asyncio.create_task(ended.wait())
    await asyncio.wait((starting, ending), return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    if starting.done():
        starting.result()
        return True
    starting.cancel()
    with suppress(asyncio.CancelledError):
        await starting
    return False


@contextmanager
def _told_to_end(server: _Server, ended: asyncio.Event) -> Iterator[None]:
    loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)

    def end() -> None:
        ended.set()
        server.end()

    for number in signals:
        loop.add_signal_handler(number, end)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
