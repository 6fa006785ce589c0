"""CacheBuilder: the unsealed side of a cache. It may be killed at any moment and goes on where it was.

>>> import tempfile, numpy as np
>>> from cache import CacheBuilder, FeatureSpec, InputSet, InputTable, commit_shard, plan_shards
>>> spec = FeatureSpec("net", "0a1b", {"mean": [0.5]}, 224, 1, "none", "float32", 4, 4, 0, (0, 0), {}, 1)
>>> inputs = InputTable.listing(["cat/1.png", "cat/2.png", "dog/1.png"], [0, 0, 1], [10, 20, 30], [0, 0, 0])
>>> pets = InputSet("pets", inputs, ("cat", "dog"))
>>> path = f"{tempfile.mkdtemp()}/pets-{spec.fingerprint:.8}"
>>> plans = plan_shards(len(inputs), spec.row_bytes, max_rows=2)
>>> with CacheBuilder.begin(path, pets, spec, plans, made_with={}) as builder:
...     for plan in builder.pending():
...         ones = np.ones((len(plan), 4), np.float32)
...         commit_shard(path, plan, {"cls": ones, "tap_cls": ones}, inputs[plan.start : plan.stop], failures=[])
...     cache = builder.seal()
>>> cache.read("cls", np.array([2])), cache.labels, cache.verify()
(array([[1., 1., 1., 1.]], dtype=float32), array([0, 0, 1], dtype=int32), [])
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cache.errors import CacheDamagedError, CacheError, CacheInvalidError, CacheMismatchError, CacheNotFoundError
from cache.files import check, disk_errors, names_in, sync_folder, write_file
from cache.fingerprint import canonical_json, fingerprint, sha256
from cache.inputs import Failure, InputSet, InputTable, failures_to_jsonl
from cache.lock import Lock
from cache.manifest import COPY, FAILURES, INPUTS, MANIFEST, Manifest, ShardInfo, own_settings, resumed_with
from cache.plan import ShardPlan
from cache.remote import Place, RemotePath, place
from cache.shard import ShardFile, write_shard
from cache.spec import FeatureSpec
from cache.store import FeatureCache, read_sealed
from cache.unfinished import BuildPlan, ShardRecord, is_blank, record_name, sweep

_NO_FILE = ShardFile(0, 0, sha256(b""))  # of a shard whose inputs all failed


class CacheBuilder:
    """Fills a cache, shard by shard, and seals it. Holds the cache's lock until it is closed, sealed or dead.

    Attributes:
        path: the cache's folder.
        plan: what is to be made.
        elsewhere: the ``made_with`` that the cache was begun with, where this process goes on with another; else None.
        lock_notice: that the file system has no locks, see ``Lock``; else None.
    """

    def __init__(
        self, path: Place, plan: BuildPlan, inputs: InputTable, lock: Lock, made_with: Mapping[str, Any]
    ) -> None:
        self.path = path
        self.plan = plan
        began = own_settings(plan.made_with)
        self.elsewhere = None if canonical_json(began) == canonical_json(own_settings(made_with)) else began
        self.lock_notice = lock.notice
        self._inputs = inputs
        self._lock = lock
        self._records: dict[int, ShardRecord] = {}

    @classmethod
    def begin(
        cls,
        path: str | Place,
        inputs: InputSet,
        spec: FeatureSpec,
        plans: Sequence[ShardPlan],
        made_with: Mapping[str, Any],
        adopt: bool = False,
    ) -> Self:
        """Begin a cache, or go on with the one that stands there unfinished.

        Args:
            path: the cache's folder, see ``next_cache_path``.
            inputs: the set, nothing of it read yet.
            spec: what a feature will be.
            plans: which inputs go into which shard, from ``plan_shards``.
            made_with: versions and settings that the bits may depend on. Others than those that the cache was begun
                with are no error; the manifest then lists them under ``resumed_with``. It may hold such a list itself.
            adopt: take over what an unfinished cache of other inputs or shards has finished, where any of it fits;
                what does not fit is removed.

        Raises:
            CacheBusyError: another process fills it.
            CacheMismatchError: another plan stands there; names what differs.
            CacheInvalidError: the arguments contradict one another.
            CacheError: a sealed cache or something else stands there, or the disk refuses.
        """
        path = place(path)
        asked, listing = BuildPlan.make(inputs, spec, plans, made_with), inputs.listing
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(path)
        try:
            return cls(path, cls._resume_or_create(path, asked, listing if adopt else None), listing, lock, made_with)
        except BaseException:
            lock.release()
            raise

    @staticmethod
    def _resume_or_create(path: Place, asked: BuildPlan, adopted: InputTable | None) -> BuildPlan:
        if (path / MANIFEST).exists():
            raise CacheError(f"{path}: is sealed already; open it, or take another folder")
        try:
            found = BuildPlan.read(path)
        except (CacheDamagedError, CacheInvalidError) as error:
            raise type(error)(f"{error}; delete {path} and run extract again") from error
        except CacheNotFoundError:
            if (path / COPY).exists():
                read_sealed(path)  # says that the manifest is lost
            if not is_blank(path):
                raise CacheError(f"{path}: holds files but no cache; take another folder") from None
            with disk_errors(path):
                path.mkdir(exist_ok=True)
                sync_folder(path.parent)
            asked.write(path)
            return asked
        if difference := found.first_difference(asked):
            same_but_inputs = replace(found, inputs=asked.inputs, shards=asked.shards).first_difference(asked) is None
            if adopted is None or not same_but_inputs or not _keep_what_fits(path, asked, adopted):
                raise CacheMismatchError(f"{path}: is being made from something else: {difference}")
        sweep(path, sealed=False)
        resumed = replace(asked, made_with=resumed_with(found.made_with, asked.made_with))
        if resumed != found:
            resumed.write(path)
        return resumed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back; what is done is kept."""
        self._lock.release()

    def pending(self) -> tuple[ShardPlan, ...]:
        """Shards that are still to be made."""
        if unknown := [plan for plan in self.plan.shards if plan.index not in self._records]:
            names = names_in(self.path)
            for plan in unknown:
                if record_name(plan) in names and (record := ShardRecord.read(self.path, plan)):
                    self._records[plan.index] = record
        return tuple(plan for plan in self.plan.shards if plan.index not in self._records)

    def counts(self) -> tuple[int, int]:
        """How many inputs are done, and how many of them failed."""
        self.pending()
        records = self._records.values()
        return sum(len(record.plan) for record in records), sum(len(record.failures) for record in records)

    def discard(self, unfit: Callable[[Failure], bool]) -> None:
        """Give up the finished shards that hold such a failure: they are pending again."""
        self.pending()
        discarded = [record.plan for record in self._records.values() if any(map(unfit, record.failures))]
        if discarded:
            with disk_errors(self.path):
                for plan in discarded:
                    (self.path / record_name(plan)).unlink()  # a shard without its record is made again
                    del self._records[plan.index]
                sync_folder(self.path)

    def failures(self) -> list[Failure]:
        """Inputs that could not be used so far, in order."""
        self.pending()
        return [failure for index in sorted(self._records) for failure in self._records[index].failures]

    def seal(self, left_out: Mapping[str, int] = MappingProxyType({})) -> FeatureCache:
        """Write inputs, failures and, last, the manifest; from then on the cache is whole. Gives the lock back.

        Args:
            left_out: files of the source that were no inputs, see ``Manifest``.

        Raises:
            CacheError: shards are still to be made, or the disk refuses; what is done is kept.
            CacheBusyError: another process has taken the cache over, see ``Lock.check``.
            CacheDamagedError: a shard was made from other inputs than those of the listing.
        """
        if pending := self.pending():
            raise CacheError(
                f"{self.path}: cannot be sealed: {len(pending)} of {len(self.plan.shards)} shards are missing"
            )
        records = [self._records[plan.index] for plan in self.plan.shards]
        for record in records:
            listed = self._inputs[record.plan.start : record.plan.stop]
            if record.inputs != fingerprint(listed.columns_sha256()):
                raise CacheDamagedError(f"{self.path / record.plan.name}: made from other inputs; remove it and go on")
        empty = self._inputs[:0]  # so that a cache without shards concatenates, too
        inputs = self._inputs.with_results(
            np.concatenate([empty.sha256, *(record.digests for record in records)]),
            np.concatenate([empty.failed, *(record.failed for record in records)]),
        )
        shards, row = [], 0
        for record in records:
            plan, file = record.plan, record.file
            rows_and_bytes = (row, file.rows, file.nbytes, file.sha256)
            shards.append(ShardInfo(plan.name, *rows_and_bytes, plan.start, plan.stop, file.offsets))
            row += file.rows
        listing, failures = inputs.to_parquet(), failures_to_jsonl(f for record in records for f in record.failures)
        manifest = Manifest(
            dataset=self.plan.dataset,
            spec=self.plan.spec,
            class_names=self.plan.class_names,
            n_inputs=len(inputs),
            n_rows=row,
            n_failures=len(inputs) - row,
            inputs_sha256=sha256(listing),
            failures_sha256=sha256(failures),
            content_sha256=inputs.content_sha256(),
            shards=tuple(shards),
            made_with=dict(self.plan.made_with),
            left_out=dict(left_out),
        )
        self._lock.check()
        write_file(self.path / INPUTS, listing)
        write_file(self.path / FAILURES, failures)
        manifest.write(self.path, COPY)
        manifest.write(self.path)
        sweep(self.path, sealed=True)
        self.close()
        return FeatureCache.open(self.path)


def _keep_what_fits(path: Place, asked: BuildPlan, inputs: InputTable) -> bool:
    """Remove all shards but those that are part of the plan asked for; False, and nothing done, where none is.

    The plan that stands there stays true: a kill in between leaves it with fewer shards done.
    """
    kept: set[str] = set()
    for plan in asked.shards:
        record = ShardRecord.read(path, plan)
        if record and record.inputs == fingerprint(inputs[plan.start : plan.stop].columns_sha256()):
            kept |= {plan.name, record_name(plan)}
    if kept:
        with disk_errors(path):
            for pattern in ("shard-*.json", "shard-*.h5"):  # records first: a shard without one is made again
                for file in path.glob(pattern):
                    if file.name not in kept:
                        file.unlink()
                sync_folder(path)
    return bool(kept)


def commit_shard(
    path: str | Place,
    plan: ShardPlan,
    arrays: Mapping[str, npt.NDArray[np.floating[Any]]],
    rows: InputTable,
    failures: Sequence[Failure],
) -> None:
    """Write one shard of an unfinished cache and then its record; in any process, while a builder holds the cache.

    To a store it is put whole, when it is whole in a temporary folder of this machine.

    Args:
        path: the cache's folder.
        plan: one of the builder's pending shards.
        arrays: [n, ...] for each dataset of the spec, of the stored dtype or a wider one; n counts the inputs that
            did not fail, in order.
        rows: the plan's slice of the listing, with digests and failed inputs (``InputTable.with_results``).
        failures: one for each failed input, in order.

    Raises:
        CacheNotFoundError: no unfinished cache stands there (any more).
        CacheInvalidError: the arguments contradict one another or the cache's plan.
        CacheError: a feature cannot be stored (see ``write_shard``), or the disk refuses.
    """
    path = place(path)
    cache_plan = BuildPlan.read(path)
    check(plan in cache_plan.shards, f"{path}: {plan} is not part of its plan")
    used = np.flatnonzero(~rows.failed)
    ShardRecord.make(plan, ShardFile(len(used), 0, ""), rows, failures)  # refuse before the shard is written
    file = _NO_FILE
    if len(used):
        of = [rows.ids[index] for index in used]

        def write(to: Path) -> ShardFile:
            return write_shard(to, cache_plan.spec, arrays, rows.labels[used], of, rows.sha256[used])

        if isinstance(path, RemotePath):
            with TemporaryDirectory(prefix="shard-") as scratch:
                file = write(Path(scratch) / plan.name)
                (path / plan.name).put(Path(scratch) / plan.name)
        else:
            file = replace(write(path / plan.name), offsets={})  # of a file, HDF5 says them
    else:
        (path / plan.name).unlink(missing_ok=True)
    ShardRecord.make(plan, file, rows, failures).write(path)
