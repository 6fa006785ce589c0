"""A linear head: an affine map from features to logits, whoever fitted it."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from stages.errors import InputError

_Float = TypeVar("_Float", bound=np.floating[Any])


class Standardisation(NamedTuple):
    """``(x − mean) / scale``: mean ``[D]`` and scale ``[1]`` float32, the root of the mean variance of all features."""

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]

    def __call__(self, rows: NDArray[np.floating], dtype: type[_Float]) -> NDArray[_Float]:
        """Rows ``[n, D]``, of any float type, in the one that it is computed in."""
        standardised = rows.astype(dtype)
        standardised -= self.mean
        standardised /= self.scale
        return standardised


@dataclass(frozen=True, eq=False)
class LinearHead:
    """``logits = standardise(features) · weightᵀ + bias``.

    Attributes:
        weight: ``[C, D]``; rows of classes that were not fitted are zero.
        bias: ``[C]``; −inf for a class that does not apply: one without training rows, or outside an expert's group.
        standardise: of the rows that it was fitted on; None for a head on features as they are.
        converged: whether the solver came to the minimum; True where none was at work.

    >>> LinearHead(np.array([[1.0, 0.0], [1.0, 2.0]]), np.array([0.0, 1.0])).logits(np.array([[3.0, 1.0]])).tolist()
    [[3.0, 6.0]]
    """

    weight: NDArray[np.floating]
    bias: NDArray[np.floating]
    standardise: Standardisation | None = None
    converged: bool = field(default=True, kw_only=True)

    def logits(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """``[n, D]``, of any float type, to ``[n, C]``.

        Raises:
            InputError: features of another length than the weights.
        """
        if features.ndim != 2 or features.shape[1] != self.weight.shape[1]:
            raise InputError(f"features of shape {features.shape} given to a head on {self.weight.shape[1]} values")
        if self.standardise is None:
            rows = np.asarray(features, dtype=np.float32)
        else:
            rows = self.standardise(features, np.float32)
        return np.asarray(rows @ self.weight.T + self.bias, dtype=np.float32)

    def on_raw_features(self) -> "LinearHead":
        """The same map with shift and scale in weight and bias: itself where it has none."""
        if self.standardise is None:
            return self
        mean, scale = self.standardise
        weight = self.weight.astype(np.float64) / scale
        bias = self.bias - weight @ mean
        return LinearHead(np.asarray(weight, np.float32), np.asarray(bias, np.float32), converged=self.converged)

    def tensors(self) -> dict[str, NDArray[np.floating]]:
        """Arrays to store, by name: ``weight`` and ``bias``, after ``mean`` and ``scale`` where it has them."""
        own = {} if self.standardise is None else self.standardise._asdict()
        return own | {"weight": self.weight, "bias": self.bias}

    @property
    def classes(self) -> NDArray[np.intp]:
        """Numbers of the classes that apply, ascending."""
        return np.flatnonzero(np.isfinite(self.bias))

    def take(self, classes: NDArray[np.intp]) -> "LinearHead":
        """The head over some classes alone, in the order given."""
        return LinearHead(self.weight[classes], self.bias[classes], self.standardise, converged=self.converged)
