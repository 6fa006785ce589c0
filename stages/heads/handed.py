"""A linear head's sums by a cluster, where rows are more than memory keeps: a group of blocks is an item.

Every step of the solver writes what is summed, the weights, once, and reads what became of every group, in their order:
bits do not depend on who computed it. A worker that dies costs the group that it was at.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from stages.context import Cluster
from stages.files.handed import HandedFolder, unpickled
from stages.files.tensors import read_handed, write_tensors
from stages.heads.summing import Here
from stages.heads.sums import BlockSum, FloatType, GivenRows, SummedElsewhere, Sums, n_groups


@dataclass(frozen=True)
class Others(Here):
    """A cluster, where rows do not fit into memory, and this process otherwise: the same bits.

    Attributes:
        cluster: does it.
        folder: that its workers see, for what they read and write.
    """

    cluster: Cluster
    folder: Path

    @contextmanager
    def _elsewhere(self, given: GivenRows) -> Iterator[SummedElsewhere]:
        with HandedFolder(self.folder) as folder:
            yield HandedRows(given, self.cluster, folder)


@dataclass(frozen=True)
class GroupItem:
    """A group of blocks to be summed.

    Attributes:
        rows: file of the rows, as plans.
        of: file of what is summed.
        dtype: what it is computed in.
        number: of the group.
        path: of the file that the sums go to.
    """

    rows: str
    of: str
    dtype: str
    number: int
    path: str

    def __str__(self) -> str:
        return f"group {self.number} of a linear head's rows"


def sum_item(item: GroupItem) -> None:
    """Sum one group in whatever process this is, which keeps what is summed for the next."""
    dtype: Any = np.dtype(item.dtype).type
    sums = _rows_of_process(item.rows).group(item.number, _sum_of_process(item.of), dtype)
    write_tensors(Path(item.path), {str(place): values for place, values in enumerate(sums)})


_rows_of_process, _sum_of_process = lru_cache(maxsize=1)(unpickled), lru_cache(maxsize=1)(unpickled)


class HandedRows:
    """Rows that others sum.

    Args:
        given: the rows.
        cluster: does it.
        folder: for as long as one head is fitted.
    """

    def __init__(self, given: GivenRows, cluster: Cluster, folder: HandedFolder) -> None:
        self._given, self._cluster, self._folder = given, cluster, folder
        self._rows, self._sums = "", 0

    def groups(self, of: BlockSum, dtype: FloatType) -> Iterator[Sums]:
        """As `stages.heads.sums.SummedElsewhere`.

        Raises:
            StageError: as `stages.context.Cluster.map`.
        """
        self._rows = self._rows or self._folder.file("rows", self._given)
        self._sums += 1  # a worker that was given up may still write: names are not used again
        asked = self._folder.file(f"sum-{self._sums}", of)
        items = [
            GroupItem(self._rows, asked, np.dtype(dtype).name, group, self._folder.path(f"{self._sums}-{group}"))
            for group in range(n_groups(len(self._given.labels)))
        ]
        for _ in self._cluster.map(sum_item, items):
            pass
        for item in items:
            found = read_handed(Path(item.path))
            yield [found[str(place)] for place in range(len(found))]
            Path(item.path).unlink()
        Path(asked).unlink()
