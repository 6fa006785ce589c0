"""FeatureCache: a sealed cache, to read from."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cache.errors import (
    CacheDamagedError,
    CacheError,
    CacheInvalidError,
    CacheMismatchError,
    CacheNotFoundError,
    CacheUnreachableError,
)
from cache.files import TEMPORARY, is_stray, stats_of, touch, written_since
from cache.fingerprint import file_sha256, fingerprint, sha256
from cache.inputs import Failure, InputTable, failures_from_jsonl
from cache.lock import Lock
from cache.manifest import COPY, FAILURES, INPUTS, MANIFEST, Manifest, ShardInfo
from cache.mapped import MappedShards
from cache.ranged import RangedShards
from cache.remote import Place, RemotePath, place
from cache.spec import FeatureSpec
from cache.unfinished import PLAN, file_size, sweep

RowChoice = slice | npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_] | None


@dataclass(frozen=True)
class Damage:
    """One file of a cache that is not as it was sealed."""

    file: str
    what: str


class FeatureCache:
    """A sealed cache. Nothing is read before it is asked for, so that opening costs the manifest alone.

    May be pickled and forked; files are opened in the process that reads.

    Attributes:
        path: the cache's folder.
        manifest: what it holds.
    """

    def __init__(self, path: str | Place, manifest: Manifest) -> None:
        self.path = path = place(path)
        self.manifest = manifest
        self._datasets = manifest.spec.datasets()
        self._shards = RangedShards(path, manifest) if isinstance(path, RemotePath) else MappedShards(path, manifest)

    @classmethod
    def open(cls, path: str | Place, expected: FeatureSpec | None = None) -> Self:
        """Open a sealed cache.

        Args:
            path: the cache's folder.
            expected: what its features must be.

        Raises:
            CacheNotFoundError: there is none, or it is not finished.
            CacheMismatchError: its spec is not the expected one; names the first field that differs.
            CacheDamagedError, CacheInvalidError: its manifest is not one that was sealed, or lost; see
                ``restore_manifest``.
        """
        path = place(path)
        manifest = read_sealed(path)
        if expected and (difference := manifest.spec.first_difference(expected)):
            raise CacheMismatchError(f"{path}: made from something else: {difference}")
        if (path / PLAN).exists():  # sealing was cut short after the manifest
            # Where somebody else works on it or the disk is read-only: the cache is whole all the same.
            with suppress(CacheError), Lock(path):
                if (path / MANIFEST).exists():  # unseal may have taken it away before the lock was ours
                    sweep(path, sealed=True)
        return cls(path, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.manifest)

    def __repr__(self) -> str:
        return f"FeatureCache({str(self.path)!r}, {self.n_rows} rows of {', '.join(self._datasets)})"

    def __len__(self) -> int:
        return self.n_rows

    @property
    def spec(self) -> FeatureSpec:
        """What a feature is."""
        return self.manifest.spec

    @property
    def n_rows(self) -> int:
        """Rows of every array."""
        return self.manifest.n_rows

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the labels stand for."""
        return self.manifest.class_names

    @property
    def dim(self) -> int:
        """D of ``cls``."""
        return self.spec.cls_dim

    @property
    def fingerprint(self) -> str:
        """Digest of what a feature is."""
        return self.spec.fingerprint

    @property
    def identity(self) -> str:
        """Digest of what the features are: spec and content, without place and set name."""
        return self.manifest.identity

    @property
    def digest(self) -> str:
        """Digest of all that a reader gets, without place and name: spec, classes, inputs, bytes of every shard."""
        manifest = self.manifest
        shards = [shard.sha256 for shard in manifest.shards if shard.rows]
        return fingerprint([manifest.spec.fingerprint, list(self.class_names), manifest.content_sha256, shards])

    @cached_property
    def _inputs(self) -> InputTable:
        return InputTable.from_parquet(self._read_file(INPUTS, self.manifest.inputs_sha256))

    def inputs(self) -> InputTable:
        """What the cache was made from, failures included.

        Raises:
            CacheDamagedError: the file is missing, or its bytes do not match the manifest.
        """
        return self._inputs

    def failures(self) -> list[Failure]:
        """Every input that could not be used, with the reason.

        Raises:
            CacheDamagedError: the file is missing, or its bytes do not match the manifest.
        """
        return failures_from_jsonl(self._read_file(FAILURES, self.manifest.failures_sha256))

    @cached_property
    def labels(self) -> npt.NDArray[np.int32]:
        """[n] int32, -1 where unknown."""
        return self._inputs.labels[~self._inputs.failed]

    @cached_property
    def ids(self) -> npt.NDArray[np.str_]:
        """[n] str, the sample ids."""
        return np.array(self._inputs.ids, np.str_)[~self._inputs.failed]

    @cached_property
    def image_hashes(self) -> npt.NDArray[np.uint8]:
        """[n, 32] uint8, SHA-256 of each image file."""
        return self._inputs.sha256[~self._inputs.failed]

    def read(
        self, name: str, rows: RowChoice = None, new: Callable[..., npt.NDArray[Any]] = np.empty
    ) -> npt.NDArray[Any]:
        """Features of some rows, in the order given; touches the named dataset only.

        Args:
            name: ``"cls"``, ``"tap_cls"``, ``"registers"``, ``"patches"`` or ``"logits"``, as far as they are cached.
            rows: row numbers (repeats allowed), a mask [n], a slice, or None for all.
            new: makes the array that is filled, of a shape and a dtype, as `numpy.empty` does: where it shall lie.

        Returns:
            [len(rows), ...] in the stored dtype; memory of its own, writable.

        Raises:
            CacheError: no such dataset or row.
            CacheDamagedError: a shard is missing or not as it was sealed.
        """
        if name not in self._datasets:
            raise CacheError(f"{self.path}: {name!r} is not cached; there are {', '.join(self._datasets)}")
        shape, dtype = self._datasets[name]
        with self._memory_errors():
            numbers = self._row_numbers(rows)
            out = new((len(numbers), *shape), dtype)
        self._shards.fill(out, name, numbers)
        return out

    def batches(
        self, names: Sequence[str], rows: RowChoice = None, batch_size: int = 256, seed: int | None = None
    ) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Walk over rows in batches; memory stays that of one batch.

        Args:
            names: datasets to read.
            rows: as in ``read``.
            batch_size: rows of a batch; the last one may have fewer.
            seed: shuffles the rows; None keeps their order.

        Yields:
            one array per name, and the numbers of the rows as ``"row"`` [b] int64.
        """
        if batch_size < 1:
            raise CacheError(f"batch_size is {batch_size}, must be at least 1")
        with self._memory_errors():
            numbers = self._row_numbers(rows)
            if seed is not None:
                numbers = np.random.default_rng(seed).permutation(numbers)
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            yield {name: self.read(name, batch) for name in names} | {"row": batch}

    def suspects(self) -> list[ShardInfo]:
        """Shards that may have been written to since they were sealed, told without reading them, see `written_since`.

        That is none as a rule, and all of a cache that was copied.

        Raises:
            CacheDamagedError: a shard is missing, or has another size.
        """
        shards = [shard for shard in self.manifest.shards if shard.rows]
        found = stats_of(self.path, [MANIFEST, *(shard.name for shard in shards)])
        for shard in shards:
            size = found[shard.name].st_size if shard.name in found else None
            if size != shard.nbytes:
                what = "is missing" if size is None else f"has {size} bytes, must have {shard.nbytes}"
                raise CacheDamagedError(f"{self.path / shard.name}: {what}; run verify")
        return [shard for shard in shards if written_since(found[shard.name], found.get(MANIFEST))]

    def check(self, progress: Callable[[int], None] | None = None) -> None:
        """Compare the bytes of the shards that may have been written to with the manifest.

        Where all are whole the manifest is touched, if it may be, so that they are not compared again.

        Args:
            progress: called with the bytes of every shard that was read.

        Raises:
            CacheDamagedError: a shard is missing or not as it was sealed.
        """
        suspects = self.suspects()
        for shard in suspects:
            if file_sha256(self.path / shard.name) != shard.sha256:
                raise CacheDamagedError(
                    f"{self.path / shard.name}: its bytes are not those that were sealed; run verify"
                )
            if progress:
                progress(shard.nbytes)
        if suspects:
            with suppress(OSError, CacheUnreachableError):  # somebody else's, or a disk that may only be read
                touch(self.path / MANIFEST)

    def verify(self, progress: Callable[[int], None] | None = None) -> list[Damage]:
        """Compare every byte of every file with the manifest: first names and sizes, then digests.

        Args:
            progress: called with the bytes that were read since the last call.

        Returns:
            what is wrong, in order of files; empty for a whole cache. (A damaged manifest is found by ``open``; its
            copy is checked here.)
        """
        shards = [shard for shard in self.manifest.shards if shard.rows]
        digests = {INPUTS: self.manifest.inputs_sha256, FAILURES: self.manifest.failures_sha256}
        digests |= {shard.name: shard.sha256 for shard in shards}
        sizes = {shard.name: shard.nbytes for shard in shards}
        present = {file.name for file in self.path.iterdir() if not is_stray(file.name)}
        damages = {name: "is missing" for name in digests.keys() - present}
        damages |= {name: "is not part of the cache" for name in present - digests.keys() - {MANIFEST, COPY}}
        for name in digests.keys() & present:
            size = file_size(self.path / name)
            if size != sizes.get(name, size):
                damages[name] = f"has {size} bytes, must have {sizes[name]}"
        for name in sorted(digests.keys() - damages.keys()):
            try:
                digest = file_sha256(self.path / name)
            except OSError as error:
                damages[name] = f"cannot be read: {error.strerror}"
                continue
            if digest != digests[name]:
                damages[name] = "its bytes are not those that were sealed"
            if progress:
                progress(file_size(self.path / name) or 0)
        try:
            if Manifest.read(self.path) != self.manifest:
                damages[MANIFEST] = "has changed since the cache was opened"
        except CacheUnreachableError:
            raise
        except CacheError as error:
            damages[MANIFEST] = str(error)
        if MANIFEST not in damages and not alike(self.path):
            damages[COPY] = f"is missing, or not the same as {MANIFEST}"
        return [Damage(name, damages[name]) for name in sorted(damages)]

    def strays(self) -> list[str]:
        """Names of what systems left in the folder, `.DS_Store` and the like; nothing looks at them."""
        found = (file.name for file in self.path.iterdir() if file.suffix != TEMPORARY)
        return sorted(filter(is_stray, found))

    def _read_file(self, name: str, digest: str) -> bytes:
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise CacheDamagedError(f"{self.path / name}: cannot be read: {error.strerror}; run verify") from error
        if sha256(data) != digest:
            raise CacheDamagedError(f"{self.path / name}: its bytes are not those that were sealed; run verify")
        return data

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        try:
            yield
        except MemoryError as error:
            raise CacheError(
                f"{self.path}: {self.n_rows} rows are too many for the memory: {error}; read fewer at once, or walk "
                "over batches. If there should be fewer, run verify"
            ) from error

    def _row_numbers(self, rows: RowChoice) -> npt.NDArray[np.int64]:
        if rows is None or isinstance(rows, slice):
            return np.arange(self.n_rows, dtype=np.int64)[rows or slice(None)]
        numbers = np.asarray(rows)
        if numbers.dtype == np.bool_ and numbers.shape == (self.n_rows,):
            return np.flatnonzero(numbers)
        if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iu"):
            raise CacheError(
                f"rows must be numbers [m], a mask [{self.n_rows}] or a slice, not {numbers.dtype} {numbers.shape}"
            )
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= self.n_rows):
            raise CacheError(
                f"rows {numbers.min()} to {numbers.max()} asked of a cache with rows 0 to {self.n_rows - 1}"
            )
        return numbers.astype(np.int64)


def read_sealed(path: Place) -> Manifest:
    """The manifest of a sealed cache.

    Raises:
        CacheNotFoundError: there is no cache, or it is not finished.
        CacheDamagedError: the manifest is damaged or lost; says whether its copy is whole.
        CacheInvalidError: manifest and copy, if any, are alike, and hostile or of another schema.
    """
    if not (path / MANIFEST).exists():
        if (path / PLAN).exists():
            raise CacheNotFoundError(f"{path}: the cache is not finished; run extract again, it goes on where it was")
        if not (path / COPY).exists():
            raise CacheNotFoundError(f"{path}: no cache stands there (no {MANIFEST})")
    try:
        return Manifest.read(path)
    except (CacheNotFoundError, CacheDamagedError, CacheInvalidError) as error:
        if not (path / COPY).exists() or alike(path):
            raise
        try:
            Manifest.read(path, COPY)
        except CacheError:
            raise CacheDamagedError(f"{error}; its copy is damaged, too: delete the cache, run make extract") from error
        raise CacheDamagedError(f"{error}; verify --repair puts it back from its copy") from error


def alike(path: Place) -> bool:
    """Whether a cache's manifest and its copy are both there, with the same bytes."""
    try:
        return (path / MANIFEST).read_bytes() == (path / COPY).read_bytes()
    except OSError:
        return False
