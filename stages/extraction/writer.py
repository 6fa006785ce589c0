"""The rows of one shard on their way to the disk: gathered in memory, in any order, and written when all are there."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache import Failure, FeatureSpec, InputTable, ShardPlan, commit_shard


class Writer:
    """Gathers the rows of a shard; several threads may add some at the same time.

    Args:
        path: folder of the unfinished cache.
        plan: which of its shards.
        spec: what the features are.
        inputs: the plan's slice of the listing.
    """

    def __init__(self, path: str, plan: ShardPlan, spec: FeatureSpec, inputs: InputTable) -> None:
        self._path = path
        self._plan = plan
        self._inputs = inputs
        n, datasets = len(inputs), spec.datasets().items()
        self._arrays = {name: np.empty((n, *shape), dtype) for name, (shape, dtype) in datasets}
        self._digests = np.zeros((n, 32), dtype=np.uint8)
        self._reasons: dict[int, str] = {}

    def add_digests(self, at: NDArray[np.integer], digests: NDArray[np.uint8]) -> None:
        """SHA-256 ``[m, 32]`` of the inputs at some places of the shard."""
        self._digests[at] = digests

    def add_rows(self, at: Sequence[int] | NDArray[np.integer], rows: Mapping[str, NDArray[Any]]) -> None:
        """Features ``[m, …]`` of the inputs at some places of the shard."""
        for name, array in self._arrays.items():
            array[at] = rows[name]

    def add_failure(self, at: int, reason: str) -> None:
        """Why one of the inputs cannot be used."""
        self._reasons[at] = reason

    def commit(self) -> None:
        """Write the shard; what was added must be all of its inputs.

        Raises:
            CacheError: see `cache.commit_shard`.
        """
        failed = np.zeros(len(self._inputs), dtype=np.bool_)
        failed[list(self._reasons)] = True
        failures = [Failure(self._inputs.ids[index], self._reasons[index]) for index in sorted(self._reasons)]
        arrays = {name: array[~failed] for name, array in self._arrays.items()} if failures else self._arrays
        commit_shard(self._path, self._plan, arrays, self._inputs.with_results(self._digests, failed), failures)
