"""MappedShards: rows of a sealed cache's arrays, copied out of shards that are mapped when they are first read."""

import threading
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.errors import CacheDamagedError
from cache.manifest import Manifest
from cache.shard import ShardReader

MOST_MAPPED = 256  # shards at once: each takes a file descriptor, and a process may have only 1024
LARGE_ROW = 16384  # bytes from which a Python loop over rows costs less than a second copy


class MappedShards:
    """Copies rows out of the shards of a sealed cache; several threads may.

    Args:
        path: the cache's folder.
        manifest: what it holds.
        most_mapped: shards that are mapped at once.
        large_row: bytes from which rows are copied one by one, straight to their place.
    """

    def __init__(
        self, path: Path, manifest: Manifest, most_mapped: int = MOST_MAPPED, large_row: int = LARGE_ROW
    ) -> None:
        self._path = path
        self._shards = manifest.shards
        self._datasets = manifest.spec.datasets()
        self._starts = np.array([shard.start for shard in manifest.shards], np.int64)
        self._most_mapped = most_mapped
        self._large_row = large_row
        self._readers: dict[int, ShardReader] = {}  # they remember where datasets lie, mapped or not
        self._mapped: dict[int, dict[str, npt.NDArray[Any]]] = {}  # longest mapped first
        self._mapping = threading.Lock()

    def fill(self, out: npt.NDArray[Any], name: str, numbers: npt.NDArray[np.int64]) -> None:
        """Copy some rows of a dataset.

        Args:
            out: [len(numbers), ...] of the stored dtype, fresh.
            name: of the dataset.
            numbers: of the rows, all of which exist.

        Raises:
            CacheDamagedError: a shard is missing or not as it was sealed.
        """
        if not len(numbers):
            return
        # "right": of the shards that start at a row, the last one holds it, since those before have no rows.
        shards = np.searchsorted(self._starts, numbers, "right") - 1
        local = numbers - self._starts[shards]
        shape, dtype = self._datasets[name]
        large = prod(shape) * dtype.itemsize >= self._large_row
        if large and len(np.unique(shards)) <= self._most_mapped:
            order = np.arange(len(numbers))  # fresh memory is filled from its start, while its pages are in the cache
        else:
            order = np.argsort(shards, kind="stable")  # each shard is mapped once
        shards, local = shards[order], local[order]
        breaks = np.diff(shards) != 0
        if large:
            breaks |= (np.diff(local) != 1) | (np.diff(order) != 1)
        starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
        stops = np.append(starts[1:], len(order))
        if large:  # a run of rows at a time, straight to its place, without the copy in between that a gather makes
            columns = (shards[starts], order[starts], local[starts], stops - starts)
            runs = zip(*(column.tolist() for column in columns), strict=True)
            for shard, place, row, length in runs:
                out[place : place + length] = self._array(shard, name)[row : row + length]
        else:
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
                array = self._array(int(shards[start]), name)
                out[_as_slice(order[start:stop])] = array[_as_slice(local[start:stop])]

    def _array(self, index: int, name: str) -> npt.NDArray[Any]:
        with self._mapping:
            arrays = self._mapped.get(index)
            if arrays is None:
                if len(self._mapped) >= self._most_mapped:
                    longest = next(iter(self._mapped))
                    del self._mapped[longest]
                    self._readers[longest].close()
                arrays = self._mapped[index] = {}
            if name not in arrays:
                arrays[name] = self._map(index, name)
            return arrays[name]

    def _map(self, index: int, name: str) -> npt.NDArray[Any]:
        shard, (shape, dtype) = self._shards[index], self._datasets[name]
        reader = self._readers.setdefault(index, ShardReader(self._path / shard.name))
        array = reader.array(name)
        if array.shape != (shard.rows, *shape) or array.dtype != dtype:
            raise CacheDamagedError(f"{reader.path}: {name} is {array.dtype} {array.shape}, not as sealed; run verify")
        return array


def _as_slice(numbers: npt.NDArray[np.int64]) -> slice | npt.NDArray[np.int64]:
    """A slice where the numbers follow one another: it copies one run of bytes, where an index array gathers."""
    first, last = int(numbers[0]), int(numbers[-1])
    runs = last - first + 1 == len(numbers) and bool((np.diff(numbers) == 1).all())
    return slice(first, last + 1) if runs else numbers
