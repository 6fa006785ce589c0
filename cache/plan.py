"""plan_shards(): which inputs go into which shard. Pure, so that every run and every machine cuts alike."""

from dataclasses import dataclass

from cache.errors import CacheInvalidError


@dataclass(frozen=True)
class ShardPlan:
    """Inputs ``start`` to ``stop`` (exclusive) become shard ``index``."""

    index: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """File name of the shard.

        >>> ShardPlan(7, 0, 10).name
        'shard-00007.h5'
        """
        return f"shard-{self.index:05d}.h5"

    def __len__(self) -> int:
        return self.stop - self.start


def plan_shards(
    n_inputs: int, row_bytes: int, shard_bytes: int = 64 << 20, max_rows: int = 4096, multiple: int = 1
) -> tuple[ShardPlan, ...]:
    """Cut inputs into shards of bounded size.

    Every shard but the last holds the same number of inputs: the largest multiple of ``multiple`` (the compute
    batch, so that no batch spans two shards) within both bounds, and at least one multiple.

    Args:
        n_inputs: how many inputs there are.
        row_bytes: bytes of one input's features.
        shard_bytes: most bytes of features in a shard.
        max_rows: most rows in a shard.
        multiple: rows that are computed together.

    Raises:
        CacheInvalidError: for a negative count or a bound below 1.

    >>> plan_shards(10, row_bytes=100, shard_bytes=500, multiple=2)
    (ShardPlan(index=0, start=0, stop=4), ShardPlan(index=1, start=4, stop=8), ShardPlan(index=2, start=8, stop=10))
    """
    if n_inputs < 0 or min(row_bytes, shard_bytes, max_rows, multiple) < 1:
        raise CacheInvalidError(
            f"cannot plan shards: n_inputs {n_inputs} (at least 0), row_bytes {row_bytes}, "
            f"shard_bytes {shard_bytes}, max_rows {max_rows}, multiple {multiple} (at least 1)"
        )
    rows = max(min(shard_bytes // row_bytes, max_rows) // multiple, 1) * multiple
    starts = range(0, n_inputs, rows)
    return tuple(ShardPlan(index, start, min(start + rows, n_inputs)) for index, start in enumerate(starts))
