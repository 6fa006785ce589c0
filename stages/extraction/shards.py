"""How one process makes the shards of a cache: it decodes, computes and writes at the same time.

::

    images ── decoders ──> transformed images ── passes ──> rows of a shard ── writer ──> shard on disk
              threads        a few batches       threads    in the cache's     thread
                             ahead, no more                 own dtype

The work item is a shard: any process that can read the images makes it, alone, and the same bits come out. For that,
every forward pass has the same number of images and one thread; the cores are used by passes side by side.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache import Failure, FeatureCache, FeatureSpec, InputTable, ShardPlan, commit_shard, sha256
from stages.config import BackboneConfig
from stages.errors import StageError
from stages.inputs.images import ImageError, ImageReader, decode_image
from stages.machine import usable_cores
from stages.networks.backbone import COMPUTE_THREADS, Backbone, load_backbone
from stages.networks.tokens import reduce_patches

_AHEAD = 2  # batches that are decoded while all passes compute
_GPU_PASSES = 2  # one computes while the other's images are on their way


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


class ShardDone(NamedTuple):
    """How many inputs are done since the last report, and how many of them failed."""

    inputs: int
    failures: int


def extract_shard(task: ShardTask) -> ShardDone:
    """Make one shard in whatever process this is; the backbone is loaded once a process."""
    backbone = _backbone_of_process(task.backbone, task.expert_blocks, task.device, task.spec.weights_sha)
    reports = list(make_shards([task], backbone))
    return ShardDone(sum(report.inputs for report in reports), sum(report.failures for report in reports))


@lru_cache(maxsize=1)
def _backbone_of_process(config: BackboneConfig, expert_blocks: int, device: str, weights_sha: str) -> Backbone:
    backbone = load_backbone(config, expert_blocks, device)
    found = backbone.feature_spec("float32", "none").weights_sha
    if found != weights_sha:
        raise StageError(f"a worker reads other weights than this process under {config.weights}: copy them there")
    return backbone


@lru_cache(maxsize=1)
def _older_version(path: str, identity: str) -> FeatureCache:
    cache = FeatureCache.open(path)
    if cache.identity != identity:
        raise StageError(f"{path} was replaced while rows were taken over from it: run the same again")
    return cache


def make_shards(tasks: Iterable[ShardTask], backbone: Backbone) -> Iterator[ShardDone]:
    """Make shards one after the other, reporting after every batch; all are on disk when this is exhausted.

    While a shard is written batches that were begun go on, but no more: a kill costs at most one shard and these.
    Whoever leaves early (an error, Ctrl-C) waits for the batches and the shard that are under way.
    """
    batches: deque[tuple[Future[ShardDone], _Shard | None]] = deque()  # with the shard that is complete by then
    written: Future[None] | None = None
    with ExitStack() as stack:
        threads = stack.enter_context(_one_thread_a_pass())
        n_passes = threads if backbone.device.type == "cpu" else _GPU_PASSES
        writer = stack.enter_context(ThreadPoolExecutor(1))
        passes = stack.enter_context(_pool(n_passes, lambda: torch.set_num_threads(COMPUTE_THREADS)))
        decoders = stack.enter_context(_pool(max(2, usable_cores())))

        def finish(most: int) -> Iterator[ShardDone]:
            nonlocal written
            while len(batches) > most:
                if written is not None:
                    written.result()
                future, shard = batches.popleft()
                report = future.result()
                written = None if shard is None else writer.submit(shard.commit)
                if report.inputs:
                    yield report

        for task in tasks:
            shard = _Shard(task, backbone)
            todo = np.flatnonzero(task.older_rows < 0)
            groups = [todo[start : start + backbone.batch] for start in range(0, len(todo), backbone.batch)]
            batches.append((passes.submit(shard.take_over), None if groups else shard))
            yield from finish(n_passes + _AHEAD if groups else 0)
            for group in groups:
                images = [decoders.submit(_load, task.reader, int(index), backbone.transform) for index in group]
                batches.append((passes.submit(shard.compute, group, images), shard if group is groups[-1] else None))
                yield from finish(n_passes + _AHEAD)
        yield from finish(0)
        if written is not None:
            written.result()


@contextmanager
def _one_thread_a_pass() -> Iterator[int]:
    """One thread for each of torch's operations, which fixes their order of summation; gives the threads there were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(COMPUTE_THREADS)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _pool(n: int, prepare: Callable[[], None] | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads that drop what has not begun, and finish what has, when they are left."""
    pool = ThreadPoolExecutor(n, initializer=prepare)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _Loaded(NamedTuple):
    digest: bytes
    image: Tensor | str  # transformed, or why it cannot be used


def _load(reader: ImageReader, index: int, transform: Callable[[Any], Tensor]) -> _Loaded:
    digest = bytes(32)
    try:
        data = reader.read(index)
        digest = bytes.fromhex(sha256(data))
        return _Loaded(digest, transform(decode_image(data)))
    except ImageError as error:
        return _Loaded(digest, str(error))


class _Shard:
    """A shard that fills in memory; its batches may come at the same time and in any order."""

    def __init__(self, task: ShardTask, backbone: Backbone) -> None:
        self.task = task
        self.backbone = backbone
        n, datasets = len(task.inputs), task.spec.datasets().items()
        self._arrays = {name: np.empty((n, *shape), dtype) for name, (shape, dtype) in datasets}
        self._digests = np.zeros((n, 32), dtype=np.uint8)
        self._reasons: dict[int, str] = {}

    def take_over(self) -> ShardDone:
        """Copy the rows that an older version of the cache has."""
        at = np.flatnonzero(self.task.older_rows >= 0)
        if self.task.older is not None and len(at):
            older, rows = _older_version(*self.task.older), self.task.older_rows[at]
            for name, array in self._arrays.items():
                array[at] = older.read(name, rows)
            self._digests[at] = older.image_hashes[rows]
        return ShardDone(len(at), 0)

    def compute(self, rows: NDArray[np.int64], images: list[Future[_Loaded]]) -> ShardDone:
        """One forward pass of exactly ``backbone.batch`` images, padded with the last one."""
        used, tensors = [], []
        for index, loaded in zip(rows.tolist(), [image.result() for image in images], strict=True):
            self._digests[index] = np.frombuffer(loaded.digest, dtype=np.uint8)
            if isinstance(loaded.image, Tensor):
                used.append(index)
                tensors.append(loaded.image)
            else:
                self._reasons[index] = loaded.image
        if tensors:
            batch = torch.stack(tensors + tensors[-1:] * (self.backbone.batch - len(tensors)))
            if self.backbone.device.type == "cuda":
                batch = batch.pin_memory().to(self.backbone.device, non_blocking=True)
            spec = self.task.spec
            tokens = reduce_patches(self.backbone.encode(batch), self.backbone.grid, spec.patches)[: len(used)]
            for name, array in self._arrays.items():
                # torch casts four times faster than numpy; what does not fit becomes inf, and the cache refuses it.
                array[used] = getattr(tokens, name).to(getattr(torch, spec.dtype)).cpu().numpy()
        return ShardDone(len(rows), len(rows) - len(used))

    def commit(self) -> None:
        """Write the shard."""
        task, failed = self.task, np.zeros(len(self.task.inputs), dtype=np.bool_)
        failed[list(self._reasons)] = True
        failures = [Failure(task.inputs.ids[index], self._reasons[index]) for index in sorted(self._reasons)]
        arrays = {name: array[~failed] for name, array in self._arrays.items()} if failures else self._arrays
        commit_shard(task.path, task.plan, arrays, task.inputs.with_results(self._digests, failed), failures)
