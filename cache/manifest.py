"""Manifest: what a sealed cache holds. It is written last: where it stands, the cache is whole.

``manifest.copy.json`` has the same bytes and is written just before; from it a damaged manifest is put back.

Its numbers are checked against one another when it is read, so that a manifest that was not written by ``seal`` can
name no file outside its folder and no row that its shards have no room for.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any, Self

from cache.files import check, check_fields, read_versioned, write_versioned
from cache.fingerprint import fingerprint
from cache.plan import ShardPlan
from cache.remote import Place
from cache.spec import FeatureSpec

MANIFEST, COPY, INPUTS, FAILURES = "manifest.json", "manifest.copy.json", "inputs.parquet", "failures.jsonl"
RESUMED = "resumed_with"  # in made_with: other machines or versions that went on with what one began
_MOST = 1 << 48  # bytes or inputs; no cache comes near, and what is computed from hostile ones cannot overflow
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9._-]+")  # of a set: part of a folder's name


@dataclass(frozen=True)
class ShardInfo:
    """A sealed shard: rows ``start`` to ``start + rows``, made of inputs ``input_start`` to ``input_stop``.

    A shard whose inputs all failed has no rows, no bytes and no file. Where its rows are read as ranges of bytes,
    ``offsets`` says where each dataset lies in the file: its first byte and how many it has. In a folder HDF5 says it.
    """

    name: str
    start: int
    rows: int
    nbytes: int
    sha256: str
    input_start: int
    input_stop: int
    offsets: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # not written where it is empty

    @property
    def n_failures(self) -> int:
        """Inputs of this shard that could not be used."""
        return self.input_stop - self.input_start - self.rows


@dataclass(frozen=True)
class Manifest:
    """What a sealed cache holds.

    Attributes:
        dataset: name of the set.
        spec: what a feature is.
        class_names: what the labels stand for.
        n_inputs: rows + failures.
        n_rows: rows of every array.
        n_failures: lines of ``failures.jsonl``.
        inputs_sha256: digest of the file ``inputs.parquet``.
        failures_sha256: digest of the file ``failures.jsonl``.
        content_sha256: digest over (id, label, sha256, status) of the inputs, without sizes and times.
        shards: in order; together they cover all inputs and all rows, once.
        made_with: versions and settings that the bits may depend on; any JSON object.
        left_out: how many files the source held that were no inputs, by extension; nothing else depends on it.

    Raises:
        CacheInvalidError: for numbers that contradict one another.
    """

    dataset: str
    spec: FeatureSpec
    class_names: tuple[str, ...]
    n_inputs: int
    n_rows: int
    n_failures: int
    inputs_sha256: str
    failures_sha256: str
    content_sha256: str
    shards: tuple[ShardInfo, ...]
    made_with: dict[str, Any]
    left_out: dict[str, int] = field(default_factory=dict)  # not written where it is empty

    def __post_init__(self) -> None:
        check_dataset_name(self.dataset)
        check(all(isinstance(name, str) for name in self.class_names), "manifest: class_names must be strings")
        for name in ("inputs_sha256", "failures_sha256", "content_sha256"):
            check(bool(_DIGEST.fullmatch(getattr(self, name))), f"manifest: {name} is no SHA-256")
        check_made_with(self.made_with)
        for suffix, n_files in self.left_out.items():
            counts_files = type(n_files) is int and 0 < n_files <= _MOST
            check(counts_files, f"manifest: {n_files!r:.60} files with {suffix!r:.60} cannot be left out")
        row = input_ = nbytes = 0
        row_bytes = self.spec.row_bytes
        for index, shard in enumerate(self.shards):
            name = ShardPlan(index, 0, 0).name
            check(shard.name == name, f"manifest: shard {index} is called {shard.name!r:.60}, must be {name!r}")
            follows = shard.start == row and shard.input_start == input_ and shard.input_stop > input_
            check(
                follows and shard.rows >= 0 and shard.n_failures >= 0, f"manifest: rows or inputs of {name} are wrong"
            )
            room = shard.nbytes == 0 if shard.rows == 0 else shard.nbytes > shard.rows * row_bytes
            check(room, f"manifest: {shard.rows} rows cannot stand in the {shard.nbytes} bytes of {name}")
            check(bool(_DIGEST.fullmatch(shard.sha256)), f"manifest: sha256 of {name} is no SHA-256")
            check_offsets(shard.offsets, shard.rows, shard.nbytes, self.spec)
            row, input_, nbytes = row + shard.rows, shard.input_stop, nbytes + shard.nbytes
        counts, added = (self.n_rows, self.n_inputs, self.n_failures), (row, input_, input_ - row)
        check(counts == added, f"manifest: (rows, inputs, failures) are {counts}, its shards add up to {added}")
        fits = max(nbytes, input_) <= _MOST
        check(fits, f"manifest: {nbytes} bytes of {input_} inputs are more than a cache can hold")

    @property
    def identity(self) -> str:
        """Digest over spec and content: equal for equal features, whatever the place and the set's name."""
        return fingerprint([self.spec.fingerprint, self.content_sha256])

    def write(self, path: Place, name: str = MANIFEST) -> None:
        """Write ``manifest.json`` into a cache's folder, and from then on the cache is sealed; or its copy."""
        body = {field.name: getattr(self, field.name) for field in fields(self)}
        if not self.left_out:
            del body["left_out"]
        shards = [_without_empty_offsets(asdict(shard)) for shard in self.shards]
        write_versioned(
            path / name,
            body | {"spec": self.spec.to_dict(), "class_names": list(self.class_names), "shards": shards},
        )

    @classmethod
    def read(cls, path: Place, name: str = MANIFEST) -> Self:
        """Read and check the manifest of a cache's folder, or its copy.

        Raises:
            CacheNotFoundError: there is none.
            CacheDamagedError: its bytes do not match its digest.
            CacheInvalidError: it is hostile, unreadable, or of another schema.
        """
        kinds: dict[str, type] = {field.name: str for field in fields(cls)}
        kinds |= dict.fromkeys(("n_inputs", "n_rows", "n_failures"), int)
        kinds |= {"spec": dict, "made_with": dict, "class_names": list, "shards": list, "left_out": dict}
        body = check_fields({"left_out": {}} | read_versioned(path / name), kinds, "manifest")
        shards = tuple(map(_shard_from_dict, body["shards"]))
        spec = FeatureSpec.from_dict(body["spec"])
        return cls(**body | {"spec": spec, "class_names": tuple(body["class_names"]), "shards": shards})


def check_offsets(offsets: Mapping[str, tuple[int, int]], rows: int, nbytes: int, spec: FeatureSpec) -> None:
    """Raise CacheInvalidError unless datasets lie where they can in a shard, features all of them; or none is given.

    Args:
        offsets: first byte and number of bytes of each dataset.
        rows: of the shard.
        nbytes: of its file.
        spec: what its features are.
    """
    lengths = {name: rows * prod(shape) * dtype.itemsize for name, (shape, dtype) in spec.datasets().items()}
    check(not offsets or offsets.keys() >= lengths.keys(), "manifest: offsets are not those of all datasets")
    for name, (start, length) in offsets.items():
        fits = start >= 0 and length >= 0 and start + length <= nbytes
        check(fits and length == lengths.get(name, length), f"manifest: {name} cannot lie at {[start, length]}")


def offsets_from(body: Any) -> dict[str, tuple[int, int]]:
    """Where datasets lie, as JSON has it.

    Raises:
        CacheInvalidError: it is no object of pairs of numbers.
    """
    pairs = list(body.values()) if isinstance(body, dict) else [None]
    plain = all(isinstance(pair, list | tuple) and [type(end) for end in pair] == [int, int] for pair in pairs)
    check(plain, f"offsets are {body!r:.60}, must be pairs of numbers")
    return {name: (start, length) for name, (start, length) in body.items()}


def _without_empty_offsets(shard: dict[str, Any]) -> dict[str, Any]:
    return shard if shard["offsets"] else {name: value for name, value in shard.items() if name != "offsets"}


def _shard_from_dict(body: Any) -> ShardInfo:
    kinds: dict[str, type] = {field.name: int for field in fields(ShardInfo)}
    kinds |= {"name": str, "sha256": str, "offsets": dict}
    checked = check_fields({"offsets": {}} | body if isinstance(body, dict) else body, kinds, "manifest: shard")
    return ShardInfo(**checked | {"offsets": offsets_from(checked["offsets"])})


def check_made_with(made_with: Mapping[str, Any]) -> None:
    """Raise CacheInvalidError unless what stands under ``resumed_with`` is a list of other settings."""
    others = made_with.get(RESUMED, [])
    listed = isinstance(others, list) and all(isinstance(other, Mapping) and RESUMED not in other for other in others)
    check(listed, f"made_with: {RESUMED} must be a list of objects")


def resumed_with(began: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """``made_with`` of what was begun with some settings and goes on with others, which it lists once each.

    >>> resumed_with({"torch": "2.14"}, {"torch": "2.15"})
    {'torch': '2.14', 'resumed_with': [{'torch': '2.15'}]}
    """
    check_made_with(began)
    check_made_with(now)
    known = [own_settings(began), *began.get(RESUMED, [])]
    for settings in (own_settings(now), *now.get(RESUMED, [])):
        if fingerprint(settings) not in map(fingerprint, known):
            known.append(settings)
    return {**known[0], RESUMED: known[1:]} if known[1:] else dict(known[0])


def own_settings(made_with: Mapping[str, Any]) -> dict[str, Any]:
    """``made_with`` without those that it was resumed with."""
    return {key: value for key, value in made_with.items() if key != RESUMED}


def check_dataset_name(name: str) -> None:
    """Raise CacheInvalidError unless a set's name can be part of a folder's name."""
    check(bool(_NAME.fullmatch(name)), f"set name {name!r:.60}: only letters, digits and . _ - may stand in it")
