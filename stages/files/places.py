"""Objects as bytes for another process that sees the same files: what is mapped from a file goes as its place there."""

import io
import mmap
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def dumped(value: object) -> bytes:
    """A pickle in which arrays that are mapped from a file, or parts of such, are where they stand and not their bytes.

    >>> import tempfile
    >>> path = tempfile.mkstemp()[1]
    >>> np.arange(1000.0).tofile(path)
    >>> some = np.asarray(np.memmap(path, np.float64, "r"))[10:]
    >>> len(dumped(some)) < 500, pickle.loads(dumped(some))[0]
    (True, np.float64(10.0))
    """
    file = io.BytesIO()
    _Places(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


class _Places(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        place = _place(value) if isinstance(value, np.ndarray) and value.flags.c_contiguous else None
        return NotImplemented if place is None else (map_again, (*place, value.dtype, value.shape))


def _place(array: Any) -> tuple[str, int] | None:
    """The file that an array is mapped from, and where in it the array begins; None where it is in memory."""
    address = array.__array_interface__["data"][0]
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap) and array.filename is not None:
            mapped: Any = array
            whole = np.frombuffer(mapped._mmap, np.uint8)  # from a page's beginning on
            begins = mapped.offset - mapped.offset % mmap.ALLOCATIONGRANULARITY
            return str(Path(mapped.filename).absolute()), begins + address - whole.__array_interface__["data"][0]
        array = array.base
    return None


def map_again(path: str, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """An array that stands in a file, mapped and read-only."""
    return np.asarray(np.memmap(path, dtype, "r", offset, shape))
