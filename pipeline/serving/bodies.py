"""What stands in a request, within its limits: the bytes of one image, or JSON. Nothing of it touches a disk."""

import asyncio
import logging
from collections.abc import AsyncGenerator

import python_multipart  # Starlette reads forms by it, and misses it only when one comes
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

logging.getLogger(python_multipart.__name__).addHandler(logging.NullHandler())  # what it says is in the answer
MOST_NEAREST = 100  # ID images that may be asked for
_PIECE = 1 << 18  # bytes of a form that are searched at once


class RefusedError(Exception):
    """A request that is not answered, and the status that says so."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _InMemory(MultiPartParser):
    """Starlette's, whose files never roll over to a disk."""

    spool_max_size = 0


async def read_body(request: Request, most: int) -> bytearray:
    """All of a request's body; nothing is read of one that says itself that it is too large.

    Raises:
        RefusedError: it has more bytes than `most`.
    """
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise RefusedError(413, f"too large: {most} bytes are the most")
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > most:
            raise RefusedError(413, f"too large: {most} bytes are the most")
        body += chunk
    return body


async def image_of(request: Request, body: bytes) -> bytes:
    """The bytes of the image: the body itself, or the one file of a form.

    Raises:
        RefusedError: a form that is damaged, or holds another number of files.
    """
    if kind_of(request) != "multipart/form-data":
        return body

    async def stream() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), _PIECE):
            yield body[start : start + _PIECE]
            await asyncio.sleep(0)  # a large form is not searched at the cost of all others

    try:
        form = await _InMemory(request.headers, stream(), max_files=1, max_fields=8).parse()
    except MultiPartException as error:
        raise RefusedError(400, f"form: {error.message}") from error
    try:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise RefusedError(
                400, "form: no file in it, or one that is cut; give one image, as curl -F image=@new.jpg does"
            )
        return await files[0].read()
    finally:
        await form.close()


def kind_of(request: Request) -> str:
    """Media type of the body, in small letters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def nearest_of(request: Request) -> int:
    """How many of the nearest ID images are asked for, ``?nearest=3``.

    Raises:
        RefusedError: no such number, or something else is asked for.
    """
    if unknown := sorted({*request.query_params} - {"nearest"}):
        raise RefusedError(400, f"{unknown[0][:20]!r} is not known in a query: nearest is")
    given, *more = request.query_params.getlist("nearest") or ["0"]
    if more:
        raise RefusedError(400, f"nearest: given {1 + len(more)} times, must be given once")
    if not (given.isascii() and given.isdecimal()) or len(given) > 9 or int(given) > MOST_NEAREST:
        raise RefusedError(400, f"nearest: {given[:20]!r} given, must be a number up to {MOST_NEAREST}")
    return int(given)
