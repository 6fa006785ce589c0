"""Filling a cache: begun or gone on with, made shard by shard, sealed; and what is said meanwhile."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from cache import (
    CacheBuilder,
    CacheMismatchError,
    FeatureCache,
    FeatureSpec,
    InputSet,
    Place,
    ShardPlan,
    find_caches,
    next_cache_path,
)
from stages.errors import StageError
from stages.extraction.shards import ShardDone
from stages.inputs.images import is_overcome
from stages.progress import Progress

# Versions that the bits of a cache may depend on; pillow-heif need not be there.
_MADE_WITH = ("torch", "torchvision", "timm", "pillow", "pillow-heif", "numpy", "h5py")

# Makes shards and reports as it goes on; all are on disk when it is exhausted.
Maker = Callable[[Sequence[ShardPlan]], Iterator[ShardDone]]


@dataclass(frozen=True)
class Work:
    """What fills a cache.

    Attributes:
        make: makes its shards.
        made_with: versions that the bits may depend on, in this process.
        unit: what an input is to people.
        left_out: files of the source that were no inputs, by extension.
    """

    make: Maker
    made_with: Mapping[str, Any]
    unit: str = "image"
    left_out: Mapping[str, int] = field(default_factory=dict)


def made_with() -> dict[str, Any]:
    """Versions and CPU capability that the bits of a cache may depend on."""
    versions = {}
    for package in _MADE_WITH:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions | {"cpu": torch.backends.cpu.get_cpu_capability()}


def begin_version(
    root: Place, inputs: InputSet, spec: FeatureSpec, plans: Sequence[ShardPlan], made_with: Mapping[str, Any]
) -> CacheBuilder:
    """Go on with an unfinished cache of these inputs, or of some of them, or begin the next version.

    Args:
        root: folder of all caches.
        inputs: the set.
        spec: what the features are.
        plans: which inputs go into which shard.
        made_with: see `cache.CacheBuilder.begin`.
    """
    unfinished = [path for path in find_caches(root, inputs.name, spec) if not (path / "manifest.json").exists()]
    for path in [*reversed(unfinished), next_cache_path(root, inputs.name, spec)]:
        try:
            return CacheBuilder.begin(path, inputs, spec, plans, made_with, adopt=True)
        except CacheMismatchError:  # begun from other inputs
            continue
    raise AssertionError("a new folder cannot hold another plan")


def fill(builder: CacheBuilder, work: Work, max_failures: float, progress: Progress) -> FeatureCache:
    """Make what is pending of a cache, and seal it.

    Args:
        builder: holds the cache.
        work: what fills it.
        max_failures: share of unusable inputs at which it fails; what was done is kept.
        progress: counts inputs.

    Raises:
        StageError: more failures than `max_failures`.
        CacheError: see `cache.CacheBuilder`.
    """
    name, n, unit = builder.plan.dataset, builder.plan.n_inputs, work.unit
    if builder.lock_notice:
        progress.note(builder.lock_notice)
    builder.discard(lambda failure: is_overcome(failure.reason))
    done, failures = builder.counts()
    pending = builder.pending()
    if done:
        progress.note(f"{name}: going on after {done} of {n} {unit}s")
    if builder.elsewhere:
        here, there = (
            _different(work.made_with, builder.elsewhere),
            _different(builder.elsewhere, work.made_with),
        )
        progress.note(
            f"{name}: going on with {here} what was begun with {there}: features are then equal to the tolerance "
            "that the README states, not to the bit; the manifest lists both"
        )
    progress.start(n, unit, f"extract {name}")
    progress.advance(done, failures=failures)
    try:
        if pending:
            for result in work.make(pending):
                done, failures = done + result.inputs, failures + result.failures
                progress.advance(result.inputs, failures=failures)
    except KeyboardInterrupt:
        progress.close()
        progress.note(f"{name}: stopped after {done} of {n} {unit}s; finished shards are kept in {builder.path}")
        raise
    progress.close()
    failed = builder.failures()
    if len(failed) > max_failures * n:
        raise StageError(
            f"{name}: {len(failed)} of {n} images cannot be used, more than --max-failures "
            f"{max_failures:g} allows; what was done is kept. The first: {failed[0].id}: {failed[0].reason}. "
            "Put them right, or give a higher --max-failures"
        )
    cache = builder.seal(work.left_out)
    progress.note(
        f"{name}: {cache.n_rows} rows + {len(failed)} failures = {n} inputs, sealed in {cache.path}"
        + (f"; failures are listed in {cache.path / 'failures.jsonl'}" if failed else "")
    )
    return cache


def _different(settings: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    names = dict.fromkeys((*settings, *others))
    return ", ".join(f"{name} {settings.get(name, 'none')}" for name in names if settings.get(name) != others.get(name))
