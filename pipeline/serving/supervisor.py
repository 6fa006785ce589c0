"""`serve` as a command: the socket, and what is said on standard error. Importing it is light."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from pipeline.deciding import Serving
from pipeline.terminal import complain
from stages.errors import InputError
from stages.files.bundle_file import check_is_bundle

if TYPE_CHECKING:
    from pipeline.serving.backend import WorkerMain


def serve_bundle(bundle: str, asked: Serving, work: "WorkerMain | None" = None) -> None:
    """Answer until SIGINT or SIGTERM; requests in flight are finished, a second signal ends them.

    A worker that dies or hangs is replaced: what it had is answered by 503, other requests wait for the next.

    Args:
        bundle: file of the detector.
        asked: where, and the limits.
        work: what a worker does in place of `run_worker` of the bundle.

    Raises:
        InputError: no detector; an address that cannot be had; the extra is not installed.
        StageError: a worker that was to replace another cannot start.
    """
    check_is_bundle(bundle)
    try:
        from pipeline.serving.front import answer_requests
        from pipeline.serving.worker import run_worker
    except ImportError as error:
        raise InputError(f"serve needs {error.name}: pip install 'mofe-feature-cache[serve]'") from error
    with _bound(asked) as listener:

        def begun() -> None:
            complain(f"serve: {bundle} at {_url(listener)}: POST /score, GET /info, /healthz; Ctrl-C ends it")

        asyncio.run(answer_requests(work or partial(run_worker, bundle, asked), asked, listener, begun))


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
