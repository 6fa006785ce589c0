"""What is done about damage: a manifest is put back from its copy, damaged shards become pending again."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from cache.builder import CacheBuilder
from cache.errors import CacheDamagedError, CacheError, CacheMismatchError, CacheNotFoundError
from cache.files import disk_errors, sync_folder
from cache.inputs import Failure, InputSet, InputTable
from cache.lock import Lock
from cache.manifest import COPY, INPUTS, MANIFEST, Manifest, resumed_with
from cache.plan import ShardPlan
from cache.remote import Place, RemotePath, place
from cache.shard import ShardFile, ShardReader
from cache.store import FeatureCache, alike, read_sealed
from cache.unfinished import BuildPlan, ShardRecord, file_size, sweep


def restore_manifest(path: str | Place) -> bool:
    """Put a damaged or lost manifest back from its copy, or the copy from the manifest; tidy up after killed processes.

    Returns:
        whether there was anything to do.

    Raises:
        CacheBusyError: another process works on the cache.
        CacheNotFoundError, CacheInvalidError: as ``FeatureCache.open``.
        CacheDamagedError: both are damaged.
    """
    path = place(path)
    if not path.is_dir():
        raise CacheNotFoundError(f"{path}: no cache stands there")
    with Lock(path):
        try:
            manifest, damaged = read_sealed(path), COPY
        except CacheDamagedError as error:
            try:
                manifest, damaged = Manifest.read(path, COPY), MANIFEST
            except CacheError:
                raise error from None
        whole = damaged == COPY and alike(path)
        if not whole:
            manifest.write(path, damaged)
        sweep(path, sealed=True)
        return not whole


def unseal(
    path: str | Place,
    damaged: Iterable[str],
    inputs: InputTable | None = None,
    made_with: Mapping[str, Any] | None = None,
) -> CacheBuilder:
    """Turn a sealed cache back into an unfinished one without its damaged shards, so that only they are made again.

    A damaged ``inputs.parquet`` or ``failures.jsonl`` is rebuilt from the shards and a fresh listing; shards with
    failures are then made again, since nothing else knows of these. Where the same bits are computed again, sealing
    gives the same bytes as before. A kill leaves the sealed cache as it was, or the unfinished one.

    Args:
        path: the cache's folder.
        damaged: names of files as ``FeatureCache.verify`` gives them.
        inputs: a fresh listing, needed where ``inputs.parquet`` is damaged.
        made_with: as for ``CacheBuilder.begin``; None keeps what the manifest says.

    Raises:
        CacheBusyError: another process works on it.
        CacheDamagedError: ``inputs.parquet`` is damaged and no listing was given; or the manifest is, see
            ``restore_manifest``.
        CacheMismatchError: the listing is not the one that the cache was made from.
    """
    path = place(path)
    lock = Lock(path)
    try:
        cache = FeatureCache(path, read_sealed(path))
        sweep(path, sealed=True)  # records that a killed unseal left may speak of shards that are damaged by now
        manifest = cache.manifest
        plans = [ShardPlan(i, shard.input_start, shard.input_stop) for i, shard in enumerate(manifest.shards)]
        listing, records = _salvage(cache, plans, set(damaged), inputs)
        of = InputSet(manifest.dataset, listing, manifest.class_names)
        plan = BuildPlan.make(of, manifest.spec, plans, manifest.made_with)
        if made_with is not None:
            plan = replace(plan, made_with=resumed_with(plan.made_with, made_with))
        # First all that an unfinished cache has, then away with the manifest: a kill in between changes nothing.
        plan.write(path)
        for record in records:
            record.write(path)
        with disk_errors(path):
            (path / MANIFEST).unlink()
            sync_folder(path)
            (path / COPY).unlink(missing_ok=True)
            for name in {plan.name for plan in plans} - {record.plan.name for record in records}:
                (path / name).unlink(missing_ok=True)
            sync_folder(path)
        return CacheBuilder(path, plan, listing, lock, plan.made_with if made_with is None else made_with)
    except BaseException:
        lock.release()
        raise


def _salvage(
    cache: FeatureCache, plans: Sequence[ShardPlan], damaged: set[str], inputs: InputTable | None
) -> tuple[InputTable, list[ShardRecord]]:
    """The listing of a sealed cache, and a record for each of its shards that need not be made again."""
    reasons: dict[str, Failure] = {}
    with suppress(CacheDamagedError):
        reasons = {failure.id: failure for failure in cache.failures()}
    try:
        listing, known = cache.inputs(), True
    except CacheDamagedError:
        if inputs is None:
            raise CacheDamagedError(f"{cache.path / INPUTS}: is damaged; its inputs must be listed anew") from None
        listing, known = inputs, False
    if len(listing) != cache.manifest.n_inputs:
        n_inputs = cache.manifest.n_inputs
        raise CacheMismatchError(f"{cache.path}: made from {n_inputs} inputs, {len(listing)} are listed now")
    records = []
    for plan, shard in zip(plans, cache.manifest.shards, strict=True):
        size = file_size(cache.path / shard.name)
        if shard.name in damaged or size != (shard.nbytes if shard.rows else None):
            continue
        rows = listing[plan.start : plan.stop]
        if not known and not shard.n_failures:
            rows = _rows_from_shard(cache.path / shard.name, rows)
        failures = [
            reasons[id_] for id_, failed in zip(rows.ids, rows.failed, strict=True) if failed and id_ in reasons
        ]
        if len(failures) == shard.n_failures:
            file = ShardFile(shard.rows, shard.nbytes, shard.sha256, shard.offsets)
            records.append(ShardRecord.make(plan, file, rows, failures))
    return InputTable.listing(listing.ids, listing.labels, listing.sizes, listing.mtimes_ns), records


def _rows_from_shard(path: Place, listed: InputTable) -> InputTable:
    """What a shard without failures knows of its inputs."""
    if isinstance(path, RemotePath):
        with TemporaryDirectory(prefix="shard-") as scratch:
            path.fetch(Path(scratch) / path.name)
            return _rows_from_shard(Path(scratch) / path.name, listed)
    reader = ShardReader(path)
    same_ids = [id_.encode("utf-8") for id_ in listed.ids] == reader.array("id").tolist()
    if not same_ids or not np.array_equal(listed.labels, reader.array("label")):
        raise CacheMismatchError(f"{path}: its sample ids or labels are not those that are listed now")
    return listed.with_results(np.array(reader.array("image_hash")), np.zeros(len(listed), np.bool_))
