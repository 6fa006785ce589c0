"""Neighbours searched by other processes: blocks of queries in blocks of a bank, the best of the best put together.

::

    scores/neighbours/.blocks-<digest of bank, queries and k>/
        bank.npy      the bank as it was given; a worker keeps the block that it searches in
        queries.npy
        <block of the bank>-<block of queries>.safetensors    found; what is there is not searched anew

All of it is on the disk that workers share, and gone when the distances are there.
"""

import io
import os
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.files import arriving, write_all
from stages.context import Cluster
from stages.files.tensors import read_handed, write_tensors
from stages.id_data.lazy import Floats, Rows2D
from stages.scorers.neighbours.bank import QUERY_BLOCK, FeatureBank, RowsFound, merged_rows, top_rows
from stages.scorers.shared.arrays import checked_features, l2_normalise

BANK_ROWS = 1 << 17  # of a block, a multiple of 1024
QUERIES = 4 * QUERY_BLOCK  # of an item
_ROWS_AT_ONCE = 1 << 14  # that are written
LEAST_PAIRS = 1 << 28  # of queries and bank rows: fewer are searched in less time than workers need to start


@dataclass(frozen=True)
class SearchItem:
    """A block of queries to be searched in a block of a bank.

    Attributes:
        bank: file of the bank, ``[n, D]``.
        queries: file of the queries, ``[m, D]``.
        rows: first row of the block, and the one after its last.
        asked: the same of the queries.
        k: neighbours; fewer where the block has fewer rows.
        path: of the file that they go to.
    """

    bank: str
    queries: str
    rows: tuple[int, int]
    asked: tuple[int, int]
    k: int
    path: str

    def __str__(self) -> str:
        (first, stop), (begin, end) = self.asked, self.rows
        return f"queries {first} to {stop - 1} in rows {begin} to {end - 1} of {self.bank}"


def search_item(item: SearchItem) -> None:
    """Search one block in whatever process this is, which keeps the bank's block for the next."""
    unit, (start, stop) = _block_of_process(item.bank, *item.rows), item.asked
    queries = np.load(item.queries, mmap_mode="r")
    found = [
        top_rows(l2_normalise(queries[first : min(first + QUERY_BLOCK, stop)]), min(item.k, len(unit)), unit)
        for first in range(start, stop, QUERY_BLOCK)
    ]
    rows = np.concatenate([each[1] for each in found]) + item.rows[0]
    write_tensors(Path(item.path), {"cosine": np.concatenate([each[0] for each in found]), "rows": rows})


@lru_cache(maxsize=1)
def _block_of_process(path: str, start: int, stop: int) -> Floats:
    return l2_normalise(np.load(path, mmap_mode="r")[start:stop])


def cluster_distances(
    bank: FeatureBank,
    queries: NDArray[np.floating],
    k: int,
    cluster: Cluster,
    folder: Path,
    bank_rows: int = BANK_ROWS,
) -> Floats:
    """What `FeatureBank.by_blocks` gives, to the bit, searched by a cluster.

    Args:
        bank: that can be searched `in_blocks`.
        queries: [n, D].
        k: neighbours, at most the bank's rows.
        cluster: does it.
        folder: for what workers read and write, of this bank, these queries and this k alone.
        bank_rows: of a block, a multiple of 1024.

    Returns:
        Distances [n, k] float32, ascending.

    Raises:
        InputError: NaN or inf in a query.
        StageError: as `stages.context.Cluster.map`; what was found is kept.
    """
    features = checked_features(queries, "query")
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "bank.npy", folder / "queries.npy"
    for path, rows in zip(files, (bank.features, features), strict=True):
        if not path.exists():
            _write_array(path, rows)
    n, m = len(bank), len(features)
    blocks = [(start, min(start + bank_rows, n)) for start in range(0, n, bank_rows)]
    asked = [(start, min(start + QUERIES, m)) for start in range(0, m, QUERIES)]
    items = {
        (rows, own): SearchItem(
            str(files[0]), str(files[1]), rows, own, k, str(folder / f"{rows[0]:012d}-{own[0]:012d}.safetensors")
        )
        for rows in blocks
        for own in asked
    }
    for _ in cluster.map(search_item, (item for item in items.values() if not Path(item.path).exists())):
        pass
    distances = np.empty((m, k), dtype=np.float32)
    for start, stop in asked:
        found = merged_rows([_found(items[rows, (start, stop)]) for rows in blocks], k)
        distances[start:stop] = bank.measured(l2_normalise(features[start:stop]), *found)
    shutil.rmtree(folder)
    return distances


def _write_array(path: Path, rows: Rows2D) -> None:
    """A .npy file of rows that may be more than fit into memory; it arrives whole."""
    header = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False, "shape": rows.shape}
    np.lib.format.write_array_header_1_0(header, about)
    with arriving(path) as file:
        write_all(file, header.getvalue())
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            write_all(file, np.ascontiguousarray(rows[start : start + _ROWS_AT_ONCE]).reshape(-1).view(np.uint8).data)
        os.fsync(file.fileno())


def _found(item: SearchItem) -> RowsFound:
    stored = read_handed(Path(item.path))
    return stored["cosine"], stored["rows"]
