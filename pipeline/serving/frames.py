"""What the process that holds the connections and the one that computes say to each other, over a pair of sockets.

A question is an image or features as they came; an answer is JSON as it goes. Nothing of it is pickled.
"""

import asyncio
import json
import struct
from typing import Literal, NamedTuple

BodyKind = Literal["image", "features"]

OWN = 0  # number of what a worker says of itself; questions count from 1
READY, ALIVE, HUNG = 200, 204, 503  # statuses of it, beside the exit status of one that cannot start
LIMIT = 1 << 20  # bytes that either side takes before it reads them

_KINDS: tuple[BodyKind, ...] = ("image", "features")
_QUESTION = struct.Struct("<QBHdQ")
_ANSWER = struct.Struct("<QHQ")
_MOST_SAID = 300  # characters of a reason


class Question(NamedTuple):
    """What is asked.

    Attributes:
        number: which the answer has as well.
        kind: of the body.
        nearest: so many ID images are to be named.
        seconds: after them nobody waits for the answer.
        body: as it came.
    """

    number: int
    kind: BodyKind
    nearest: int
    seconds: float
    body: bytes

    def packed(self) -> bytes:
        """As it is sent."""
        kind = _KINDS.index(self.kind)
        return _QUESTION.pack(self.number, kind, self.nearest, self.seconds, len(self.body)) + self.body


class Answer(NamedTuple):
    """What is answered.

    Attributes:
        number: of the question.
        status: of HTTP.
        body: JSON.
    """

    number: int
    status: int
    body: bytes

    def packed(self) -> bytes:
        """As it is sent."""
        return _ANSWER.pack(self.number, self.status, len(self.body)) + self.body


async def read_question(reader: asyncio.StreamReader) -> Question:
    """The next question; raises `asyncio.IncompleteReadError` where there are no more."""
    number, kind, nearest, seconds, length = _QUESTION.unpack(await reader.readexactly(_QUESTION.size))
    return Question(number, _KINDS[kind], nearest, seconds, await reader.readexactly(length))


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """The next answer; raises `asyncio.IncompleteReadError` where there are no more."""
    number, status, length = _ANSWER.unpack(await reader.readexactly(_ANSWER.size))
    return Answer(number, status, await reader.readexactly(length))


def refusal(reason: str) -> bytes:
    """JSON that says why there is no other answer.

    >>> refusal("not an image")
    b'{"error":"not an image"}'
    """
    # A reason may quote what was sent, which may be long, or no text that UTF-8 knows.
    said = reason[:_MOST_SAID].encode("utf-8", "replace").decode()
    return as_json({"error": said})


def as_json(value: object) -> bytes:
    """As it goes over HTTP.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
