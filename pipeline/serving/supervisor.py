"""`serve` as a command: it holds the socket and watches over the process that answers. Importing it is light."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from pipeline.deciding import Serving
from pipeline.terminal import complain
from stages.errors import InputError, StageError
from stages.files.archive import is_archive

_SPARE = 5  # seconds beyond the timeout of requests that a worker has to end


def serve_bundle(bundle: str, asked: Serving) -> None:
    """Answer until SIGINT or SIGTERM; requests in flight are finished, a second signal ends them.

    A worker that dies is replaced: what it was answering is lost, connections wait for the next.

    Args:
        bundle: file of the detector.
        asked: where, and the limits.

    Raises:
        InputError: no detector; an address that cannot be had; the extra is not installed.
        StageError: a worker that was to replace another cannot start.
    """
    if not is_archive(bundle):
        raise InputError(f"{bundle}: no exported detector; make one with `python -m pipeline export`")
    try:
        from pipeline.serving.worker import run_worker
    except ImportError as error:
        raise InputError(f"serve needs {error.name}: pip install 'mofe-feature-cache[serve]'") from error
    with _bound(asked) as listener, _stop_asked() as stop:
        begun = False
        while True:
            worker = _Worker(partial(run_worker, bundle, asked, listener))
            try:
                if not worker.is_ready(stop):
                    return
                if not begun:
                    complain(f"serve: {bundle} at {_url(listener)}: POST /score, GET /info, /healthz; Ctrl-C ends it")
                    begun = True
                if worker.outlives(stop):
                    listener.close()  # or new connections would wait for nobody
                    worker.finish(stop, asked.timeout + _SPARE)
                    return
                complain(f"serve: the worker died ({worker.end}); another takes its place")
            finally:
                worker.kill()


class _Worker:
    """The process that answers, from its start on.

    Args:
        run: what it does, given where to say that it is ready.
    """

    def __init__(self, run: Callable[[Connection], None]) -> None:
        # This process loads the libraries, and uses none of them: it has no threads, and a worker that is forked from
        # it is there in a second, where it would load torch for several. Elsewhere forks are not safe even so.
        import stages.detection.torch_runtime  # noqa: F401

        context: Any = get_context("fork" if sys.platform == "linux" else "spawn")
        self._said, said = context.Pipe(duplex=False)
        self._process = context.Process(target=run, args=(said,), name="serve")
        self._process.start()
        said.close()

    @property
    def end(self) -> str:
        """How it ended."""
        self._process.join()
        code = self._process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def is_ready(self, stop: int) -> bool:
        """Wait until it answers; False where the end is asked for before.

        Raises:
            InputError, StageError: it cannot.
        """
        if stop in wait([self._said, stop]):
            return False
        try:
            failed: tuple[int, str] | None = self._said.recv()
        except EOFError as error:
            raise StageError(f"serve: the worker died before it answered ({self.end})") from error
        if failed is not None:
            status, message = failed
            raise (InputError if status == 2 else StageError)(message)
        return True

    def outlives(self, stop: int) -> bool:
        """Wait until the end is asked for; False where it dies before."""
        return stop in wait([self._process.sentinel, stop])

    def finish(self, stop: int, seconds: float) -> None:
        """Let it end what is in flight, until that many seconds are over or the end is asked for again."""
        os.read(stop, 1)
        self._process.terminate()
        wait([self._process.sentinel, stop], seconds)

    def kill(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.join()
        self._said.close()


@contextmanager
def _bound(asked: Serving) -> Iterator[socket.socket]:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            asked.host, asked.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise InputError(f"--host {asked.host} --port {asked.port}: {error.strerror or error}: give another") from error
    with listener:
        yield listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _stop_asked() -> Iterator[int]:
    """A descriptor that has a byte to read for each SIGINT and SIGTERM."""
    read, write = os.pipe()
    os.set_blocking(write, False)

    def note(*_: object) -> None:
        with suppress(BlockingIOError):  # enough have come
            os.write(write, b".")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield read
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)
