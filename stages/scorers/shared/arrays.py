"""Features, logits and labels as scores compute with them: checked, and refused where they mean nothing."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.errors import InputError, NotFiniteError
from stages.id_data.lazy import Rows2D

_BLOCK = 4096  # rows of a file that are looked at together


def checked_features(features: ArrayLike, which: str) -> NDArray[np.floating]:
    """``features`` as a float array [n, D].

    Raises:
        InputError: says what is wrong with the ``which`` rows.
    """
    array = np.asarray(features)  # of a memory-mapped array, the same bytes
    if array.ndim != 2:
        raise InputError(f"{which} features have shape {array.shape}; rows and columns expected")
    if not np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float32)
    refuse_not_finite(array, which)
    return array


def refuse_not_finite(features: Rows2D, which: str) -> None:
    """Refuse features [n, D] that hold NaN or inf.

    Raises:
        NotFiniteError: with how many of the ``which`` rows, and the first.
    """
    blocks = (np.asarray(features[start : start + _BLOCK]) for start in range(0, len(features), _BLOCK))
    finite = [np.isfinite(block).all(axis=1) for block in blocks]
    bad = np.flatnonzero(~np.concatenate(finite)) if finite else np.empty(0)
    if bad.size:
        raise NotFiniteError(f"{bad.size} of {len(features)} {which} features hold NaN or inf, row {bad[0]} first")


def l2_normalise(features: ArrayLike) -> NDArray[np.float32]:
    """Every row divided by its Euclidean norm; a zero row stays zero.

    Args:
        features: [n, D], any float type.

    Returns:
        [n, D] float32, C-contiguous, a new array.

    >>> l2_normalise([[3.0, 4.0], [0.0, 0.0]]).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    rows = np.asarray(features)
    # In float64: the squares of float16 and float32 values neither overflow nor vanish.
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    zero = ~(norms > 0)
    norms[zero] = 1  # with ``where`` numpy divides value by value
    unit = np.divide(rows, norms[:, None], out=np.empty(rows.shape, dtype=np.float32), casting="same_kind")
    unit[zero] = 0
    return unit


def labels_within(labels: NDArray[np.integer], n_classes: int, who: str) -> NDArray[np.integer]:
    """Labels [n], unknown ones (negative) included.

    Raises:
        InputError: one beyond the classes that there are logits of.
    """
    labels = np.asarray(labels)
    if len(labels) and labels.max() >= n_classes:
        raise InputError(
            f"{who}: ID rows of class {labels.max()}, but logits of {n_classes} classes, 0 to {n_classes - 1}"
        )
    return labels


def scaled_logits(logits: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """``logits / temperature`` as float64 [n, C], checked.

    Raises:
        InputError: not two-dimensional, a temperature that is not positive, NaN or +inf, a row of −inf alone.
    """
    if not (0 < temperature < np.inf):
        raise InputError(f"temperature = {temperature} given, must be greater than 0")
    return np.asarray(checked_logits(logits), dtype=np.float64) / temperature


def checked_logits(logits: ArrayLike) -> NDArray[np.floating]:
    """``logits`` as a float array [n, C], the same bytes where they are one.

    Raises:
        InputError: not two-dimensional, NaN or +inf, a row of −inf alone.
    """
    array = np.asarray(logits)
    if array.ndim != 2 or array.shape[1] == 0:
        raise InputError(f"logits have shape {array.shape}; one row a sample, one column a class expected")
    if not np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(array.max(axis=1)))  # NaN and +inf come through max; −inf alone stays −inf
    if bad.size:
        raise NotFiniteError(
            f"{bad.size} of {len(array)} rows of logits hold NaN, +inf or −inf alone, row {bad[0]} first"
        )
    return array
