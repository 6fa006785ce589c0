"""What the scores that shape a row's activations share.

All of them were made for activations that are not negative, behind a ReLU. On the features of a ViT, which have both
signs, the sums below can cancel and these scores are weak; they are offered for comparison.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.scorers.shared.arrays import checked_features

_LARGEST_RATIO = 50.0  # exp(50) is 5e21: beyond it only rows get whose largest activations cancel, never ReLU's


def kept_count(n_values: int, percentile: float) -> int:
    """How many of D activations are above a percentile of them, by ASH's rounding; at least one.

    >>> kept_count(10, 65), kept_count(10, 99)
    (4, 1)
    """
    return max(1, n_values - round(n_values * percentile / 100))


def largest_mask(z: NDArray[np.floating], k: int) -> NDArray[np.bool_]:
    """[n, D] whether an activation is among its row's k largest; among equals the first ones are.

    >>> largest_mask(np.array([[3.0, 1.0, 3.0, 3.0]]), 2).tolist()
    [[True, False, True, False]]
    """
    smallest_kept = np.partition(z, -k, axis=1)[:, -k][:, None]
    kept = z >= smallest_kept
    tied = np.flatnonzero(np.count_nonzero(kept, axis=1) > k)  # at the border
    if tied.size:
        above, equal = z[tied] > smallest_kept[tied], z[tied] == smallest_kept[tied]
        room = k - np.count_nonzero(above, axis=1)[:, None]
        kept[tied] = above | (equal & (np.cumsum(equal, axis=1) <= room))
    return kept


def mass_ratio(all_of_it: NDArray[np.floating], kept: NDArray[np.floating]) -> NDArray[np.float64]:
    """s₁ / s₂, the sum of a row's activations by that of its largest, [n] each; 1 where both are 0, clipped to ±50.

    >>> mass_ratio(np.array([3.0, 0.0, 1.0]), np.array([2.0, 0.0, 0.0])).tolist()
    [1.5, 1.0, 50.0]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.asarray(all_of_it, dtype=np.float64) / kept
    ratio[(all_of_it == 0) & (kept == 0)] = 1
    return np.clip(ratio, -_LARGEST_RATIO, _LARGEST_RATIO)


def activations(features: ArrayLike, who: str) -> NDArray[np.float32]:
    """Features [n, D] as float32, checked.

    Raises:
        InputError: not two-dimensional, NaN or inf.
    """
    return np.asarray(checked_features(features, who), dtype=np.float32)
