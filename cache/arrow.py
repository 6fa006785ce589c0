"""Columns of Arrow tables from numpy arrays and text, and back.

By their buffers: `pyarrow.array` and ``to_numpy`` look whether they have to do with something of pandas, and import it
for that where it is installed, which takes half a second.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # it takes a moment, and who only names what a cache holds needs none of it
    import pyarrow as pa


def column_of_numbers(values: NDArray[Any]) -> "pa.Array":
    """A column ``[n]`` of the array's own type: integers or floats."""
    import pyarrow as pa

    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def column_of_text(values: Sequence[str]) -> "pa.Array":
    """A column ``[n]`` of strings, which are 2 GiB at most."""
    import pyarrow as pa

    data = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, data)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(data), pa.py_buffer(ends), pa.py_buffer(b"".join(data)))


def column_values(column: "pa.ChunkedArray") -> NDArray[Any]:
    """``[n]`` of a column of integers or floats without an empty cell; read-only."""
    numbers: NDArray[Any] = np.from_dlpack(column.combine_chunks())
    return numbers
