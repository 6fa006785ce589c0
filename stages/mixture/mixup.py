"""Dynamic-β Mixup (Zhao et al., ICCV 2025): harder classes are mixed more. In feature space here, of images elsewhere.

λ_i ~ Beta(α_i, α_i), α_i = α_min + d_i^p · (α_max − α_min), d_c = 1 − (acc_c − min acc) / (max acc − min acc).
α → 0 leaves λ at 0 or 1 (no mixing), α = 1 is uniform, a larger α moves λ towards ½.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


class Mixing(NamedTuple):
    """Who is mixed with whom, and how much."""

    lam: NDArray[np.float32]  # (B,) share of the row itself; 1 − λ is its partner's
    partner: NDArray[np.int64]  # (B,) row that it is mixed with


def class_difficulty(accuracy: NDArray[np.floating]) -> NDArray[np.float64]:
    """Accuracy per class ``[C]`` to difficulty in [0, 1]; all equal gives 0 for all.

    >>> class_difficulty(np.array([0.5, 0.75, 1.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    accuracy = np.asarray(accuracy, dtype=np.float64)
    span = accuracy.max() - accuracy.min()
    return np.zeros_like(accuracy) if span == 0 else 1 - (accuracy - accuracy.min()) / span


def class_alpha(
    accuracy: NDArray[np.floating], alpha_min: float, alpha_max: float, power: float = 1.0
) -> NDArray[np.float64]:
    """Beta parameter per class ``[C]``: α_min for the easiest, α_max for the hardest.

    >>> class_alpha(np.array([0.5, 0.75, 1.0]), alpha_min=0.1, alpha_max=1.1).tolist()
    [1.1, 0.6, 0.1]
    """
    return alpha_min + class_difficulty(accuracy) ** power * (alpha_max - alpha_min)


def running_accuracy(
    previous: NDArray[np.float64] | None,
    correct: NDArray[np.number],
    count: NDArray[np.integer],
    momentum: float = 0.7,
) -> NDArray[np.float64]:
    """Exponential moving average of the smoothed accuracy per class, (correct + 1) / (n + 2).

    Args:
        previous: ``[C]`` of the epoch before; None at the first.
        correct: ``[C]`` rows of each class that were classified right.
        count: ``[C]`` rows of each class.
        momentum: weight of the past.
    """
    now = np.asarray((correct + 1) / (count + 2), dtype=np.float64)
    return now if previous is None else momentum * previous + (1 - momentum) * now


class Strength(Protocol):
    """How strongly rows may be mixed, as settings of a training have it."""

    @property
    def alpha_min(self) -> float:
        """α of the easiest class."""

    @property
    def alpha_max(self) -> float:
        """α of the hardest."""

    @property
    def alpha_power(self) -> float:
        """p: above 1 the hardest classes alone are mixed more."""


def next_alpha(history: Sequence[Mapping[str, Any]], n_classes: int, strength: Strength) -> NDArray[np.float64]:
    """α per class ``[C]`` of the epoch after those of a history, by its last ``accuracy``; α_min before the first."""
    known = np.asarray(history[-1]["accuracy"]) if history else np.zeros(n_classes)
    return class_alpha(known, strength.alpha_min, strength.alpha_max, strength.alpha_power)


def next_accuracy(
    history: Sequence[Mapping[str, Any]], correct: NDArray[np.number], count: NDArray[np.integer]
) -> list[float]:
    """Running accuracy per class ``[C]`` after one more epoch: the ``accuracy`` of its record.

    Rounded as the record has it: a resumed run reads it there, and must go on with the same numbers.

    Args:
        history: records of the epochs before.
        correct: ``[C]`` held-out rows of each class that were classified right.
        count: ``[C]`` of all.
    """
    before = np.asarray(history[-1]["accuracy"]) if history else None
    accuracy: list[float] = np.round(running_accuracy(before, correct, count), 6).tolist()
    return accuracy


def mixing_weight(alpha: NDArray[np.floating], rng: np.random.Generator) -> NDArray[np.float64]:
    """λ ~ Beta(α, α) of each row ``[B]``: its own share, 1 − λ is its partner's; α = 0 gives 1."""
    alpha = np.asarray(alpha, dtype=np.float64)
    return np.where(alpha > 0, rng.beta(np.maximum(alpha, 1e-8), np.maximum(alpha, 1e-8)), 1.0)


def draw_mixing(alpha: NDArray[np.floating], rng: np.random.Generator) -> Mixing:
    """λ and partner of each row of a batch that goes to one expert, the partners a permutation of it.

    Args:
        alpha: ``[B]`` Beta parameter of each row; a pair takes its first row's. 0 leaves a row as it is.
        rng: draws λ and the partners.
    """
    lam = mixing_weight(alpha, rng)
    return Mixing(lam.astype(np.float32), rng.permutation(len(lam)))


def interpolate(first: "Tensor", second: "Tensor", lam: "Tensor") -> "Tensor":
    """λ · first + (1 − λ) · second, with λ ``[B]`` for each row of ``[B, …]``."""
    weight = lam.view(-1, *[1] * (first.ndim - 1))
    return weight * first + (1 - weight) * second
