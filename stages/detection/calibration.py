"""Scores onto one scale, from the calibration rows: held-out ID that nothing else was fitted on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.errors import InputError
from stages.metrics.ranking import checked_scores

_MAD_TO_STD = 1.4826  # the median absolute deviation of a normal distribution is its σ / 1.4826
_PSEUDO_ROWS = 10  # an expert with so many calibration rows weighs its own median and MAD as much as everybody's


@dataclass(frozen=True)
class Standardiser:
    """Mean and standard deviation of a score on the calibration rows; makes scores of different kinds addable."""

    mean: float
    std: float

    @classmethod
    def fit(cls, scores: ArrayLike) -> Self:
        """From calibration scores [n]; a constant score, as one row's, gets std 1: it adds and breaks nothing.

        Raises:
            InputError: no rows, NaN or inf.
        """
        values = checked_scores(scores, "calibration")
        mean, std = float(values.mean()), float(values.std())
        varies = std > np.finfo(np.float32).eps * np.abs(values).max()  # more than the last bit of a float32 score
        return cls(mean, std if varies else 1.0)

    @classmethod
    def remark(cls, n: int) -> str:
        """What to say of a sum that is standardised on n rows; empty for nothing."""
        return "its parts are added in units of their own, for one row tells no deviation" if n < 2 else ""

    def apply(self, scores: ArrayLike) -> NDArray[np.float32]:
        """Scores [n] in standard deviations above the calibration mean, float32."""
        values = np.asarray(scores, dtype=np.float64)
        return np.asarray((values - self.mean) / self.std, dtype=np.float32)


def sum_scores(parts: Sequence[ArrayLike], standardisers: Sequence[Standardiser]) -> NDArray[np.float32]:
    """Sum of several scores of the same rows, each standardised: ``knn+energy`` and the like, [n] float32.

    >>> sum_scores([[1.0, 3.0], [0.0, 10.0]], [Standardiser(1, 2), Standardiser(0, 10)]).tolist()
    [0.0, 2.0]
    """
    scaled = [standardiser.apply(part) for part, standardiser in zip(parts, standardisers, strict=True)]
    return np.asarray(np.sum(scaled, axis=0), dtype=np.float32)


@dataclass(frozen=True)
class ExpertCalibration:
    """Centre and scale of a score for each expert: scores of different experts are not on one scale.

    Median and 1.4826·MAD of the expert's calibration rows, drawn towards those of all rows where it has few:
    with n rows, its own count n / (n + 10). The map is affine, so no two scores of an expert become tied.
    """

    centre: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def fit(cls, scores: ArrayLike, expert: NDArray[np.integer], n_experts: int) -> Self:
        """From calibration scores [n] and the expert that each row was routed to [n].

        Raises:
            InputError: no rows, NaN or inf, or an expert outside 0 … n_experts − 1.
        """
        values = checked_scores(scores, "calibration")
        _check_expert(expert, len(values), n_experts)
        all_centre, all_scale = _median_and_scale(values)
        # Where more than half of all scores tie, MAD is 0: the standard deviation, or 1 where all tie, stands in.
        all_scale = all_scale or float(values.std()) or 1.0
        centres, scales = [], []
        for e in range(n_experts):
            own = values[expert == e]
            centre, scale = _median_and_scale(own) if own.size else (all_centre, all_scale)
            weight = own.size / (own.size + _PSEUDO_ROWS)
            centres.append(weight * centre + (1 - weight) * all_centre)
            scales.append(weight * scale + (1 - weight) * all_scale)
        return cls(tuple(centres), tuple(scales))

    def apply(self, scores: ArrayLike, expert: NDArray[np.integer]) -> NDArray[np.float32]:
        """Scores [n] in units of their expert's scale above its centre, float32."""
        values = np.asarray(scores, dtype=np.float64)
        _check_expert(expert, len(values), len(self.centre))
        centre, scale = np.array(self.centre)[expert], np.array(self.scale)[expert]
        return np.asarray((values - centre) / scale, dtype=np.float32)


def _median_and_scale(values: NDArray[np.float64]) -> tuple[float, float]:
    median = float(np.median(values))
    return median, _MAD_TO_STD * float(np.median(np.abs(values - median)))


def _check_expert(expert: NDArray[np.integer], n: int, n_experts: int) -> None:
    if expert.shape != (n,):
        raise InputError(f"{n} scores, but experts of shape {expert.shape}; one expert a row expected")
    if n and not 0 <= expert.min() <= expert.max() < n_experts:
        raise InputError(f"experts {expert.min()} to {expert.max()} given, there are 0 to {n_experts - 1}")
