"""The process that computes: a detector that answers what it is asked over one socket."""

import asyncio
import os
import socket
from collections.abc import Callable

from pipeline.deciding import Serving
from pipeline.serving.answering import Answering
from pipeline.serving.batches import AtWork
from pipeline.serving.frames import ALIVE, HUNG, LIMIT, OWN, READY, Answer, Question, as_json, read_question
from pipeline.terminal import explain
from stages.detection.detector import Detector
from stages.machine import end_with_parent, keep_freed_memory

_BEAT = 1  # seconds between two signs of life


def run_worker(bundle: str, asked: Serving, channel: socket.socket) -> None:
    """Answer until nobody asks any more.

    Args:
        bundle: file of the detector.
        asked: device and limits.
        channel: where questions come from, of `pipeline.serving.frames`.
    """
    end_with_parent()
    keep_freed_memory()
    try:
        detector = Detector.load(bundle, asked.device, asked.runtime)
    except Exception as error:
        status, message = explain(error)
        channel.sendall(Answer(OWN, status, message.encode()).packed())
        return
    answer_all(detector, asked, channel)


def answer_all(detector: Detector, asked: Serving, channel: socket.socket) -> None:
    """The same, by a detector that was loaded.

    Args:
        detector: answers.
        asked: the limits.
        channel: where questions come from.
    """
    asyncio.run(_answer_all(Answering(detector, asked), asked.timeout, channel))


async def _answer_all(answering: Answering, timeout: float, channel: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=channel, limit=LIMIT)
    async with asyncio.TaskGroup() as tasks:  # where one of them fails, the process does, and is replaced
        tasks.create_task(answering.batches.run())
        tasks.create_task(_live(answering.batches.at_work, 2 * timeout, writer))
        writer.write(Answer(OWN, READY, as_json(answering.info())).packed())
        while True:
            try:
                question = await read_question(reader)
            except (asyncio.IncompleteReadError, ConnectionError):
                os._exit(0)  # whatever its threads are at
            tasks.create_task(_answered(answering, question, writer))


async def _answered(answering: Answering, question: Question, writer: asyncio.StreamWriter) -> None:
    if answer := await answering.answer(question):
        writer.write(answer.packed())


async def _live(at_work: Callable[[], AtWork | None], most: float, writer: asyncio.StreamWriter) -> None:
    """Say so, or that a thread does not come back."""
    while True:
        await asyncio.sleep(_BEAT)
        own = at_work()
        if own is not None and own.seconds > most:
            writer.write(Answer(OWN, HUNG, f"hung: {own.what} for {own.seconds:.0f} s".encode()).packed())
        else:
            writer.write(Answer(OWN, ALIVE, b"").packed())
