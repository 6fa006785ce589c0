"""How one process makes the shards of a cache: it decodes, computes and writes at the same time.

::

    images ── Reader ──> pixels ── Encoder ──> rows of a shard ── Writer ──> shard on disk
            threads or   a few     threads     in the cache's     thread
            processes   batches                own dtype
                        ahead, no more

The work item is a shard: any process that can read the images makes it, alone, and the same bits come out. For that,
every forward pass has the same number of images and one thread; the cores are used by passes side by side.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cache import FeatureCache, FeatureSpec, InputTable, ShardPlan
from stages.config import BackboneConfig
from stages.errors import StageError
from stages.extraction.decoding import Decoders, DecodingProcesses, DecodingThreads
from stages.extraction.encoder import Encoder
from stages.extraction.gpu_jpeg import DecodedImage, decode_left
from stages.extraction.passes import pool_of_passes
from stages.extraction.reader import Reader, ReadImage
from stages.extraction.writer import Writer
from stages.inputs.images import ImageReader
from stages.machine import usable_cores
from stages.networks.backbone import Backbone, load_backbone, weights_sha
from stages.networks.compute import COMPUTE_THREADS
from stages.networks.repeatable import repeatable, torch_threads

_GPU_PASSES = 3  # one computes while another's images are on their way, and a third's features


@dataclass(frozen=True)
class ShardTask:
    """One shard's work: plain and picklable, so that it may travel to another process or machine.

    Attributes:
        path: folder of the unfinished cache.
        plan: which inputs.
        spec: what the features are.
        backbone, expert_blocks, device: what makes them.
        inputs: the plan's slice of the listing.
        reader: bytes of these inputs.
        older: folder and identity of a sealed cache of the same spec that has some of the rows already.
        older_rows: [n] int64, the row of each input there, -1 where it is to be computed.
    """

    path: str
    plan: ShardPlan
    spec: FeatureSpec
    backbone: BackboneConfig
    expert_blocks: int
    device: str
    inputs: InputTable
    reader: ImageReader
    older: tuple[str, str] | None
    older_rows: NDArray[np.int64]

    def __str__(self) -> str:
        first, last = self.inputs.ids[0], self.inputs.ids[len(self.inputs) - 1]
        return f"shard {self.plan.index} of {self.path} ({first} to {last})"


class ShardDone(NamedTuple):
    """How many inputs are done since the last report, and how many of them failed."""

    inputs: int
    failures: int


class Mapper(Protocol):
    """Runs tasks in other processes and yields results as they complete; `stages.context.Cluster.map`."""

    def __call__(self, fn: Callable[[ShardTask], ShardDone], items: Iterable[ShardTask], /) -> Iterator[ShardDone]:
        """Map `fn` over the tasks."""


def extract_shard(task: ShardTask) -> ShardDone:
    """Make one shard in whatever process this is; the backbone is loaded once a process."""
    backbone = _backbone_of_process(task.backbone, task.expert_blocks, task.device, task.spec.weights_sha)
    reports = list(make_shards([task], backbone))
    return ShardDone(sum(report.inputs for report in reports), sum(report.failures for report in reports))


@lru_cache(maxsize=1)
def _backbone_of_process(config: BackboneConfig, expert_blocks: int, device: str, expected_sha: str) -> Backbone:
    backbone = load_backbone(config, expert_blocks, device)
    if weights_sha(backbone.model) != expected_sha:
        raise StageError(f"a worker reads other weights than this process under {config.weights}: copy them there")
    return backbone


@lru_cache(maxsize=1)
def _older_version(path: str, identity: str) -> FeatureCache:
    cache = FeatureCache.open(path)
    if cache.identity != identity:
        raise StageError(f"{path} was replaced while rows were taken over from it: run the same again")
    return cache


def make_shards(
    tasks: Iterable[ShardTask], backbone: Backbone, ahead: int = 2, processes: int = 0
) -> Iterator[ShardDone]:
    """Make shards one after the other, reporting after every batch; all are on disk when this is exhausted.

    While a shard is written the next one fills, and waits when it is complete: a kill costs at most these two and the
    batches that are begun by then, which is also what is held in memory, however many shards there are. Whoever leaves
    early (an error, Ctrl-C) waits for the batches and the shard that are under way.

    Args:
        tasks: in the order in which they are begun.
        backbone: makes their features.
        ahead: batches that are decoded while all passes compute.
        processes: that decode, see `decoding_processes`; 0: threads of this one.
    """
    batches: deque[tuple[Future[ShardDone], _Shard | None]] = deque()  # with the shard that is complete by then
    written: Future[None] | None = None
    encoder: Encoder | None = None
    with ExitStack() as stack:
        stack.enter_context(repeatable(backbone.device))
        threads = stack.enter_context(torch_threads(COMPUTE_THREADS))
        n_passes = threads if backbone.device.type == "cpu" else _GPU_PASSES
        writer = stack.enter_context(ThreadPoolExecutor(1))
        passes = stack.enter_context(pool_of_passes(n_passes, backbone.device.type))

        def finish(most: int) -> Iterator[ShardDone]:
            nonlocal written
            while len(batches) > most:
                future, shard = batches.popleft()
                report = future.result()
                if written is not None and (shard is not None or written.done()):
                    written.result()  # of two shards that are complete one is written, so that memory stays as it is
                    written = None
                if shard is not None:
                    written = writer.submit(shard.commit)
                if report.inputs:
                    yield report

        for task in tasks:
            if encoder is None or encoder.spec != task.spec:
                encoder = Encoder(backbone, task.spec)
                passes.submit(encoder.compile).result()
                decoders = stack.enter_context(_decoders(processes, encoder, n_passes + ahead + 1))
            shard = _Shard(task, encoder, Reader(task.reader, backbone.preprocessing))
            todo = np.flatnonzero(task.older_rows < 0)
            groups = [todo[start : start + encoder.batch] for start in range(0, len(todo), encoder.batch)]
            batches.append((passes.submit(shard.take_over), None if groups else shard))
            yield from finish(n_passes + ahead if groups else 0)
            for group in groups:
                images = decoders.begin(shard.reader, group.tolist())
                batches.append((passes.submit(shard.compute, group, images), shard if group is groups[-1] else None))
                yield from finish(n_passes + ahead)
        yield from finish(0)
        if written is not None:
            written.result()


def _decoders(processes: int, encoder: Encoder, at_once: int) -> Decoders:
    """Those that give an encoder its images, that many batches at once."""
    if processes:
        return DecodingProcesses(processes, encoder.backbone.preprocessing, encoder.batch, at_once)
    return DecodingThreads(max(2, usable_cores()))


class _Shard:
    """A shard that fills in memory; its batches may come at the same time and in any order."""

    def __init__(self, task: ShardTask, encoder: Encoder, reader: Reader) -> None:
        self._task = task
        self._encoder = encoder
        self._writer = Writer(task.path, task.plan, task.spec, task.inputs)
        self.reader = reader

    def take_over(self) -> ShardDone:
        """Copy the rows that an older version of the cache has."""
        task, at = self._task, np.flatnonzero(self._task.older_rows >= 0)
        if task.older is not None and len(at):
            older, rows = _older_version(*task.older), task.older_rows[at]
            self._writer.add_rows(at, {name: older.read(name, rows) for name in task.spec.datasets()})
            self._writer.add_digests(at, older.image_hashes[rows])
        return ShardDone(len(at), 0)

    def compute(self, rows: NDArray[np.int64], images: AbstractContextManager[list[ReadImage]]) -> ShardDone:
        """One forward pass of the images that can be used; their memory is free when it returns."""
        with images as read:
            backbone = self._encoder.backbone
            return self._compute(rows, decode_left(read, backbone.preprocessing, backbone.device))

    def _compute(self, rows: NDArray[np.int64], read: Sequence[DecodedImage]) -> ShardDone:
        digests = np.frombuffer(b"".join(image.digest for image in read), np.uint8)
        self._writer.add_digests(rows, digests.reshape(-1, 32))
        used, tensors = [], []
        for index, image in zip(rows.tolist(), read, strict=True):
            if isinstance(image.content, Tensor):
                used.append(index)
                tensors.append(image.content)
            else:
                self._writer.add_failure(index, image.content)
        if tensors:
            self._writer.add_rows(used, self._encoder.encode(tensors))
        return ShardDone(len(rows), len(rows) - len(used))

    def commit(self) -> None:
        """Write it."""
        self._writer.commit()
