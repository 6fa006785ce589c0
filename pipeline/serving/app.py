"""What is answered over HTTP: JSON, whatever is asked."""

import asyncio
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from pipeline.deciding import Serving
from pipeline.serving.backend import Backend, WorkerLostError
from pipeline.serving.bodies import RefusedError, image_of, kind_of, nearest_of, read_body
from pipeline.serving.frames import as_json, refusal
from pipeline.terminal import complain

_AT_ONCE = 64  # requests whose bodies are in memory; others wait with theirs unread


def application(backend: Backend, asked: Serving) -> Starlette:
    """The ASGI application in front of a worker.

    Args:
        backend: answers.
        asked: the limits.
    """
    service = _Service(backend, asked)

    async def unknown(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _error(
            error.status_code, f"{error.detail}: POST /score, GET /info and GET /healthz are answered", error.headers
        )

    routes = [
        Route("/score", service.score, methods=["POST"]),
        Route("/healthz", service.health, methods=["GET"]),
        Route("/info", service.info, methods=["GET"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: unknown})
    app.router.redirect_slashes = False  # a redirection has no reason in it
    return app


class _Service:
    def __init__(self, backend: Backend, asked: Serving) -> None:
        self._backend, self._asked = backend, asked
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def health(self, _request: Request) -> Response:
        """Whether a worker answers, whose detector has proved itself; and how many were lost."""
        backend = self._backend
        said = {"status": "ok" if backend.is_ready else "starting", "workers_lost": backend.lost}
        if backend.lost:
            said["last_lost"] = backend.why
        return _json(200 if backend.is_ready else 503, said)

    async def info(self, _request: Request) -> Response:
        """Where the detector came from, what it takes and promises, and the limits."""
        asked = self._asked
        limits = {"bytes": asked.max_bytes, "pixels": asked.max_pixels, "seconds": asked.timeout}
        return _json(200, self._backend.info | {"limits": limits})

    async def score(self, request: Request) -> Response:
        """What the detector says of an image, or of features."""
        return await _said(request, self._score, self._asked.timeout)

    async def _score(self, request: Request) -> Response:
        nearest, until = nearest_of(request), asyncio.get_running_loop().time() + self._asked.timeout
        async with self._slots:
            try:
                body = bytes(await read_body(request, self._asked.max_bytes))
            except asyncio.CancelledError:
                raise RefusedError(408, "the body did not come in time") from None
            is_json = kind_of(request) == "application/json"
            content = body if is_json else await image_of(request, body)
            left = until - asyncio.get_running_loop().time()
            answer = await self._backend.ask("features" if is_json else "image", content, nearest, left)
            return Response(answer.body, answer.status, media_type="application/json")


async def _said(
    request: Request, handle: Callable[[Request], Coroutine[Any, Any, Response]], seconds: float
) -> Response:
    """What a handler answers, or why it does not."""
    try:
        async with asyncio.timeout(seconds):
            return await handle(request)
    except RefusedError as error:
        return _error(error.status, str(error))
    except TimeoutError:
        return _error(503, f"no answer within {seconds:g} s")
    except WorkerLostError as error:
        return _error(503, str(error))
    except ClientDisconnect:
        return Response(status_code=400)  # nobody reads it
    except Exception as error:
        complain(f"serve: unexpected {type(error).__name__}: {error}; a request was answered by 500")
        traceback.print_exc()
        return _error(500, f"unexpected {type(error).__name__}")


def _json(status: int, value: object) -> Response:
    return Response(as_json(value), status, media_type="application/json")


def _error(status: int, reason: str, headers: Any = None) -> Response:
    # A body that comes too slowly would go on to come.
    closing = {"connection": "close"} if status == 408 else {}
    return Response(refusal(reason), status, dict(headers or {}) | closing, media_type="application/json")
