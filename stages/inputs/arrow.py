"""Text and numbers in columns of Arrow tables, such as Parquet files: as numpy has them, nulls included."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.errors import InputError


def scalars(source: str, name: str, column: Any) -> NDArray[Any]:
    """A column of text or numbers, [n]: str objects, integers or floats; None, or NaN among floats, where it is null.

    Args:
        source: begins the message of an error.
        name: of the column.
        column: a `pyarrow.ChunkedArray`.

    Raises:
        InputError: it holds something else.
    """
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if is_text(kind) or pa.types.is_null(kind):
        return np.array(column.to_pylist(), object)
    if pa.types.is_floating(kind):
        return np.asarray(column.to_numpy())
    if pa.types.is_integer(kind):
        return np.array(column.to_pylist(), object) if column.null_count else np.asarray(column.to_numpy())
    raise InputError(f"{source}: {name} is {kind}, must be text or whole numbers")


def is_text(kind: Any) -> bool:
    """Whether a type of Arrow is text."""
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view"
