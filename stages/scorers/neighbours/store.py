"""Distances to nearest neighbours that were searched before: another k then costs no search.

    <folder>/<digest of the bank>/<digest of the queries>.safetensors      distances [k_max, n] float32, nearest first

A file is found by what was searched for and in, so one that is there is right, as long as its bytes are those that were
written: each row has its own digest, so that one is read, compared, and no more.
"""

import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from cache import arrays_sha256, sha256
from stages.context import Cluster
from stages.files.tensors import write_tensors
from stages.scorers.neighbours.bank import FeatureBank
from stages.scorers.neighbours.cluster import LEAST_PAIRS, cluster_distances

_BLOCKS = ".blocks-"  # how folders of a search under way are called
KEPT = 200  # neighbours of each query whose distances are kept, or k where that is more


class NeighbourStore:
    """Searches banks, and remembers.

    Args:
        folder: where distances are kept.
        kept: how many neighbours of a query.
        cluster: searches where there are many rows; None: this process searches all, to the same bits.
        least_pairs: of queries and rows of a bank, how many are many.
    """

    def __init__(
        self, folder: Path, kept: int = KEPT, cluster: Cluster | None = None, least_pairs: int = LEAST_PAIRS
    ) -> None:
        self.folder = folder
        self.kept = kept
        self._cluster, self._least_pairs = cluster, least_pairs
        self._used: set[Path] = set()

    def distances(
        self, bank: FeatureBank, queries: NDArray[np.floating], k: int, first: int = 0
    ) -> NDArray[np.float32]:
        """Distances to the neighbours ``first`` to ``k`` (exclusive, the nearest is 0) of each query.

        Args:
            bank: where to search.
            queries: [n, D].
            k: at most the bank's rows.
            first: leaves out the nearer ones.

        Returns:
            [k − first, n] float32.

        Raises:
            InputError: as `FeatureBank.search`.
        """
        asked = arrays_sha256({"queries": queries})
        path = self.folder / bank.digest / f"{asked}.safetensors"
        self._used.add(path)
        stored = _read(path, first, k)
        if stored is not None and stored.shape == (k - first, len(queries)):
            return stored
        found = self._search(bank, queries, min(max(k, self.kept), len(bank)), asked).T
        write_tensors(path, {"distances": found, "digests": np.stack([_digest(row) for row in found])})
        return found[first:k]

    def _search(self, bank: FeatureBank, queries: NDArray[np.floating], k: int, asked: str) -> NDArray[np.float32]:
        if self._cluster is None or len(bank) * len(queries) < self._least_pairs or not bank.in_blocks:
            return bank.by_blocks(queries, k)
        folder = self.folder / f"{_BLOCKS}{sha256(f'{bank.digest} {asked} {k}'.encode())[:16]}"
        return cluster_distances(bank, queries, k, self._cluster, folder)

    def forget_others(self) -> None:
        """Remove what was not asked for since this object was made: banks and queries that are no more."""
        for folder in self.folder.glob(f"{_BLOCKS}*"):
            shutil.rmtree(folder, ignore_errors=True)
        for path in set(self.folder.glob("*/*.safetensors")) - self._used:
            path.unlink(missing_ok=True)
        for folder in self.folder.glob("*"):
            with suppress(OSError):  # not empty
                folder.rmdir()


def _read(path: Path, first: int, k: int) -> NDArray[np.float32] | None:
    """Rows of what is kept; None where there is no such file, they are damaged, or it has fewer."""
    try:
        with safe_open(path, "numpy") as file:
            kept, digests = file.get_slice("distances"), file.get_slice("digests")
            if kept.get_shape()[0] < k or kept.get_dtype() != "F32":
                return None
            found, expected = np.asarray(kept[first:k]), np.asarray(digests[first:k])
    except (OSError, SafetensorError):
        return None
    whole = all(np.array_equal(_digest(row), digest) for row, digest in zip(found, expected, strict=True))
    return found if whole else None


def _digest(row: NDArray[np.float32]) -> NDArray[np.uint8]:
    """``[32]`` SHA-256 of the distances of one rank."""
    return np.frombuffer(bytes.fromhex(arrays_sha256({"distances": row})), np.uint8)
