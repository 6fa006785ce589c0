"""RangedShards: rows of a sealed cache that stands in an object store, read as ranges of bytes without HDF5."""

import threading
from collections.abc import Iterator
from itertools import islice
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cache.errors import CacheDamagedError
from cache.manifest import Manifest
from cache.remote import RemotePath, read_ranges
from cache.shard import shard_layout

MOST_GAP = 64 << 10  # bytes between two rows that are read along, since a request of its own would take as long
PIECE = 8 << 20  # most bytes of a request, so that several share the line, and a cut costs no more
AT_ONCE = 16  # requests whose answers are in memory at a time


class _Run(NamedTuple):
    """Rows of one shard that are asked for together."""

    shard: int
    first: int  # row of the shard
    stop: int
    places: npt.NDArray[np.int64] | slice  # of the rows in what is filled
    rows: npt.NDArray[np.int64] | slice  # which of the run's they are


class RangedShards:
    """Copies rows out of the shards of a sealed cache in a store; several threads may.

    Where the datasets lie stands in the manifest. One that was sealed in a folder and copied to the store does not say
    it; then the first bytes of each shard are asked for and HDF5 says it.

    Args:
        path: the cache's folder.
        manifest: what it holds.
        piece: most bytes of a request; one row at least.
        most_gap: bytes between two rows that are read along with them.
    """

    def __init__(self, path: RemotePath, manifest: Manifest, piece: int = PIECE, most_gap: int = MOST_GAP) -> None:
        self._path = path
        self._shards = manifest.shards
        self._datasets = manifest.spec.datasets()
        self._starts = np.array([shard.start for shard in manifest.shards], np.int64)
        self._piece = piece
        self._most_gap = most_gap
        self._found: dict[int, dict[str, int]] = {}  # first bytes of the datasets, of shards of which HDF5 said it
        self._finding = threading.Lock()

    def fill(self, out: npt.NDArray[Any], name: str, numbers: npt.NDArray[np.int64]) -> None:
        """Copy some rows of a dataset.

        Args:
            out: [len(numbers), ...] of the stored dtype, fresh.
            name: of the dataset.
            numbers: of the rows, all of which exist.

        Raises:
            CacheDamagedError: a shard is missing or not as it was sealed.
            CacheUnreachableError: the store did not give all of it; nothing of `out` is then to be used.
        """
        shape, dtype = self._datasets[name]
        row_bytes = prod(shape) * dtype.itemsize
        runs = self._runs(numbers, row_bytes)
        while group := list(islice(runs, AT_ONCE)):
            starts = [self._offset(run.shard, name) + run.first * row_bytes for run in group]
            lengths = [(run.stop - run.first) * row_bytes for run in group]
            paths = [self._path / self._shards[run.shard].name for run in group]
            try:
                found = read_ranges(paths, starts, [a + n for a, n in zip(starts, lengths, strict=True)])
            except FileNotFoundError as error:
                raise CacheDamagedError(f"{error.filename}: is missing; run verify") from error
            for run, path, data, length in zip(group, paths, found, lengths, strict=True):
                if len(data) != length:
                    raise CacheDamagedError(f"{path}: ends inside {name!r}; run verify")
                out[run.places] = np.frombuffer(data, dtype).reshape(-1, *shape)[run.rows]

    def _runs(self, numbers: npt.NDArray[np.int64], row_bytes: int) -> Iterator[_Run]:
        """The rows in order, cut where a shard, a piece or what is near ends."""
        if not len(numbers):
            return
        order = np.argsort(numbers, kind="stable")
        rows = numbers[order]
        # "right": of the shards that start at a row, the last one holds it, since those before have no rows.
        shards = np.searchsorted(self._starts, rows, "right") - 1
        local = rows - self._starts[shards]
        pieces = local // max(self._piece // row_bytes, 1)
        far = np.diff(local) * row_bytes > self._most_gap + row_bytes
        starts = np.flatnonzero(np.concatenate([[True], (np.diff(shards) != 0) | (np.diff(pieces) != 0) | far]))
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
            first, last = int(local[start]), int(local[stop - 1]) + 1
            places, within = order[start:stop], local[start:stop] - first
            if last - first == stop - start and bool((np.diff(within) == 1).all()):
                yield _Run(int(shards[start]), first, last, _as_slice(places), slice(None))
            else:
                yield _Run(int(shards[start]), first, last, places, within)

    def _offset(self, index: int, name: str) -> int:
        """Where a dataset begins in a shard."""
        shard = self._shards[index]
        if shard.offsets:
            return shard.offsets[name][0]
        with self._finding:
            if index not in self._found:
                self._found[index] = self._offsets_from_hdf5(index)
            return self._found[index][name]

    def _offsets_from_hdf5(self, index: int) -> dict[str, int]:
        shard, path = self._shards[index], self._path / self._shards[index].name
        layout = shard_layout(path)
        for name, (shape, dtype) in self._datasets.items():
            if name not in layout or layout[name][1:] != ((shard.rows, *shape), dtype):
                raise CacheDamagedError(f"{path}: {name} is not as sealed; run verify")
        return {name: layout[name][0] for name in self._datasets}


def _as_slice(places: npt.NDArray[np.int64]) -> slice | npt.NDArray[np.int64]:
    """A slice where places follow one another: rows are then copied as one run of bytes."""
    first = int(places[0])
    return slice(first, first + len(places)) if bool((np.diff(places) == 1).all()) else places
