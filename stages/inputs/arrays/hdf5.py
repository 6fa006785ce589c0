"""``.h5``, ``.hdf5``: datasets by their path in the file, read by rows."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache import list_datasets, read_dataset
from stages.inputs.arrays.columns import ArrayFile, Column, reading_arrays


@dataclass(frozen=True)
class _Dataset:
    path: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        with reading_arrays(self.path):
            return read_dataset(self.path, self.name, start, stop)

    def release(self) -> None:
        """The file is open only while it is read."""


def open_hdf5(path: str) -> ArrayFile:
    """The datasets of a file, those of groups as ``group/name``; what it takes from other files is none of it."""
    with reading_arrays(path):
        datasets = list_datasets(path)
    return ArrayFile([path], {name: partial(_column, path, name, *about) for name, about in datasets.items()})


def _column(path: str, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], key: str) -> Column:
    return _Dataset(path, name, shape, dtype)
