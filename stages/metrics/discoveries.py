"""Which of many hypotheses are rejected together, the false discovery rate held."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.errors import InputError

# A p-value and its bound are ratios of small whole numbers: they are equal, or differ by far more than this, and the
# bound as computed may be the last bit below the p-value that it equals.
_ROUNDING = 1 + 1e-12


def discoveries(p_values: ArrayLike, rate: float) -> NDArray[np.bool_]:
    """Which hypotheses Benjamini and Hochberg (JRSS B 1995) reject: all up to the last p ≤ rate · rank / m.

    Args:
        p_values: ``[m]``; m may be 0.
        rate: of false discoveries, on average at most; inside (0, 1).

    Returns:
        ``[m]``, true where rejected.

    Raises:
        InputError: a rate outside (0, 1).

    >>> discoveries([0.01, 0.9, 0.02, 0.04], 0.05).tolist()
    [True, False, True, False]
    """
    if not 0 < rate < 1:
        raise InputError(f"a false discovery rate of {rate} given, must be a share between 0 and 1")
    p = np.asarray(p_values, dtype=np.float64)
    ordered = np.sort(p)
    below = np.flatnonzero(ordered <= rate * np.arange(1, len(p) + 1) / max(len(p), 1) * _ROUNDING)
    return np.asarray(p <= (ordered[below[-1]] if len(below) else -1.0))
