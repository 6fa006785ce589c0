"""``.parquet``: columns of lists of one length, read from front to back; labels and ids as they are."""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.errors import InputError
from stages.inputs.arrays.columns import ArrayFile, Blocks, Column, Held, Onwards, block_rows, reading_arrays
from stages.inputs.arrow import scalars


def open_parquet(path: str) -> ArrayFile:
    """The columns of a table."""
    with reading_arrays(path), pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: a column {name!r} stands in it twice")
    return ArrayFile([path], {name: partial(_column, path, name) for name in names})


def _column(path: str, name: str, key: str) -> Column:
    with reading_arrays(path), pq.ParquetFile(path) as file:
        if key in ("label", "id"):
            return Held(scalars(path, key, file.read(columns=[name])[name]))
        n = file.metadata.num_rows
        if n != sum(file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)):
            raise ValueError("its row groups do not have the rows of the file")
        first = next(file.iter_batches(1, columns=[name])).column(0) if n else None
        shape, dtype = _list_shape(path, key, file.schema_arrow.field(name).type, first)
        return Onwards((n, *shape), dtype, _scanning(path, name, key, shape, dtype))


def _list_shape(path: str, key: str, kind: Any, first: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape of a row, from the type, or else from the first row; and dtype."""
    shape = []
    while pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if pa.types.is_fixed_size_list(kind):
            shape.append(kind.list_size)
        else:
            shape.append(len(first[0]) if first is not None and len(first) and first[0].is_valid else 0)
        first, kind = None if first is None else first.flatten(), kind.value_type
    if not pa.types.is_floating(kind):
        raise InputError(f"{path}: {key} is {kind}, must be a list of float16, float32 or float64")
    return tuple(shape), np.dtype(kind.to_pandas_dtype())


def _scanning(path: str, name: str, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Callable[[], Blocks]:
    def begin() -> Blocks:
        import pyarrow.compute as pc  # for those alone who read lists: it takes long to import

        start, rows = 0, block_rows(prod(shape) * dtype.itemsize)
        # Without a buffer size a whole row group is read at once.
        with reading_arrays(path), pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            for batch in file.iter_batches(rows, columns=[name]):
                array = batch.column(0)
                for size in shape:
                    wrong = pc.list_value_length(array).fill_null(-1).to_numpy() != size
                    if wrong.any():
                        row = start + int(wrong.argmax()) * len(batch) // len(array)
                        raise InputError(f"{path}: {key} of row {row} is no list of {size} values, as row 0 is")
                    array = array.flatten()
                if array.null_count:
                    raise InputError(f"{path}: {key} has empty values in rows {start} to {start + len(batch) - 1}")
                yield array.to_numpy(zero_copy_only=False).reshape(len(batch), *shape)
                start += len(batch)

    return begin
