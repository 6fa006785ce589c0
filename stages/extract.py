"""Verb: stage one. Images to a sealed cache of class embeddings and tokens, each image through the backbone once.

Features that were computed elsewhere become a sealed cache as well, by `import_set`; of whatever images are at hand,
without a study, `extract_features` makes one.

A killed extraction goes on with the shards that are missing. Where images were changed, added or taken away since a
version of the cache was sealed, the next version takes over the rows that are still true and computes the others.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np

from cache import (
    CacheBuilder,
    CacheDamagedError,
    CacheMismatchError,
    FeatureCache,
    FeatureSpec,
    InputSet,
    InputTable,
    Place,
    RemotePath,
    ShardPlan,
    commit_shard,
    place,
    plan_shards,
    resumed_with,
    unseal,
)
from stages.config import BackboneConfig
from stages.extraction.begun import chosen_spec
from stages.extraction.changes import Changes, ImagesOfNow, compare_versions, listing_of, without_damage
from stages.extraction.decoding import decoding_processes
from stages.extraction.fill import Maker, Work, begin_version, fill, made_with
from stages.extraction.shards import Mapper, ShardDone, ShardTask, extract_shard, make_shards
from stages.inputs.arrays import ArrayTable
from stages.inputs.images import SampleTable, list_dataset, list_images
from stages.machine import default_device
from stages.networks.backbone import Backbone, load_backbone
from stages.networks.preprocessing import check_decode
from stages.networks.taps import AskedTaps, Kept
from stages.progress import NullProgress, Progress

_WITHOUT_BACKBONE: Mapping[str, Any] = {}  # copying arrays depends on no version


@dataclass(frozen=True)
class ExtractOptions:
    """How a cache is filled; what a feature is depends on none of it.

    Attributes:
        max_failures: share of unusable images at which a set fails; what was done is kept, all are listed.
        rehash: judge freshness by the bytes of every image, not by size and time.
        shard_rows: most rows of a shard.
        mapper: other processes that make the shards; by default this one does.
        progress: counts images.
    """

    max_failures: float = 0.01
    rehash: bool = False
    shard_rows: int = 4096
    mapper: Mapper | None = None
    progress: Progress = field(default_factory=NullProgress)


def extract_features(
    images: str | os.PathLike[str] | SampleTable | Any,
    backbone: str | BackboneConfig | Backbone,
    *,
    out: str | os.PathLike[str] | RemotePath = "cache",
    name: str | None = None,
    options: ExtractOptions = ExtractOptions(),
    **kept: Unpack[Kept],
) -> FeatureCache:
    """Images in, a sealed cache out: no experiment file and no roles. Where it is sealed and fresh, only open it.

    A study whose ``cache.root`` is `out` and whose settings are the same finds the cache, whatever it calls its set.

    Args:
        images: a source as `stages.inputs.images.list_images` takes it (folder, tar, list, …), what that returned, or a
            map-style dataset as `stages.inputs.images.list_dataset` takes it (a list of paths or of PIL images is one).
        backbone: name of a timm model, with weights of the hub and images of 224 pixels; its settings; or the network
            itself, of which more than the last block may lie behind the tap.
        out: folder of all caches, or its URL in an object store; the cache's own is ``<name>-<fingerprint8>`` below it.
        name: of the set; by default after the source.
        options: how the cache is filled.
        kept: ``patches``, ``taps`` and ``dtype``: what is stored, and how, see `stages.networks.taps.Kept`.

    Returns:
        The cache: ``cache.read("cls")`` is ``[n, D]``, ``cache.ids``, ``cache.labels`` and ``cache.class_names`` say of
        what, ``cache.failures()`` what could not be used and why.

    Raises:
        InputError: no such images, network or weights, a setting that cannot be.
        StageError: more failures than allowed.
        CacheError: see `cache.CacheBuilder`.
    """
    samples = _as_samples(images)
    name = set_name(samples.source) if name is None else name
    if isinstance(backbone, str):
        backbone = BackboneConfig(name=backbone)
    network = backbone if isinstance(backbone, Backbone) else load_backbone(backbone, device=default_device())
    _check_decode(network)
    root = place(out)
    spec = _spec(network, root, len(samples), **kept)
    return extract_set(name, samples, spec, root, lambda: network, options=options)


def _spec(
    network: Backbone,
    root: Place,
    n_images: int,
    dtype: Literal["float16", "float32"] = "float16",
    patches: str = "full",
    taps: AskedTaps = None,
) -> FeatureSpec:
    return chosen_spec(network, dtype, patches, root, n_images, taps)


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


def extract_set(
    name: str,
    samples: SampleTable,
    spec: FeatureSpec,
    root: Place,
    backbone: Callable[[], Backbone],
    *,
    changes: Changes | None = None,
    options: ExtractOptions = ExtractOptions(),
) -> FeatureCache:
    """Fill and seal the cache of one set; where it is sealed and fresh, only open it.

    Args:
        name: of the set.
        samples: its images.
        spec: what the features are.
        root: folder of all caches.
        backbone: gives the backbone; not called where nothing is to be done.
        changes: what `compare_versions` said, where it was asked already.
        options: how the cache is filled.

    Raises:
        StageError: more failures than allowed.
        CacheError: see `cache.CacheBuilder`.
    """
    progress = options.progress
    changes = changes or compare_versions(name, samples, spec, root, rehash=options.rehash, progress=progress)
    if changes and changes.fresh:
        return changes.cache
    plans = plan_shards(len(samples), spec.row_bytes, max_rows=options.shard_rows, multiple=spec.compute["batch"])
    here = made_with()
    versions = here
    if changes:
        changes = without_damage(changes, progress)
        progress.note(
            f"{name}: {changes}: {changes.to_extract} of {len(samples)} images to extract, the others are taken over"
        )
        if changes.to_extract < len(samples):
            versions = resumed_with(changes.cache.manifest.made_with, here)
    listing = listing_of(samples)
    with begin_version(root, InputSet(name, listing, samples.class_names), spec, plans, versions) as builder:
        maker = _image_maker(builder, _Images(samples, listing, changes), backbone, options.mapper)
        return fill(builder, Work(maker, here, left_out=samples.left_out), options.max_failures, progress)


def import_set(
    name: str,
    arrays: ArrayTable,
    spec: FeatureSpec,
    root: Place,
    *,
    changes: Changes | None = None,
    options: ExtractOptions = ExtractOptions(),
) -> FeatureCache:
    """Copy features that were computed elsewhere to the sealed cache of one set; where it is fresh, only open it.

    Args:
        name: of the set.
        arrays: its rows.
        spec: what the features are, by `ArrayTable.spec`.
        root: folder of all caches.
        changes: what `compare_versions` said, where it was asked already.
        options: how the cache is filled; every row is usable, and this process copies them.

    Raises:
        InputError: a feature that is no finite number.
        CacheError: see `cache.CacheBuilder`.
    """
    progress, samples = options.progress, arrays.samples
    changes = changes or compare_versions(name, samples, spec, root, rehash=options.rehash, progress=progress)
    if changes and changes.fresh:
        return changes.cache
    if changes:
        progress.note(f"{name}: {changes}: all {len(arrays)} rows are copied anew")
    listing = listing_of(samples)
    inputs = InputSet(name, listing, samples.class_names)
    plans = plan_shards(len(arrays), spec.row_bytes, max_rows=options.shard_rows)
    with begin_version(root, inputs, spec, plans, _WITHOUT_BACKBONE) as builder:
        return fill(builder, _copying(builder, arrays, listing), 0.0, progress)


def repair_set(
    cache: FeatureCache,
    damaged: Sequence[str],
    samples: SampleTable,
    backbone: Callable[[], Backbone],
    progress: Progress | None = None,
) -> FeatureCache:
    """Make the damaged shards of a sealed cache again, and seal it.

    Args:
        cache: as far as it can be opened.
        damaged: files as `FeatureCache.verify` names them.
        samples: the images that it was made from.
        backbone: gives the backbone that it was made with.
        progress: counts images.

    Raises:
        CacheMismatchError: the images are others now; the cache is left as it is.
        CacheError: the cache is in use, or damaged beyond repair.
    """
    progress = progress or NullProgress()
    _check_inputs(cache, samples, "images", progress)
    loaded = backbone()  # first of all: where there are no weights, the cache stays sealed
    _check_decode(loaded)
    listing, here = listing_of(samples), made_with()
    with unseal(cache.path, damaged, listing, here) as builder:
        maker = _image_maker(builder, _Images(samples, listing, None), lambda: loaded, None)
        return fill(builder, Work(maker, here, left_out=cache.manifest.left_out), 1.0, progress)


def repair_import(
    cache: FeatureCache, damaged: Sequence[str], arrays: ArrayTable, progress: Progress | None = None
) -> FeatureCache:
    """The same for a cache that `import_set` sealed; raises as `repair_set` does."""
    progress, samples = progress or NullProgress(), arrays.samples
    _check_inputs(cache, samples, "rows", progress)
    listing = listing_of(samples)
    with unseal(cache.path, damaged, listing, _WITHOUT_BACKBONE) as builder:
        return fill(builder, _copying(builder, arrays, listing), 0.0, progress)


def _check_inputs(cache: FeatureCache, samples: SampleTable, what: str, progress: Progress) -> None:
    """Refuse inputs that are not those that a cache was made from."""
    with suppress(CacheDamagedError):  # a damaged listing is compared with the shards, by `unseal`
        changes = ImagesOfNow(samples, rehash=False, progress=progress).changes_since(cache)
        if not changes.fresh:
            raise CacheMismatchError(
                f"{cache.path}: {samples.source} does not hold the {what} any more that it was made from ({changes}), "
                "so it cannot be repaired: run make extract"
            )


@dataclass(frozen=True, eq=False)
class _Images:
    """What shards are made of: the images, as they are listed, and the rows that an older version has of them."""

    samples: SampleTable
    listing: InputTable
    changes: Changes | None


def _image_maker(
    builder: CacheBuilder, images: _Images, backbone: Callable[[], Backbone], mapper: Mapper | None
) -> Maker:
    def make(pending: Sequence[ShardPlan]) -> Iterator[ShardDone]:
        loaded = backbone()
        _check_decode(loaded)
        tasks = (_task(builder, plan, loaded, images) for plan in pending)
        if mapper:
            return mapper(extract_shard, tasks)
        n_images = sum(map(len, pending))
        processes = decoding_processes(loaded.device.type, images.samples.contents, n_images)
        return make_shards(tasks, loaded, processes=processes)

    return make


def _check_decode(backbone: Backbone) -> None:
    check_decode(backbone.config, backbone.device.type, backbone.data_config)


def _task(builder: CacheBuilder, plan: ShardPlan, backbone: Backbone, images: _Images) -> ShardTask:
    inputs, changes = slice(plan.start, plan.stop), images.changes
    return ShardTask(
        path=str(builder.path),
        plan=plan,
        spec=builder.plan.spec,
        backbone=backbone.config,
        expert_blocks=backbone.expert_blocks,
        device=str(backbone.device),
        inputs=images.listing[inputs],
        reader=images.samples.reader(plan.start, plan.stop),
        older=(str(changes.cache.path), changes.cache.identity) if changes else None,
        older_rows=changes.rows[inputs] if changes else np.full(len(plan), -1, np.int64),
    )


def _copying(builder: CacheBuilder, arrays: ArrayTable, listing: InputTable) -> Work:
    def make(pending: Sequence[ShardPlan]) -> Iterator[ShardDone]:
        for plan in pending:
            values, digests = arrays.read(plan.start, plan.stop, builder.plan.spec)
            rows = listing[plan.start : plan.stop].with_results(digests, np.zeros(len(plan), np.bool_))
            commit_shard(builder.path, plan, values, rows, [])
            yield ShardDone(len(plan), 0)

    return Work(make, _WITHOUT_BACKBONE, unit="row")
