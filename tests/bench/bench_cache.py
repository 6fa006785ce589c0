"""How far the cache is from the disk, from memory and from the bare hash. ``make bench-cache``.

    write    commit_shard of 64 MiB of float16 / the same bytes by write and fsync, to the same disk
    read     shuffled batches of patches       / fancy indexing of a numpy.memmap of the same bytes in one file
    verify   FeatureCache.verify               / SHA-256 of the same bytes in memory, one core
    open     a cache of 10,000 shards, in seconds

and what gzip and lzf would cost on real features. The cache stands in the folder for temporary files (TMPDIR).
Prints medians of runs in turn and their ratio (1.00 is the limit). These are timings: nothing here is a test.
"""

import hashlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
from rich.console import Console
from rich.table import Table

from cache import (
    CacheBuilder,
    FeatureCache,
    FeatureSpec,
    InputSet,
    InputTable,
    Manifest,
    Place,
    ShardInfo,
    ShardPlan,
    commit_shard,
    plan_shards,
)
from stages.config import BackboneConfig
from stages.extract import extract_set
from stages.inputs.images import list_images
from stages.networks.backbone import load_backbone
from tests.bench.timing import in_turn, row

RUNS = 9
SHARDS_WRITTEN, SHARDS_READ, SHARDS_OPENED = 4, 7, 10_000
BATCH = 256
MB = 1e-6

VIT_S = FeatureSpec(  # at 224 px
    backbone="vit_small_patch14_dinov2",
    weights_sha="0",
    transform={},
    image_size=224,
    expert_blocks=1,
    patches="full",
    dtype="float16",
    cls_dim=384,
    tap_dim=384,
    n_registers=0,
    grid=(16, 16),
    compute={},
    semantics=1,
)


def main() -> None:
    """Measure and print."""
    console = Console()
    table = Table(title=f"median of {RUNS} runs each, in turn")
    for column in ("what", "unit", "limit", "ours", "ours / limit"):
        table.add_column(column, justify="left" if column in ("what", "unit") else "right")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        row(table, "write shards of 64 MiB", "MB/s", *writing(folder))
        cache = fill(folder / "read", SHARDS_READ)
        row(table, f"read shuffled batches of {BATCH}, patches", "MB/s", *reading(cache, folder / "flat"))
        row(table, "verify", "MB/s", *verifying(cache))
        seconds = opening(folder / "many")
        table.add_row(f"open a cache of {SHARDS_OPENED:,} shards", "s", "0.30", f"{seconds:.2f}", "")
        console.print(table)
        console.print(compression(folder))


def plans_of(n_shards: int) -> tuple[ShardPlan, ...]:
    """Shards of just under 64 MiB."""
    rows = len(plan_shards(10_000, VIT_S.row_bytes)[0])
    return plan_shards(n_shards * rows, VIT_S.row_bytes)


def arrays_of(plan: ShardPlan) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(plan.index)
    return {
        name: rng.standard_normal((len(plan), *shape), np.float32).astype(dtype)
        for name, (shape, dtype) in VIT_S.datasets().items()
    }


def begin(path: Place, n_shards: int) -> tuple[CacheBuilder, InputTable]:
    plans = plans_of(n_shards)
    zeros = np.zeros(plans[-1].stop, np.int64)
    inputs = InputTable.listing([f"class/{i:08d}.jpg" for i in range(len(zeros))], zeros, zeros, zeros)
    return CacheBuilder.begin(path, InputSet("bench", inputs, ["class"]), VIT_S, plans, {}), inputs


def fill(path: Place, n_shards: int) -> FeatureCache:
    builder, inputs = begin(path, n_shards)
    with builder:
        for plan in builder.pending():
            commit_shard(path, plan, arrays_of(plan), inputs[plan.start : plan.stop], [])
        return builder.seal()


def writing(folder: Path) -> tuple[float, float]:
    """Bytes of arrays per second, until they are on the disk."""
    arrays = [arrays_of(plan) for plan in plans_of(SHARDS_WRITTEN)]
    flat = [b"".join(array.tobytes() for array in shard.values()) for shard in arrays]
    builder, inputs = begin(folder / "written", SHARDS_WRITTEN)

    def raw() -> None:
        for number, data in enumerate(flat):
            with open(folder / f"written/shard-raw-{number}", "xb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())

    def ours() -> None:
        for plan, shard in zip(builder.plan.shards, arrays, strict=True):
            commit_shard(builder.path, plan, shard, inputs[plan.start : plan.stop], [])

    def remove() -> None:  # so that each run finds the same free memory
        for path in builder.path.glob("shard-*"):
            path.unlink()

    with builder:
        return in_turn(sum(map(len, flat)) * MB, raw, ours, RUNS, remove)


def reading(cache: FeatureCache, flat: Path) -> tuple[float, float]:
    """Bytes of patches per second, all of them in the page cache."""
    patches = cache.read("patches")
    patches.tofile(flat)
    mapped = np.memmap(flat, patches.dtype, "r", shape=patches.shape)

    def bare() -> None:
        order = np.random.default_rng(0).permutation(len(mapped))
        for start in range(0, len(order), BATCH):
            batch = mapped[order[start : start + BATCH]]
            batch[0, 0, 0] = 0

    def ours() -> None:
        for batch in cache.batches(["patches"], batch_size=BATCH, seed=0):
            batch["patches"][0, 0, 0] = 0

    return in_turn(patches.nbytes * MB, bare, ours, RUNS)


def verifying(cache: FeatureCache) -> tuple[float, float]:
    """Bytes per second."""
    data = b"".join(path.read_bytes() for path in sorted(cache.path.iterdir()))

    def ours() -> None:
        assert cache.verify() == []

    return in_turn(len(data) * MB, lambda: hashlib.sha256(data).digest(), ours, RUNS)


def opening(path: Path) -> float:
    """Seconds; only the manifest is there, since opening reads nothing else."""
    path.mkdir()
    rows = len(plans_of(1)[0])
    infos = [
        ShardInfo(plan.name, plan.start, rows, 67_000_000, f"{plan.index:064x}", plan.start, plan.stop)
        for plan in plan_shards(SHARDS_OPENED * rows, VIT_S.row_bytes)
    ]
    total = infos[-1].input_stop
    digest = "0" * 64
    Manifest("bench", VIT_S, ("class",), total, total, 0, digest, digest, digest, tuple(infos), {}).write(path)
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        FeatureCache.open(path)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def compression(folder: Path) -> Table:
    """HDF5's filters on float16 tokens of real images, a chunk per image."""
    backbone = load_backbone(BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=224))
    photos = list_images("sklearn:photos")
    cache = extract_set("photos", photos, backbone.feature_spec("float16", "full"), folder, lambda: backbone)
    tokens = cache.read("patches")
    table = Table(title=f"float16 tokens of {len(tokens)} photographs through h5py, a chunk per image")
    for column in ("compression", "size", "write MB/s", "read MB/s"):
        table.add_column(column, justify="left" if column == "compression" else "right")
    for name, options in (("none", {}), ("gzip-1", {"compression": "gzip", "compression_opts": 1}),
                          ("gzip-1 + shuffle", {"compression": "gzip", "compression_opts": 1, "shuffle": True}),
                          ("lzf", {"compression": "lzf"})):  # fmt: skip
        path = folder / "tokens.h5"
        start = time.perf_counter()
        with h5py.File(path, "w") as file:
            dataset = file.create_dataset("patches", data=tokens, chunks=(1, *tokens.shape[1:]), **options)
            stored = dataset.id.get_storage_size()
        written = time.perf_counter()
        with h5py.File(path) as file:
            assert np.array_equal(file["patches"][:], tokens)
        rates = (tokens.nbytes * MB / seconds for seconds in (written - start, time.perf_counter() - written))
        table.add_row(name, f"{stored / tokens.nbytes:.2f}", *(f"{rate:.0f}" for rate in rates))
    return table


if __name__ == "__main__":
    main()
