"""The process that answers: a detector behind uvicorn, on a socket that its parent holds."""

import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import uvicorn

from pipeline.deciding import Serving
from pipeline.serving.app import application
from pipeline.terminal import explain
from stages.detection.detector import Detector
from stages.machine import end_with_parent, keep_freed_memory

_IDLE = 75  # seconds that a connection without a request is kept
_SPARE = 2  # seconds beyond the timeout of a request that is in flight when the end is asked for


class _Server(uvicorn.Server):
    """uvicorn's, that is told to end by its parent alone."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Neither take signals nor raise them again when all is done."""
        yield


def run_worker(bundle: str, asked: Serving, listener: socket.socket, said: Connection) -> None:
    """Answer until SIGTERM, and finish then what is in flight.

    Args:
        bundle: file of the detector.
        asked: device and limits.
        listener: bound socket.
        said: is sent None once it answers, or `explain` of what is wrong.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is in flight yet
    end_with_parent()
    keep_freed_memory()
    try:
        app = application(Detector.load(bundle, asked.device), asked)
    except Exception as error:
        said.send(explain(error))
        return
    config = uvicorn.Config(
        app,
        log_level="critical",
        access_log=False,
        ws="none",
        server_header=False,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=int(asked.timeout) + _SPARE,
    )
    server = _Server(config)
    signal.signal(signal.SIGTERM, server.handle_exit)
    listener.listen(config.backlog)
    said.send(None)
    server.run([listener])
