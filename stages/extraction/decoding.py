"""Who decodes: threads of this process, or processes that write pixels into memory which this one sees.

Threads share one interpreter: what of reading, decoding and resizing an image holds its lock bounds how many images a
second they can give: six cores' worth, of sixteen. A GPU takes more (``make bench-decode`` measures both). Processes
have no such bound. They take seconds to start, in which threads decode, and are given nothing but files on the disk.
"""

import ctypes
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import current_process, get_context
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from stages.errors import StageError
from stages.extraction.reader import Reader, ReadImage
from stages.inputs.images import ImageReader, UndecodedJpeg
from stages.inputs.images.table import FileRange
from stages.machine import end_with_parent, keep_freed_memory, usable_cores
from stages.networks.preprocessing import Preprocessing

_WORTH_PROCESSES = 4096  # images: fewer are decoded before processes have started
_TOGETHER = 8  # images that a process is sent at once


class Decoders(Protocol):
    """Decode batches in the background, left by ``with``: what has not begun by then is dropped."""

    def begin(self, reader: Reader, rows: Sequence[int]) -> AbstractContextManager[list[ReadImage]]:
        """Begin to decode images of a reader; entering the result waits for them, leaving it frees their memory."""

    def __enter__(self) -> "Decoders": ...

    def __exit__(self, *error: object) -> None: ...


def decoding_processes(device: str, contents: Sequence[object], n_images: int) -> int:
    """How many processes shall decode; 0: threads.

    Args:
        device: kind of the one that computes; beside a network on the CPU threads decode on the cores that it leaves.
        contents: where the bytes of images come from.
        n_images: to be decoded in all.
    """
    travels = all(isinstance(content, FileRange) for content in contents)  # a dataset from Python would each time
    if device != "cuda" or n_images < _WORTH_PROCESSES or not travels:
        return 0
    return 0 if current_process().daemon else usable_cores()  # one that is daemonic has no children


class DecodingThreads:
    """Threads that decode.

    Args:
        n: how many.
    """

    def __init__(self, n: int) -> None:
        self._pool = ThreadPoolExecutor(n)

    def begin(self, reader: Reader, rows: Sequence[int]) -> AbstractContextManager[list[ReadImage]]:
        """See `Decoders`."""
        return _decoded([self._pool.submit(reader.read, row) for row in rows])

    def __enter__(self) -> "DecodingThreads":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def _decoded(images: Sequence[Future[ReadImage]]) -> Iterator[list[ReadImage]]:
    yield [image.result() for image in images]


class DecodingProcesses:
    """Processes that decode into shared memory.

    Args:
        n: how many; until they have started, as many threads decode.
        preprocessing: of the network; what it leaves to a GPU is read and looked at there, and sent as it is.
        batch: images that are begun at once, at most,
        ahead: and how many such batches before the first of them is left.
    """

    def __init__(self, n: int, preprocessing: Preprocessing, batch: int, ahead: int) -> None:
        context: Any = get_context("forkserver")  # a fork of this process would copy locks that its threads hold
        context.set_forkserver_preload([__name__])
        shape = (ahead, batch, *preprocessing.shape)
        memory = context.RawArray(ctypes.c_uint8, torch.Size(shape).numel())
        self._pixels = _as_tensor(memory, shape)
        self._free: SimpleQueue[int] = SimpleQueue()
        for slot in range(ahead):
            self._free.put(slot)
        self._pool = ProcessPoolExecutor(n, context, _begin_process, (memory, shape, preprocessing))
        self._threads = DecodingThreads(n)
        self._starter = ThreadPoolExecutor(1)
        self._started = self._starter.submit(self._start, n)

    def _start(self, n: int) -> None:
        """Start processes: those that are still missing when all are at work follow then."""
        waiting = [self._pool.submit(_begun) for _ in range(n)]
        for begun in waiting:
            begun.result()

    def started(self) -> bool:
        """Wait until the processes decode; False: they cannot be started, and threads decode."""
        return self._started.exception() is None

    def begin(self, reader: Reader, rows: Sequence[int]) -> AbstractContextManager[list[ReadImage]]:
        """See `Decoders`; waits while as many batches as were said are not left yet."""
        if not self._started.done() or not self.started():
            return self._threads.begin(reader, rows)
        slot = self._free.get()
        parts = [
            self._pool.submit(_decode_into, reader.files(rows[start : start + _TOGETHER]), slot, start)
            for start in range(0, len(rows), _TOGETHER)
        ]
        return self._decoded(slot, parts)

    @contextmanager
    def _decoded(self, slot: int, parts: Sequence[Future[list["_Decoded"]]]) -> Iterator[list[ReadImage]]:
        try:
            found = [image for part in parts for image in part.result()]
            pixels = self._pixels[slot]
            yield [
                ReadImage(image.digest, pixels[at] if image.content is None else image.content)
                for at, image in enumerate(found)
            ]
        except BrokenProcessPool as error:
            raise StageError(
                "a process that decodes images has ended, perhaps for want of memory: what is finished is kept, "
                "run the same again"
            ) from error
        finally:
            self._free.put(slot)

    def __enter__(self) -> "DecodingProcesses":
        return self

    def __exit__(self, *error: object) -> None:
        self._starter.shutdown()
        self._pool.shutdown(cancel_futures=True)
        self._threads.__exit__(*error)


class _Decoded(NamedTuple):
    """What a process says of an image."""

    digest: bytes
    content: UndecodedJpeg | str | None  # see `ReadImage`; None: its pixels stand in the shared memory


class _Process(NamedTuple):
    """What a decoding process has."""

    pixels: Tensor  # [ahead, batch, 3, H, W] uint8, shared
    preprocessing: Preprocessing


_PROCESS: list[_Process] = []  # one, in a process that decodes


def _begin_process(memory: Any, shape: Sequence[int], preprocessing: Preprocessing) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever waits for the images says what Ctrl-C does
    keep_freed_memory()
    torch.set_num_threads(1)
    _PROCESS.append(_Process(_as_tensor(memory, shape), preprocessing))


def _begun() -> None:
    """What a process is asked first: it answers once it has begun."""


def _decode_into(files: ImageReader, slot: int, start: int) -> list[_Decoded]:
    """Decode some images of a batch, the first of which is at `start`."""
    own, found = _PROCESS[0], []
    reader = Reader(files, own.preprocessing)
    for index in range(len(files)):
        digest, content = reader.read(index)
        if isinstance(content, Tensor):
            own.pixels[slot, start + index] = content
        found.append(_Decoded(digest, None if isinstance(content, Tensor) else content))
    return found


def _as_tensor(memory: Any, shape: Sequence[int]) -> Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8).view(*shape)
