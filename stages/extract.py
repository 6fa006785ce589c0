"""Verb: stage one. Images to a sealed cache of class embeddings and tokens, each image through the backbone once.

The work item is a shard: any process that can read the images makes it, alone, and the same bits come out, because
every forward pass has the same shape. A killed extraction goes on with the shards that are missing.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache import (
    CacheBuilder,
    CacheDamagedError,
    CacheMismatchError,
    CacheNotFoundError,
    Failure,
    FeatureCache,
    FeatureSpec,
    InputTable,
    ShardPlan,
    commit_shard,
    find_caches,
    next_cache_path,
    plan_shards,
    sha256,
    unseal,
)
from stages.backbone import COMPUTE_BATCH, Backbone, load_backbone, reduce_patches
from stages.config import BackboneConfig
from stages.errors import StageError
from stages.images import ImageError, ImageReader, SampleTable, decode_image
from stages.progress import NullProgress, Progress

_DECODERS = 2  # threads that decode while the network computes
_READ_AHEAD = 4 * COMPUTE_BATCH  # images decoded but not yet computed, at most

# Versions that the bits of a cache may depend on.
_MADE_WITH = ("torch", "torchvision", "timm", "pillow", "numpy", "h5py")


@dataclass(frozen=True)
class ShardTask:
    """One shard's work: plain and picklable, so that it may travel to another process or machine."""

    path: str
    plan: ShardPlan
    backbone: BackboneConfig
    expert_blocks: int
    device: str
    weights_sha: str
    patches: str
    inputs: InputTable
    reader: ImageReader


class ShardDone(NamedTuple):
    """What a finished shard reports."""

    inputs: int
    failures: int


class Mapper(Protocol):
    """Runs tasks in other processes and yields results as they complete; ``pipeline.engine.Engine.map``."""

    def __call__(self, fn: Callable[[ShardTask], ShardDone], items: Iterable[ShardTask], /) -> Iterator[ShardDone]:
        """Map `fn` over the tasks."""


def extract_set(
    name: str,
    samples: SampleTable,
    spec: FeatureSpec,
    root: Path,
    backbone: Callable[[], Backbone],
    *,
    max_failures: float = 0.01,
    mapper: Mapper | None = None,
    progress: Progress | None = None,
) -> FeatureCache:
    """Fill and seal the cache of one set; where it is sealed and fresh, only open it.

    Args:
        name: of the set.
        samples: its images.
        spec: what the features are.
        root: folder of all caches.
        backbone: gives the backbone; not called where nothing is to be done.
        max_failures: share of unusable images at which the set fails; what was done is kept.
        mapper: other processes that make the shards; by default this one does.
        progress: counts images.

    Raises:
        StageError: more failures than `max_failures`.
        CacheError: see `cache.CacheBuilder`.
    """
    progress = progress or NullProgress()
    listing = InputTable.listing(samples.ids, samples.labels, samples.sizes, samples.mtimes_ns)
    fresh = find_fresh(name, samples, spec, root)
    if fresh is not None:
        return fresh
    plans = plan_shards(len(samples), spec.row_bytes, multiple=COMPUTE_BATCH)
    with _begin(name, root, spec, listing, samples.class_names, plans, made_with()) as builder:
        return _fill(builder, name, samples, listing, backbone, max_failures, mapper, progress)


def repair_set(
    cache: FeatureCache,
    damaged: Sequence[str],
    samples: SampleTable,
    backbone: Callable[[], Backbone],
    *,
    mapper: Mapper | None = None,
    progress: Progress | None = None,
) -> FeatureCache:
    """Make the damaged shards of a sealed cache again, and seal it.

    Args:
        cache: as far as it can be opened.
        damaged: files as `FeatureCache.verify` names them.
        samples: the images that it was made from.
        backbone: gives the backbone that it was made with.
        mapper: other processes that make the shards.
        progress: counts images.

    Raises:
        CacheMismatchError: the images are others now; the cache is left as it is.
        CacheError: the cache is in use, or damaged beyond repair.
    """
    listing = InputTable.listing(samples.ids, samples.labels, samples.sizes, samples.mtimes_ns)
    name = cache.manifest.dataset
    with suppress(CacheDamagedError):  # a damaged listing is compared with the shards, by `unseal`
        if not _same_inputs(cache.inputs(), listing, samples):
            raise CacheMismatchError(
                f"{cache.path}: {samples.source} does not hold the images any more that it was made from, so it cannot "
                "be repaired: run make extract"
            )
    loaded = backbone()  # first of all: where there are no weights, the cache stays sealed
    with unseal(cache.path, damaged, listing, made_with()) as builder:
        return _fill(builder, name, samples, listing, lambda: loaded, 1.0, mapper, progress or NullProgress())


def _fill(
    builder: CacheBuilder,
    name: str,
    samples: SampleTable,
    listing: InputTable,
    backbone: Callable[[], Backbone],
    max_failures: float,
    mapper: Mapper | None,
    progress: Progress,
) -> FeatureCache:
    """Make what is pending, and seal."""
    done, failures = builder.counts()
    pending = builder.pending()
    if done:
        progress.note(f"{name}: going on after {done} of {len(samples)} images")
    progress.start(len(samples), "image", f"extract {name}")
    progress.advance(done, failures=failures)
    if pending:
        loaded = backbone()
        tasks = (_task(builder, plan, loaded, listing, samples) for plan in pending)
        for result in mapper(extract_shard, tasks) if mapper else (r for task in tasks for r in _extract(task, loaded)):
            failures += result.failures
            progress.advance(result.inputs, failures=failures)
    progress.close()
    failed = builder.failures()
    if len(failed) > max_failures * len(samples):
        raise StageError(
            f"{name}: {len(failed)} of {len(samples)} images cannot be used, more than --max-failures "
            f"{max_failures:g} allows; what was done is kept. The first: {failed[0].id}: {failed[0].reason}. "
            "Put them right, or give a higher --max-failures"
        )
    cache = builder.seal()
    progress.note(
        f"{name}: {cache.n_rows} rows + {len(failed)} failures = {len(samples)} inputs, sealed in {cache.path}"
        + (f"; failures are listed in {cache.path / 'failures.jsonl'}" if failed else "")
    )
    return cache


def made_with() -> dict[str, Any]:
    """Versions and CPU capability that the bits of a cache may depend on."""
    return {package: version(package) for package in _MADE_WITH} | {"cpu": torch.backends.cpu.get_cpu_capability()}


def find_fresh(name: str, samples: SampleTable, spec: FeatureSpec, root: Path) -> FeatureCache | None:
    """The sealed cache of these images with these features, if there is one."""
    listing = InputTable.listing(samples.ids, samples.labels, samples.sizes, samples.mtimes_ns)
    for path in reversed(find_caches(root, name, spec)):
        try:
            cache = FeatureCache.open(path, spec)
        except CacheNotFoundError:  # not finished
            continue
        if cache.class_names == samples.class_names and _same_inputs(cache.inputs(), listing, samples):
            return cache
    return None


def _same_inputs(sealed: InputTable, listing: InputTable, samples: SampleTable) -> bool:
    """Whether the images are those of the cache: by size and time, and by their bytes where these differ."""
    if sealed.ids != listing.ids or not np.array_equal(sealed.labels, listing.labels):
        return False
    unread = ~sealed.sha256.any(axis=1)  # a file that could not be opened may be readable now, without being touched
    touched = np.flatnonzero((sealed.sizes != listing.sizes) | (sealed.mtimes_ns != listing.mtimes_ns) | unread)
    reader = samples.reader()
    for index in touched:
        try:
            digest = bytes.fromhex(sha256(reader.read(int(index))))
        except ImageError:
            digest = bytes(32)
        if digest != sealed.sha256[index].tobytes():
            return False
    return True


def _begin(
    name: str,
    root: Path,
    spec: FeatureSpec,
    listing: InputTable,
    class_names: tuple[str, ...],
    plans: tuple[ShardPlan, ...],
    versions: dict[str, Any],
) -> CacheBuilder:
    """Go on with an unfinished cache of these inputs, or begin the next version."""
    unfinished = [path for path in find_caches(root, name, spec) if not (path / "manifest.json").exists()]
    for path in [*reversed(unfinished), next_cache_path(root, name, spec)]:
        try:
            return CacheBuilder.begin(path, name, spec, listing, class_names, plans, versions)
        except CacheMismatchError:  # begun from other inputs
            continue
    raise AssertionError("a new folder cannot hold another plan")


def _task(
    builder: CacheBuilder, plan: ShardPlan, backbone: Backbone, listing: InputTable, samples: SampleTable
) -> ShardTask:
    return ShardTask(
        str(builder.path),
        plan,
        backbone.config,
        backbone.expert_blocks,
        str(backbone.device),
        builder.plan.spec.weights_sha,
        builder.plan.spec.patches,
        listing[plan.start : plan.stop],
        samples.reader(plan.start, plan.stop),
    )


def extract_shard(task: ShardTask) -> ShardDone:
    """Make one shard in whatever process this is; the backbone is loaded once a process."""
    backbone = _backbone_of_process(task.backbone, task.expert_blocks, task.device, task.weights_sha)
    counts = list(_extract(task, backbone))
    return ShardDone(sum(count.inputs for count in counts), sum(count.failures for count in counts))


@lru_cache(maxsize=1)
def _backbone_of_process(config: BackboneConfig, expert_blocks: int, device: str, weights_sha: str) -> Backbone:
    backbone = load_backbone(config, expert_blocks, device)
    found = backbone.feature_spec("float32", "none").weights_sha
    if found != weights_sha:
        raise StageError(f"a worker reads other weights than this process under {config.weights}: copy them there")
    return backbone


def _extract(task: ShardTask, backbone: Backbone) -> Iterator[ShardDone]:
    """Make one shard, reporting after every batch; the shard is on disk when this is exhausted."""
    n = len(task.inputs)
    digests = np.zeros((n, 32), dtype=np.uint8)
    failed = np.zeros(n, dtype=np.bool_)
    failures: list[Failure] = []
    parts: list[dict[str, NDArray[np.float32]]] = []
    batch: list[Tensor] = []
    since_last = ShardDone(0, 0)
    for index, loaded in enumerate(_read_ahead(task.reader, backbone.transform)):
        digests[index] = np.frombuffer(loaded.digest, dtype=np.uint8)
        if isinstance(loaded.image, Tensor):
            batch.append(loaded.image)
        else:
            failed[index] = True
            failures.append(Failure(task.inputs.ids[index], loaded.image))
        since_last = ShardDone(since_last.inputs + 1, since_last.failures + int(failed[index]))
        if len(batch) == COMPUTE_BATCH:
            parts.append(_compute(backbone, batch, task.patches))
            batch = []
            yield since_last
            since_last = ShardDone(0, 0)
    if batch:
        parts.append(_compute(backbone, batch, task.patches))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    commit_shard(task.path, task.plan, arrays, task.inputs.with_results(digests, failed), failures)
    yield since_last


def _compute(backbone: Backbone, images: list[Tensor], patches: str) -> dict[str, NDArray[np.float32]]:
    """One forward pass of exactly `COMPUTE_BATCH` images, padded with the last one."""
    padded = torch.stack(images + images[-1:] * (COMPUTE_BATCH - len(images))).to(backbone.device)
    tokens = reduce_patches(backbone.encode(padded), backbone.grid, patches)[: len(images)]
    arrays = {name: tensor.float().cpu().numpy() for name, tensor in vars(tokens).items()}
    return {name: array for name, array in arrays.items() if array.ndim == 2 or array.shape[1]}


class _Loaded(NamedTuple):
    digest: bytes
    image: Tensor | str  # transformed, or why it cannot be used


def _read_ahead(reader: ImageReader, transform: Callable[[Any], Tensor]) -> Iterator[_Loaded]:
    """Decode and transform in order, a bounded number of images ahead of the network."""

    def load(index: int) -> _Loaded:
        digest = bytes(32)
        try:
            data = reader.read(index)
            digest = bytes.fromhex(sha256(data))
            return _Loaded(digest, transform(decode_image(data)))
        except ImageError as error:
            return _Loaded(digest, str(error))

    with ThreadPoolExecutor(_DECODERS) as pool:
        waiting: deque[Future[_Loaded]] = deque()
        try:
            for index in range(len(reader)):
                waiting.append(pool.submit(load, index))
                if len(waiting) > _READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
