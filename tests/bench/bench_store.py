"""How far rows of a cache in an object store are from bare ranges of bytes. ``make bench-store``.

    rows      FeatureCache.read of all patches, and of shuffled batches / the same bytes by fsspec's `cat_ranges`

The store is moto's server on this machine, in a process of its own: what is compared is what reading adds, not a line.
Prints medians of runs in turn and their ratio (1.00 is the limit). These are timings: nothing here is a test.
"""

import os

import fsspec
import numpy as np
from rich.console import Console

from cache import FeatureCache, RemotePath
from cache.ranged import PIECE
from tests.bench.bench_cache import MB, fill
from tests.bench.timing import in_turn, rates, row
from tests.object_store import BUCKET, ObjectStore

SHARDS, BATCH = 2, 64


def main() -> None:
    """Measure and print."""
    store = ObjectStore()
    os.environ |= store.environment | {"AWS_ENDPOINT_URL": store.direct}
    try:
        cache = fill(RemotePath(f"s3://{BUCKET}/bench"), SHARDS)
        table = rates("median of 3 runs each, in turn")
        row(table, "read all patches", "MB/s", *all_rows(cache))
        row(table, f"read shuffled batches of {BATCH}, patches", "MB/s", *batches(cache))
        Console().print(table)
    finally:
        store.close()


def bare(cache: FeatureCache, ranges: list[tuple[int, int, int]]) -> int:
    """Ask for (shard, first byte, number of bytes) and nothing else."""
    names = [(cache.path / cache.manifest.shards[shard].name).url for shard, _, _ in ranges]
    starts = [start for _, start, _ in ranges]
    stops = [start + length for _, start, length in ranges]
    store = fsspec.filesystem("s3", use_listings_cache=False)
    return sum(map(len, store.cat_ranges(names, starts, stops, on_error="raise")))


def all_rows(cache: FeatureCache) -> tuple[float, float]:
    """Bytes per second of all rows, in requests of the same size."""
    ranges = []
    for number, shard in enumerate(cache.manifest.shards):
        start, length = shard.offsets["patches"]
        ranges += [(number, start + at, min(PIECE, length - at)) for at in range(0, length, PIECE)]
    n_bytes = sum(length for _, _, length in ranges)
    return in_turn(n_bytes * MB, lambda: bare(cache, ranges), lambda: cache.read("patches"))


def batches(cache: FeatureCache) -> tuple[float, float]:
    """Bytes per second of batches of rows in random order."""
    order = np.random.default_rng(0).permutation(len(cache))
    row_bytes = cache.manifest.shards[0].offsets["patches"][1] // cache.manifest.shards[0].rows
    starts = np.array([shard.start for shard in cache.manifest.shards])
    split = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]

    def limit() -> None:
        for batch in split:
            rows = np.sort(batch)
            shards = np.searchsorted(starts, rows, "right") - 1
            firsts = [cache.manifest.shards[shard].offsets["patches"][0] for shard in shards]
            at = np.array(firsts) + (rows - starts[shards]) * row_bytes
            bare(cache, [(int(shard), int(first), row_bytes) for shard, first in zip(shards, at, strict=True)])

    def ours() -> None:
        for batch in split:
            cache.read("patches", batch)

    return in_turn(len(order) * row_bytes * MB, limit, ours)


if __name__ == "__main__":
    main()
