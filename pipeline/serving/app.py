"""What is answered over HTTP: JSON, whatever is asked. The event loop neither decodes an image nor runs a network."""

import asyncio
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.deciding import Serving
from pipeline.serving.batches import Batches
from pipeline.serving.bodies import RefusedError, features_of, image_of, kind_of, nearest_of, read_body
from pipeline.terminal import complain
from stages.detection.detector import Detector, ImageScores
from stages.errors import InputError
from stages.inputs.images import ImageError, image_size

Row = dict[str, Any]  # what is said of one image

_AT_ONCE = 64  # requests whose bodies are in memory; others wait with theirs unread
_MOST_SAID = 300  # characters of a reason


class _Asked(NamedTuple):
    pixels: NDArray[np.uint8]  # [3, size, size]
    nearest: int


def application(detector: Detector, asked: Serving) -> Starlette:
    """The ASGI application of a detector.

    Args:
        detector: answers.
        asked: the limits.
    """
    service = _Service(detector, asked)

    @asynccontextmanager
    async def living(_app: Starlette) -> AsyncIterator[None]:
        batches = asyncio.create_task(service.batches.run())
        yield
        batches.cancel()
        with suppress(asyncio.CancelledError):
            await batches

    async def unknown(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _error(error.status_code, f"{error.detail}: POST /score, GET /info and GET /healthz are answered")

    routes = [
        Route("/score", service.score, methods=["POST"]),
        Route("/healthz", service.health, methods=["GET"]),
        Route("/info", service.info, methods=["GET"]),
    ]
    return Starlette(routes=routes, lifespan=living, exception_handlers={HTTPException: unknown})


class _Service:
    def __init__(self, detector: Detector, asked: Serving) -> None:
        self._detector, self._asked = detector, asked
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self.batches: Batches[_Asked, Row] = Batches(self._answers, asked.batch)

    async def health(self, _request: Request) -> Response:
        """The worker does not listen before its detector has proved itself."""
        return JSONResponse({"status": "ok"})

    async def info(self, _request: Request) -> Response:
        """Where the detector came from, what it takes and promises, and the limits."""
        detector, asked = self._detector, self._asked
        return JSONResponse(
            {
                "about": dict(detector.about),
                "takes": {"images": bool(detector.runtime.size), "features": sorted(detector.runtime.reads)},
                "class_names": list(detector.class_names),
                "threshold": detector.threshold.threshold,
                "limits": {"bytes": asked.max_bytes, "pixels": asked.max_pixels, "seconds": asked.timeout},
            }
        )

    async def score(self, request: Request) -> Response:
        """What the detector says of an image, or of features."""
        return await _said(request, self._score, self._asked.timeout)

    async def _score(self, request: Request) -> Response:
        nearest = nearest_of(request)
        async with self._slots:
            try:
                body = bytes(await read_body(request, self._asked.max_bytes))
            except asyncio.CancelledError:
                raise RefusedError(408, "the body did not come in time") from None
            if kind_of(request) == "application/json":
                features = await self.batches.prepared(lambda: self._detector.checked(features_of(body)))
                rows = await self.batches.alone(
                    lambda: image_rows(self._detector.score_features(features, nearest), nearest)
                )
                return JSONResponse({"rows": rows})
            image = await image_of(request, body)
            row = await self.batches.ask(partial(self._prepare, image, nearest))
            return JSONResponse(row)

    def _prepare(self, image: bytes, nearest: int) -> _Asked:
        """By a thread of its own."""
        if self._detector.runtime.size:  # what is no image is said by `prepare`, of a detector that takes images
            width, height = image_size(image)
            if width * height > self._asked.max_pixels:
                raise ImageError(f"too large: {width} × {height} pixels, {self._asked.max_pixels} are the most")
        return _Asked(self._detector.prepare(image), nearest)

    def _answers(self, batch: Sequence[_Asked]) -> list[Row]:
        """By the network's thread."""
        most = max(own.nearest for own in batch)
        rows = image_rows(self._detector.score_prepared(np.stack([own.pixels for own in batch]), most), most)
        return [_with_nearest(row, own.nearest) for row, own in zip(rows, batch, strict=True)]


async def _said(
    request: Request, handle: Callable[[Request], Coroutine[Any, Any, Response]], seconds: float
) -> Response:
    """What a handler answers, or why it does not."""
    try:
        async with asyncio.timeout(seconds):
            return await handle(request)
    except RefusedError as error:
        return _error(error.status, str(error))
    except InputError as error:  # ImageError is one
        return _error(400, str(error))
    except TimeoutError:
        return _error(503, f"no answer within {seconds:g} s")
    except ClientDisconnect:
        return Response(status_code=400)  # nobody reads it
    except Exception as error:
        complain(f"serve: unexpected {type(error).__name__}: {error}; a request was answered by 500")
        traceback.print_exc()
        return _error(500, f"unexpected {type(error).__name__}")


def _error(status: int, reason: str) -> Response:
    # A reason may quote what was sent, which may be long, or no text that UTF-8 knows.
    said = reason[:_MOST_SAID].encode("utf-8", "replace").decode()
    # A body that comes too slowly would go on to come.
    return JSONResponse({"error": said}, status, headers={"connection": "close"} if status == 408 else None)


def image_rows(found: ImageScores, nearest: int) -> list[Row]:
    """A row for each image, of what JSON has.

    Args:
        found: of n images.
        nearest: how many ID images of each are named; fewer where there are fewer.
    """
    rows: list[Row] = [
        {
            "score": score,
            "p_value": p_value,
            "decision": decision,
            "prediction": prediction,
            "threshold": admits.threshold,
        }
        for score, p_value, decision, prediction, admits in zip(
            found.score.tolist(),
            found.p_value.tolist(),
            found.decision.tolist(),
            found.prediction.tolist(),
            found.admits,
            strict=True,
        )
    ]
    if found.expert is not None:
        for row, expert in zip(rows, found.expert.tolist(), strict=True):
            row["expert"] = expert
    if found.nearest is not None:
        ids, distances = found.nearest.ids.tolist(), found.nearest.distances.tolist()
        for row, names, away in zip(rows, ids, distances, strict=True):
            near = [{"id": name, "distance": each} for name, each in zip(names, away, strict=True) if each == each]
            row["nearest"] = near[:nearest]
    return rows


def _with_nearest(row: Row, nearest: int) -> Row:
    """The row with as many as were asked for: others of its batch asked for more."""
    if not nearest:
        return {name: value for name, value in row.items() if name != "nearest"}
    return row | {"nearest": row["nearest"][:nearest]}
