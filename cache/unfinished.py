"""What stands beside the shards of a cache that is not sealed yet.

::

    caltech-1a2b3c4d.lock     who fills the cache, see `cache.lock`
    caltech-1a2b3c4d/
    ├── plan.json             BuildPlan: what is to be made; the cache is unfinished while there is no manifest.json
    ├── shard-00000.h5        written first …
    ├── shard-00000.json      … then its ShardRecord: where it stands, the shard is done
    └── .shard-00001.h5.*.tmp what a killed process left

Sealing writes ``manifest.copy.json``, ``manifest.json`` and then removes records and plan, the plan last: a manifest
beside a plan is a sealed cache whose tidying was cut short. Unsealing goes the other way round: plan and records are
written, ``manifest.json`` is removed, then its copy: a copy beside a plan, without a manifest, means nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cache.errors import CacheError, CacheUnreachableError
from cache.files import (
    TEMPORARY,
    check,
    check_fields,
    disk_errors,
    is_stray,
    read_versioned,
    sync_folder,
    write_versioned,
)
from cache.fingerprint import fingerprint
from cache.inputs import Failure, InputSet, InputTable
from cache.manifest import COPY, check_dataset_name, check_made_with, offsets_from
from cache.plan import ShardPlan
from cache.remote import Place
from cache.shard import ShardFile
from cache.spec import FeatureSpec, first_difference

PLAN = "plan.json"


@dataclass(frozen=True)
class BuildPlan:
    """What an unfinished cache is to become; ``inputs`` holds a digest per column of the listing."""

    dataset: str
    spec: FeatureSpec
    class_names: tuple[str, ...]
    inputs: Mapping[str, str]
    shards: tuple[ShardPlan, ...]
    made_with: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        inputs: InputSet,
        spec: FeatureSpec,
        shards: Sequence[ShardPlan],
        made_with: Mapping[str, Any],
    ) -> Self:
        """Check that the parts fit together.

        Raises:
            CacheInvalidError: ids that stand twice, labels without a class, shards that do not cover the inputs.
        """
        listing, class_names = inputs.listing, inputs.class_names
        check_dataset_name(inputs.name)
        check_made_with(made_with)
        if len(set(listing.ids)) < len(listing):
            seen: set[str] = set()
            twice = next(id_ for id_ in listing.ids if id_ in seen or seen.add(id_))  # type: ignore[func-returns-value]
            check(False, f"inputs: {twice!r} stands there twice")
        labels_ok = bool(np.all((listing.labels >= -1) & (listing.labels < len(class_names))))
        check(labels_ok, f"inputs: labels must be -1 (unknown) to {len(class_names) - 1}, one of the classes")
        stops = [0, *(shard.stop for shard in shards)]
        tiled = all(
            shard == ShardPlan(index, stops[index], shard.stop) and len(shard) > 0 for index, shard in enumerate(shards)
        )
        check(
            tiled and stops[-1] == len(listing), f"the shards' plans do not cover the {len(listing)} inputs, once each"
        )
        digests = listing.columns_sha256()
        return cls(inputs.name, spec, tuple(class_names), digests, tuple(shards), dict(made_with))

    @property
    def n_inputs(self) -> int:
        """Inputs of all shards."""
        return self.shards[-1].stop if self.shards else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {
            "dataset": self.dataset,
            "spec": self.spec.to_dict(),
            "class_names": list(self.class_names),
            "inputs": dict(self.inputs),
            "shards": [[shard.start, shard.stop] for shard in self.shards],
            "made_with": dict(self.made_with),
        }

    def first_difference(self, asked: "BuildPlan") -> str | None:
        """The first thing in which this plan and the one asked for differ; ``made_with`` may."""
        if difference := self.spec.first_difference(asked.spec):
            return difference
        if columns := [name for name in asked.inputs if self.inputs.get(name) != asked.inputs[name]]:
            return f"{', '.join(columns)} of the inputs are not those that it was begun with"
        return first_difference(self.to_dict(), {**asked.to_dict(), "made_with": dict(self.made_with)})

    def write(self, path: Place) -> None:
        """Write ``plan.json`` into the cache's folder."""
        write_versioned(path / PLAN, self.to_dict())

    @classmethod
    def read(cls, path: Place) -> Self:
        """Read ``plan.json``.

        Raises:
            CacheNotFoundError, CacheDamagedError, CacheInvalidError: as ``read_versioned``.
        """
        kinds = {"dataset": str, "spec": dict, "class_names": list, "inputs": dict, "shards": list, "made_with": dict}
        body = check_fields(read_versioned(path / PLAN), kinds, PLAN)
        pairs = body["shards"]
        plain = all(isinstance(pair, list) and [type(end) for end in pair] == [int, int] for pair in pairs)
        check(plain, f"{PLAN}: shards must be pairs of numbers")
        check_made_with(body["made_with"])
        spec, shards = FeatureSpec.from_dict(body["spec"]), (ShardPlan(i, *pair) for i, pair in enumerate(pairs))
        return cls(**body | {"spec": spec, "class_names": tuple(body["class_names"]), "shards": tuple(shards)})


@dataclass(frozen=True, eq=False)
class ShardRecord:
    """That a shard is done, and what came of its inputs.

    Attributes:
        plan: the inputs it was made of.
        file: what was written; no rows and no bytes where every input failed.
        inputs: digest of the slice of the listing, so that a record never meets another listing.
        digests: [n, 32] uint8, SHA-256 of each input.
        failed: [n] bool.
        failures: one for each failed input, in order.
    """

    plan: ShardPlan
    file: ShardFile
    inputs: str
    digests: npt.NDArray[np.uint8]
    failed: npt.NDArray[np.bool_]
    failures: tuple[Failure, ...]

    @classmethod
    def make(cls, plan: ShardPlan, file: ShardFile, rows: InputTable, failures: Sequence[Failure]) -> Self:
        """The record of a shard made from a slice of the inputs.

        Raises:
            CacheInvalidError: rows, failures and plan contradict one another.
        """
        check(len(rows) == len(plan), f"{plan.name}: {len(rows)} inputs given for the {len(plan)} of its plan")
        failed_ids = [rows.ids[index] for index in np.flatnonzero(rows.failed)]
        named = [failure.id for failure in failures]
        check(named == failed_ids, f"{plan.name}: failures are listed for {named!r:.80}, but {failed_ids!r:.80} failed")
        check(
            file.rows + len(named) == len(plan), f"{plan.name}: {file.rows} rows + {len(named)} failures ≠ {len(plan)}"
        )
        return cls(plan, file, fingerprint(rows.columns_sha256()), rows.sha256, rows.failed, tuple(failures))

    def write(self, path: Place) -> None:
        """Write ``shard-00000.json`` into the cache's folder."""
        body = {
            "start": self.plan.start,
            "stop": self.plan.stop,
            **{item.name: getattr(self.file, item.name) for item in fields(self.file)},
            "inputs": self.inputs,
            "digests": self.digests.tobytes().hex(),
            "failed": np.flatnonzero(self.failed).tolist(),
            "failures": [failure.to_dict() for failure in self.failures],
        }
        if not self.file.offsets:
            del body["offsets"]
        write_versioned(path / record_name(self.plan), body)

    @classmethod
    def read(cls, path: Place, plan: ShardPlan) -> "ShardRecord | None":
        """The record of a finished shard; None where the shard is not done, or not whole, and is to be made again."""
        kinds: dict[str, type] = {"start": int, "stop": int, "rows": int, "nbytes": int, "sha256": str}
        kinds |= {"inputs": str, "digests": str, "failed": list, "failures": list, "offsets": dict}
        try:
            body = {"offsets": {}} | read_versioned(path / record_name(plan))
            body = check_fields(body, kinds, record_name(plan))
            offsets = offsets_from(body["offsets"])
            failures = tuple(Failure.from_dict(failure) for failure in body["failures"])
            digests = np.frombuffer(bytes.fromhex(body["digests"]), np.uint8).reshape(len(plan), 32)
            failed = np.zeros(len(plan), np.bool_)
            failed[body["failed"]] = True
        except CacheUnreachableError:  # nothing is known of it
            raise
        except (CacheError, ValueError, IndexError):
            return None
        file = ShardFile(body["rows"], body["nbytes"], body["sha256"], offsets)
        whole = file.rows + int(failed.sum()) == len(plan) == len(failures) + file.rows and file_size(
            path / plan.name
        ) == (file.nbytes if file.rows else None)
        if (body["start"], body["stop"]) != (plan.start, plan.stop) or not whole:
            return None
        return cls(plan, file, body["inputs"], digests, failed, failures)


def record_name(plan: ShardPlan) -> str:
    """File name of a shard's record."""
    return f"shard-{plan.index:05d}.json"


def file_size(path: Place) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def is_blank(path: Place) -> bool:
    """Whether a folder is missing, or empty but for what killed processes and systems left: free for a new cache."""
    return not path.exists() or (path.is_dir() and all(is_stray(file.name) for file in path.iterdir()))


def sweep(path: Place, *, sealed: bool) -> None:
    """Remove what killed processes left; from a sealed cache the records and then the plan as well.

    From an unfinished one a manifest's copy that sealing or unsealing left.
    """
    with disk_errors(path):
        for file in path.glob(f".*{TEMPORARY}"):
            file.unlink(missing_ok=True)
        if not sealed:
            (path / COPY).unlink(missing_ok=True)
        else:
            for file in path.glob("shard-*.json"):
                file.unlink(missing_ok=True)
            (path / PLAN).unlink(missing_ok=True)
            sync_folder(path)
