"""Verb: stage one. Images to a sealed cache of class embeddings and tokens, each image through the backbone once.

Features that were computed elsewhere become a sealed cache as well, by `import_set`; of whatever images are at hand,
without a study, `extract_features` makes one.

A killed extraction goes on with the shards that are missing. Where images were changed, added or taken away since a
version of the cache was sealed, the next version takes over the rows that are still true and computes the others.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from cache import (
    CacheBuilder,
    CacheDamagedError,
    CacheError,
    CacheInvalidError,
    CacheMismatchError,
    CacheNotFoundError,
    FeatureCache,
    FeatureSpec,
    InputSet,
    InputTable,
    ShardPlan,
    commit_shard,
    find_caches,
    next_cache_path,
    plan_shards,
    resumed_with,
    sha256,
    unseal,
)
from stages.config import BackboneConfig
from stages.errors import InputError, StageError
from stages.extraction.shards import ShardDone, ShardTask, extract_shard, make_shards
from stages.inputs.arrays import ArrayTable
from stages.inputs.images import ImageError, SampleTable, is_overcome, list_dataset, list_images
from stages.machine import default_device
from stages.networks.backbone import Backbone, load_backbone
from stages.progress import NullProgress, Progress

# Versions that the bits of a cache may depend on; pillow-heif need not be there.
_MADE_WITH = ("torch", "torchvision", "timm", "pillow", "pillow-heif", "numpy", "h5py")
_WITHOUT_BACKBONE: dict[str, Any] = {}  # copying arrays depends on no version
_READERS = 8  # threads that read files to compare their bytes: a network disk answers slowly


class Mapper(Protocol):
    """Runs tasks in other processes and yields results as they complete; ``pipeline.engine.Engine.map``."""

    def __call__(self, fn: Callable[[ShardTask], ShardDone], items: Iterable[ShardTask], /) -> Iterator[ShardDone]:
        """Map `fn` over the tasks."""


# Makes shards and reports as it goes on; all are on disk when it is exhausted.
Maker = Callable[[Sequence[ShardPlan]], Iterator[ShardDone]]


@dataclass(frozen=True, eq=False)
class Changes:
    """How the images of now differ from those that a cache was sealed with.

    Attributes:
        cache: the sealed version.
        rows: [n] int64, the row in `cache` of each image of now; -1 where it has none that is still true.
        new, changed, gone, relabelled: how many images, by what happened to them.
        decodable: how many failed for want of a library that is installed now.
        same_classes: whether the classes are numbered as they were.
    """

    cache: FeatureCache
    rows: NDArray[np.int64]
    new: int
    changed: int
    gone: int
    relabelled: int
    decodable: int
    same_classes: bool

    @property
    def fresh(self) -> bool:
        """Whether the cache is what an extraction would make."""
        return self.same_classes and not (self.new or self.changed or self.gone or self.relabelled or self.decodable)

    @property
    def to_extract(self) -> int:
        """How many images an extraction would compute."""
        return int((self.rows < 0).sum())

    def __str__(self) -> str:
        parts = {
            "new": self.new,
            "changed": self.changed,
            "gone": self.gone,
            "relabelled": self.relabelled,
            "decodable now": self.decodable,
        }
        counts = ", ".join(f"{n} {name}" for name, n in parts.items() if n) or "other classes"
        return f"{counts} since {self.cache.path}"


def extract_features(
    images: str | os.PathLike[str] | SampleTable | Any,
    backbone: str | BackboneConfig | Backbone,
    *,
    weights: str | None = None,
    image_size: int | None = None,
    patches: str = "full",
    dtype: Literal["float16", "float32"] = "float16",
    expert_blocks: int = 1,
    out: str | os.PathLike[str] = "cache",
    name: str | None = None,
    max_failures: float = 0.01,
    rehash: bool = False,
    mapper: Mapper | None = None,
    progress: Progress | None = None,
) -> FeatureCache:
    """Images in, a sealed cache out: no experiment file and no roles. Where it is sealed and fresh, only open it.

    A study whose ``cache.root`` is `out` and whose settings are the same finds the cache, whatever it calls its set.

    Args:
        images: a source as `stages.inputs.images.list_images` takes it (folder, tar, list, …), what that returned, or a
            map-style dataset as `stages.inputs.images.list_dataset` takes it (a list of paths or of PIL images is one).
        backbone: name of a timm model, its settings, or the network itself.
        weights: where `backbone` is a name: ``"hub"`` (the default), ``"embedded"`` or a path.
        image_size: where `backbone` is a name: side in pixels, 224 by default.
        patches: ``"full"``, ``"pool:G"`` or ``"none"``; see `cache.FeatureSpec`.
        dtype: as features are stored.
        expert_blocks: how many last blocks or stages lie behind the tap; of a network, its own.
        out: folder of all caches; the cache's own is ``<name>-<fingerprint8>`` below it.
        name: of the set; by default after the source.
        max_failures: share of unusable images at which it fails; what was done is kept, all are listed.
        rehash: judge freshness by the bytes of every image, not by size and time.
        mapper: other processes that make the shards; by default this one does.
        progress: counts images.

    Returns:
        The cache: ``cache.read("cls")`` is ``[n, D]``, ``cache.ids``, ``cache.labels`` and ``cache.class_names`` say of
        what, ``cache.failures()`` what could not be used and why.

    Raises:
        InputError: no such images, network or weights, a setting that cannot be.
        StageError: more failures than `max_failures`.
        CacheError: see `cache.CacheBuilder`.
    """
    samples = _as_samples(images)
    name = set_name(samples.source) if name is None else name
    network = _as_backbone(backbone, weights, image_size, expert_blocks)
    spec = network.feature_spec(dtype, patches)
    return extract_set(
        name,
        samples,
        spec,
        Path(out),
        lambda: network,
        max_failures=max_failures,
        rehash=rehash,
        mapper=mapper,
        progress=progress,
    )


def set_name(source: str) -> str:
    """A name for the set of a source, which can be part of a folder's.

    >>> set_name("/data/my pets/"), set_name("data/train-{0000..0146}.tar"), set_name("sklearn:digits[0-6]/test")
    ('my-pets', 'train-0000..0146', 'test')
    """
    base = re.sub(r"[^A-Za-z0-9._]+", "-", Path(source).name.removesuffix(Path(source).suffix)).strip("-._")
    return base[:100] or "images"


def _as_samples(images: Any) -> SampleTable:
    if isinstance(images, SampleTable):
        return images
    if isinstance(images, str | os.PathLike):
        return list_images(os.fspath(images))
    return list_dataset(images, "images")


def _as_backbone(
    backbone: str | BackboneConfig | Backbone, weights: str | None, image_size: int | None, expert_blocks: int
) -> Backbone:
    given = {key: value for key, value in (("weights", weights), ("image_size", image_size)) if value is not None}
    if isinstance(backbone, str):
        try:
            backbone = BackboneConfig.model_validate({"name": backbone, **given})
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{'.'.join(map(str, first['loc']))}: {first['input']!r} given: {first['msg']}") from error
    elif given:
        raise InputError(f"{' and '.join(given)}: for a backbone that is given by its name; this one has its own")
    if isinstance(backbone, Backbone):
        return backbone
    return load_backbone(backbone, expert_blocks, default_device())


def extract_set(
    name: str,
    samples: SampleTable,
    spec: FeatureSpec,
    root: Path,
    backbone: Callable[[], Backbone],
    *,
    max_failures: float = 0.01,
    rehash: bool = False,
    changes: Changes | None = None,
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
        rehash: judge freshness by the bytes of every image, not by size and time.
        changes: what `compare_versions` said, where it was asked already.
        mapper: other processes that make the shards; by default this one does.
        progress: counts images.

    Raises:
        StageError: more failures than `max_failures`.
        CacheError: see `cache.CacheBuilder`.
    """
    progress = progress or NullProgress()
    changes = changes or compare_versions(name, samples, spec, root, rehash=rehash, progress=progress)
    if changes and changes.fresh:
        return changes.cache
    plans = plan_shards(len(samples), spec.row_bytes, multiple=spec.compute["batch"])
    versions = made_with()
    if changes:
        changes = _without_damage(changes, progress)
        progress.note(
            f"{name}: {changes}: {changes.to_extract} of {len(samples)} images to extract, the others are taken over"
        )
        if changes.to_extract < len(samples):
            versions = resumed_with(changes.cache.manifest.made_with, versions)
    listing = listing_of(samples)
    with _begin(name, root, spec, listing, samples.class_names, plans, versions) as builder:
        maker = _image_maker(builder, samples, listing, backbone, changes, mapper)
        return _fill(builder, len(samples), maker, max_failures, progress, left_out=samples.left_out)


def import_set(
    name: str,
    arrays: ArrayTable,
    spec: FeatureSpec,
    root: Path,
    *,
    rehash: bool = False,
    changes: Changes | None = None,
    progress: Progress | None = None,
) -> FeatureCache:
    """Copy features that were computed elsewhere to the sealed cache of one set; where it is fresh, only open it.

    Args:
        name: of the set.
        arrays: its rows.
        spec: what the features are, by `ArrayTable.spec`.
        root: folder of all caches.
        rehash: judge freshness by the bytes of every row, not by size and time of the file.
        changes: what `compare_versions` said, where it was asked already.
        progress: counts rows.

    Raises:
        InputError: a feature that is no finite number.
        CacheError: see `cache.CacheBuilder`.
    """
    progress, samples = progress or NullProgress(), arrays.samples
    changes = changes or compare_versions(name, samples, spec, root, rehash=rehash, progress=progress)
    if changes and changes.fresh:
        return changes.cache
    if changes:
        progress.note(f"{name}: {changes}: all {len(arrays)} rows are copied anew")
    listing, plans = listing_of(samples), plan_shards(len(arrays), spec.row_bytes)
    with _begin(name, root, spec, listing, samples.class_names, plans, _WITHOUT_BACKBONE) as builder:
        return _fill(builder, len(arrays), _array_maker(builder, arrays, listing), 0.0, progress, "row")


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
    progress = progress or NullProgress()
    _same_inputs(cache, samples, "images", progress)
    loaded = backbone()  # first of all: where there are no weights, the cache stays sealed
    listing = listing_of(samples)
    with unseal(cache.path, damaged, listing, made_with()) as builder:
        maker = _image_maker(builder, samples, listing, lambda: loaded, None, mapper)
        return _fill(builder, len(samples), maker, 1.0, progress, left_out=cache.manifest.left_out)


def repair_import(
    cache: FeatureCache, damaged: Sequence[str], arrays: ArrayTable, progress: Progress | None = None
) -> FeatureCache:
    """The same for a cache that `import_set` sealed; raises as `repair_set` does."""
    progress, samples = progress or NullProgress(), arrays.samples
    _same_inputs(cache, samples, "rows", progress)
    listing = listing_of(samples)
    with unseal(cache.path, damaged, listing, _WITHOUT_BACKBONE) as builder:
        return _fill(builder, len(arrays), _array_maker(builder, arrays, listing), 0.0, progress, "row")


def _same_inputs(cache: FeatureCache, samples: SampleTable, what: str, progress: Progress) -> None:
    with suppress(CacheDamagedError):  # a damaged listing is compared with the shards, by `unseal`
        changes = _compare(cache, samples, False, {}, progress)
        if not changes.fresh:
            raise CacheMismatchError(
                f"{cache.path}: {samples.source} does not hold the {what} any more that it was made from ({changes}), "
                "so it cannot be repaired: run make extract"
            )


def _image_maker(
    builder: CacheBuilder,
    samples: SampleTable,
    listing: InputTable,
    backbone: Callable[[], Backbone],
    changes: Changes | None,
    mapper: Mapper | None,
) -> Maker:
    def make(pending: Sequence[ShardPlan]) -> Iterator[ShardDone]:
        loaded = backbone()
        tasks = (_task(builder, plan, loaded, samples, listing, changes) for plan in pending)
        return mapper(extract_shard, tasks) if mapper else make_shards(tasks, loaded)

    return make


def _array_maker(builder: CacheBuilder, arrays: ArrayTable, listing: InputTable) -> Maker:
    def make(pending: Sequence[ShardPlan]) -> Iterator[ShardDone]:
        for plan in pending:
            values, digests = arrays.read(plan.start, plan.stop, builder.plan.spec)
            rows = listing[plan.start : plan.stop].with_results(digests, np.zeros(len(plan), np.bool_))
            commit_shard(builder.path, plan, values, rows, [])
            yield ShardDone(len(plan), 0)

    return make


def _fill(
    builder: CacheBuilder,
    n: int,
    make: Maker,
    max_failures: float,
    progress: Progress,
    unit: str = "image",
    left_out: Mapping[str, int] = MappingProxyType({}),
) -> FeatureCache:
    """Make what is pending of `n` inputs, and seal."""
    name = builder.plan.dataset
    if builder.lock_notice:
        progress.note(builder.lock_notice)
    builder.discard(lambda failure: is_overcome(failure.reason))
    done, failures = builder.counts()
    pending = builder.pending()
    if done:
        progress.note(f"{name}: going on after {done} of {n} {unit}s")
    if builder.elsewhere:
        here, there = _different(made_with(), builder.elsewhere), _different(builder.elsewhere, made_with())
        progress.note(
            f"{name}: going on with {here} what was begun with {there}: features are then equal to the tolerance "
            "that the README states, not to the bit; the manifest lists both"
        )
    progress.start(n, unit, f"extract {name}")
    progress.advance(done, failures=failures)
    try:
        if pending:
            for result in make(pending):
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
    cache = builder.seal(left_out)
    progress.note(
        f"{name}: {cache.n_rows} rows + {len(failed)} failures = {n} inputs, sealed in {cache.path}"
        + (f"; failures are listed in {cache.path / 'failures.jsonl'}" if failed else "")
    )
    return cache


def made_with() -> dict[str, Any]:
    """Versions and CPU capability that the bits of a cache may depend on."""
    versions = {}
    for package in _MADE_WITH:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions | {"cpu": torch.backends.cpu.get_cpu_capability()}


def _different(settings: dict[str, Any], others: dict[str, Any]) -> str:
    names = dict.fromkeys((*settings, *others))
    return ", ".join(f"{name} {settings.get(name, 'none')}" for name in names if settings.get(name) != others.get(name))


def listing_of(samples: SampleTable) -> InputTable:
    """The images as a cache lists them, nothing read yet."""
    return InputTable.listing(samples.ids, samples.labels, np.maximum(samples.sizes, 0), samples.mtimes_ns)


def compare_versions(
    name: str,
    samples: SampleTable,
    spec: FeatureSpec,
    root: Path,
    *,
    rehash: bool = False,
    progress: Progress | None = None,
) -> Changes | None:
    """Compare the images with the sealed versions of a set's cache, and with caches of the same images by other names.

    Images of equal size and time count as equal; of others, and of all where `rehash` is set, the bytes are compared.

    Returns:
        A cache that is fresh; or else how the newest version differs; None where nothing is sealed.
    """
    newest, digests = None, dict[int, bytes]()
    own = find_caches(root, name, spec)
    for path in reversed(own):
        try:
            changes = _compare(FeatureCache.open(path, spec), samples, rehash, digests, progress or NullProgress())
        except CacheNotFoundError:  # not finished
            continue
        if changes.fresh:
            return changes
        newest = newest or changes
    for path in find_caches(root, None, spec):
        if path not in own and (found := _same_elsewhere(path, samples, spec, rehash, digests, progress)):
            return found
    return newest


def _same_elsewhere(
    path: Path,
    samples: SampleTable,
    spec: FeatureSpec,
    rehash: bool,
    digests: dict[int, bytes],
    progress: Progress | None,
) -> Changes | None:
    """What a cache of another set's name holds, where it is sealed and holds these very images; else None."""
    with suppress(CacheError):  # unfinished or damaged: it is not this set's, so nothing is to be said of it
        cache = FeatureCache.open(path, spec)
        if cache.manifest.n_inputs == len(samples) and cache.inputs().ids == samples.ids:
            changes = _compare(cache, samples, rehash, digests, progress or NullProgress())
            return changes if changes.fresh else None
    return None


def _compare(
    cache: FeatureCache, samples: SampleTable, rehash: bool, digests: dict[int, bytes], progress: Progress
) -> Changes:
    """How `samples` differ from the inputs of a cache; ``digests`` remembers what was read, by index."""
    sealed, listing = cache.inputs(), listing_of(samples)
    if sealed.ids == listing.ids:
        places = np.arange(len(listing))
    else:
        place_of = {id_: place for place, id_ in enumerate(sealed.ids)}
        places = np.array([place_of.get(id_, -1) for id_ in listing.ids], np.int64)
    known = places >= 0
    suspect = known & (rehash | (samples.sizes < 0))
    at = places[known]
    suspect[known] |= (
        (sealed.sizes[at] != listing.sizes[known])
        | (sealed.mtimes_ns[at] != listing.mtimes_ns[known])
        | ~sealed.sha256[at].any(axis=1)  # a file that could not be opened may be readable now, without being touched
    )
    _read_digests(samples, np.flatnonzero(suspect), digests, progress)
    changed = np.zeros(len(listing), np.bool_)
    for index in np.flatnonzero(suspect).tolist():
        changed[index] = digests[index] != sealed.sha256[places[index]].tobytes()
    numbers = np.where(sealed.failed, -1, np.cumsum(~sealed.failed) - 1)  # row of each input; what failed fails again
    same = known & ~changed
    rows = np.full(len(listing), -1, np.int64)
    rows[same] = numbers[places[same]]
    before, now = (np.array([*names, ""]) for names in (cache.class_names, samples.class_names))  # [-1]: unknown
    return Changes(
        cache,
        rows,
        new=int((~known).sum()),
        changed=int(changed.sum()),
        gone=len(sealed) - int(known.sum()),
        decodable=int((~changed[known] & _decodable(cache, sealed)[at]).sum()),
        relabelled=int((before[sealed.labels[at]] != now[listing.labels[known]]).sum()),
        same_classes=cache.class_names == samples.class_names,
    )


def _decodable(cache: FeatureCache, sealed: InputTable) -> NDArray[np.bool_]:
    """Which inputs [n] of a cache failed for want of a library that is installed now."""
    overcome = set[str]()
    if sealed.failed.any():
        with suppress(CacheDamagedError, CacheInvalidError):  # of the list of failures: it costs no row
            overcome = {failure.id for failure in cache.failures() if is_overcome(failure.reason)}
    return np.fromiter((id_ in overcome for id_ in sealed.ids), np.bool_, len(sealed))


def _without_damage(changes: Changes, progress: Progress) -> Changes:
    """The same changes, but with what a damaged shard holds to be computed: no flipped bit is ever sealed as sound."""
    if not (changes.rows >= 0).any():
        return changes
    cache, rows = changes.cache, changes.rows.copy()
    progress.start(len(cache.manifest.shards), "shard", f"verify {cache.path.name}")
    damaged = {damage.file for damage in cache.verify(lambda n_bytes: progress.advance())}
    progress.close()
    for shard in cache.manifest.shards:
        if shard.name in damaged:
            progress.note(f"{cache.path / shard.name} is damaged: nothing is taken over from it")
            rows[(rows >= shard.start) & (rows < shard.start + shard.rows)] = -1
    return replace(changes, rows=rows)


def _read_digests(samples: SampleTable, rows: NDArray[np.int64], digests: dict[int, bytes], progress: Progress) -> None:
    unread = [index for index in rows.tolist() if index not in digests]
    if not unread:
        return
    reader, todo = samples.reader(), iter(unread)

    def digest(index: int) -> tuple[int, bytes]:
        try:
            return index, bytes.fromhex(sha256(reader.read(index)))
        except ImageError:
            return index, bytes(32)

    progress.start(len(unread), "image", f"compare the bytes of {samples.source}")
    with ThreadPoolExecutor(_READERS) as pool:
        while batch := list(islice(todo, 64 * _READERS)):
            digests |= dict(pool.map(digest, batch))
            progress.advance(len(batch))
    progress.close()


def _begin(
    name: str,
    root: Path,
    spec: FeatureSpec,
    listing: InputTable,
    class_names: tuple[str, ...],
    plans: tuple[ShardPlan, ...],
    versions: dict[str, Any],
) -> CacheBuilder:
    """Go on with an unfinished cache of these inputs, or of some of them, or begin the next version."""
    unfinished = [path for path in find_caches(root, name, spec) if not (path / "manifest.json").exists()]
    for path in [*reversed(unfinished), next_cache_path(root, name, spec)]:
        try:
            return CacheBuilder.begin(path, InputSet(name, listing, class_names), spec, plans, versions, adopt=True)
        except CacheMismatchError:  # begun from other inputs
            continue
    raise AssertionError("a new folder cannot hold another plan")


def _task(
    builder: CacheBuilder,
    plan: ShardPlan,
    backbone: Backbone,
    samples: SampleTable,
    listing: InputTable,
    changes: Changes | None,
) -> ShardTask:
    inputs = slice(plan.start, plan.stop)
    return ShardTask(
        path=str(builder.path),
        plan=plan,
        spec=builder.plan.spec,
        backbone=backbone.config,
        expert_blocks=backbone.expert_blocks,
        device=str(backbone.device),
        inputs=listing[inputs],
        reader=samples.reader(plan.start, plan.stop),
        older=(str(changes.cache.path), changes.cache.identity) if changes else None,
        older_rows=changes.rows[inputs] if changes else np.full(len(plan), -1, np.int64),
    )
