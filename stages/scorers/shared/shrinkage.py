"""Shrinkage of a covariance that has few rows towards a multiple of the identity, from streamed moments.

The inverse of the covariance of n rows blows up the directions in which they happen to vary little, and the
pseudo-inverse does not look at those in which they do not vary at all: with fewer rows than features an OOD row outside
of the ID rows' plane may be nearer to their mean than any ID row. (1 − a)·S + a·μ·I, μ the mean variance, has neither
fault; a is the intensity.

Where. Held-out Gaussian log-likelihood of ID rows (EfficientNet's features of Tiny-ImageNet and Caltech-101, 20 to
1,280 of them, and scikit-learn's digits) prefers the shrunk covariance wherever there are fewer than 10 rows a feature,
by 0.01 to 0.1 nats a feature at 5 to 10 and by 0.2 to 20 at 1 to 3, and is indifferent beyond 15 (differences of 0.005
of either sign). From there on the covariance is the papers' own.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.scorers.inputs import ScoreInputs
from stages.scorers.shared.moments import FeatureMoments, Scatter, fourth_moment

ENOUGH_ROWS = 10  # a feature; see above
FEW_ROWS = f"the covariance is shrunk, for there are fewer than {ENOUGH_ROWS} rows a feature"
ShrinkageRule = Literal["auto", "ledoit-wolf", "oas", "none"]
_ROUNDING = (4 * np.finfo(np.float64).eps) ** 2  # of a sum of squares, in units of the rows' own


class Shrunk(NamedTuple):
    """A scatter matrix that may be inverted.

    Attributes:
        scatter: not divided by the number of rows.
        intensity: share of it that is the multiple of the identity; None where nothing was shrunk.
        varies: False where no two rows around one mean differ: then it is the identity times the variance of all rows.
    """

    scatter: Scatter
    intensity: float | None
    varies: bool = True

    @property
    def remark(self) -> str:
        """What to say of it; empty where it is the rows' own."""
        if not self.varies:
            return "distances are Euclidean, for there are no two rows around one mean that differ"
        return "" if self.intensity is None else FEW_ROWS


def is_scarce(n: int, n_means: int, dim: int) -> bool:
    """Whether a covariance of n rows around means taken of them is better shrunk."""
    return n - n_means < ENOUGH_ROWS * dim


def shrunk_scatter(train: ScoreInputs, who: str, moments: FeatureMoments, rule: ShrinkageRule = "auto") -> Shrunk:
    """The scatter of ID training rows around their class means, shrunk by a rule.

    Args:
        train: the rows that the moments are of; read once more for Ledoit and Wolf's intensity alone.
        who: the score that needs it, for messages.
        moments: of these rows.
        rule: ``"auto"``: Ledoit and Wolf's where rows are scarce, else none; ``"none"`` leaves it whatever it is.
    """
    # With the moments themselves, which stay for as long as what is known by their number.
    _, shrunk = train.remembered(
        (Shrunk, id(moments), rule), lambda: (moments, _shrunk_scatter(train, who, moments, rule))
    )
    return shrunk


def _shrunk_scatter(train: ScoreInputs, who: str, moments: FeatureMoments, rule: ShrinkageRule) -> Shrunk:
    n, dim = len(moments), moments.dim
    if rule == "none":
        return Shrunk(moments.within, None)
    if not varies(moments.within, moments):
        whole = moments.total
        return _round(whole.trace() if varies(whole, moments) else float(n * dim), dim)
    if rule == "auto" and not is_scarce(n, len(moments.classes), dim):
        return Shrunk(moments.within, None)
    if n - len(moments.classes) < 2:  # two rows around their mean are one row twice: chance looks like variance
        return _mixed(moments.within, 1.0)
    return _mixed(moments.within, _intensity(moments.within, n, rule, lambda: fourth_moment(train, who, moments)))


def shrunk_towards(
    target: NDArray[np.float64], covariance: NDArray[np.float64], train: ScoreInputs, who: str, moments: FeatureMoments
) -> NDArray[np.float64]:
    """A class's covariance moved towards another, [D, D], by Ledoit and Wolf's intensity for that target.

    Friedman, "Regularized Discriminant Analysis", Journal of the American Statistical Association, 1989, shrinks class
    covariances towards the pooled one; here the intensity needs no trials.

    Args:
        target: [D, D], what the class is like where its rows do not say.
        covariance: [D, D] of the class's rows.
        train: these rows, read once more.
        who: the score that needs it, for messages.
        moments: of these rows.
    """
    n = len(moments)
    apart = float(np.square(covariance - target).sum())
    if (
        n < 3 or not apart > 0 or not varies(moments.within, moments)
    ):  # two rows around their mean are one row twice: chance looks like variance
        return target
    by_chance = (fourth_moment(train, who, moments) / n - float(np.square(covariance).sum())) / n
    intensity = min(max(by_chance, 0.0) / apart, 1.0)
    return (1 - intensity) * covariance + intensity * target


def shrunk_about_zero(moments: FeatureMoments, rule: ShrinkageRule = "auto") -> Shrunk:
    """The same of second moments around 0 of normalised rows, whose fourth moment is their second.

    Args:
        moments: of rows of length 1, or 0.
        rule: as in `shrunk_scatter`.
    """
    n, scatter = len(moments), moments.about(np.zeros(moments.dim))
    if rule == "none":
        return Shrunk(scatter, None)
    if not scatter.trace() > 0:
        return _round(float(n * moments.dim), moments.dim)
    if rule == "auto" and not is_scarce(n, 0, moments.dim):
        return Shrunk(scatter, None)
    return _mixed(scatter, _intensity(scatter, n, rule, scatter.trace))


def _round(trace: float, dim: int) -> Shrunk:
    """The same in every direction."""
    return Shrunk(Scatter(dim).add(np.sqrt(trace / dim) * np.eye(dim)), 1.0, varies=False)


def _mixed(scatter: Scatter, intensity: float) -> Shrunk:
    return Shrunk(scatter.shrunk(intensity), intensity)


def _intensity(scatter: Scatter, n: int, rule: ShrinkageRule, fourth: Callable[[], float]) -> float:
    return oas_intensity(scatter, n) if rule == "oas" else ledoit_wolf_intensity(scatter, n, fourth())


def varies(scatter: Scatter, moments: FeatureMoments) -> bool:
    """Whether a scatter of the rows of these moments is more than the rounding of their sums."""
    squares = moments.within.trace() + float(moments.counts @ np.square(moments.class_means).sum(axis=1))
    return bool(scatter.trace() > _ROUNDING * squares)


def ledoit_wolf_intensity(scatter: Scatter, n: int, fourth: float) -> float:
    """The share of μ·I with the least expected squared error, in [0, 1].

    Ledoit and Wolf, "A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices", Journal of Multivariate
    Analysis, 2004; what ``sklearn.covariance.ledoit_wolf`` gives for the same rows, ``assume_centered=True``.

    Args:
        scatter: Σ rᵀr of rows r.
        n: rows.
        fourth: Σ ‖r‖⁴.

    >>> ledoit_wolf_intensity(Scatter(2).add(np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])), 3, 1 + 16 + 81)
    1.0
    """
    if scatter.dim == 1:  # one number is the identity times itself
        return 0.0
    squares = scatter.squared_norm() / n**2  # ‖S‖²
    from_target = squares - (scatter.trace() / n) ** 2 / scatter.dim  # ‖S − μI‖²
    by_chance = min((fourth / n - squares) / n, from_target)
    return by_chance / from_target if by_chance > 0 else 0.0


def oas_intensity(scatter: Scatter, n: int) -> float:
    """The same for normal rows, by the oracle approximating estimator, in [0, 1].

    Chen et al., "Shrinkage Algorithms for MMSE Covariance Estimation", IEEE Transactions on Signal Processing, 2010;
    what ``sklearn.covariance.oas`` gives for the same rows, ``assume_centered=True``.

    Args:
        scatter: Σ rᵀr of rows r.
        n: rows.

    >>> oas_intensity(Scatter(2).add(np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])), 3)
    1.0
    """
    if scatter.dim == 1:  # one number is the identity times itself
        return 0.0
    mean_square = scatter.squared_norm() / (n * scatter.dim) ** 2
    variance_squared = (scatter.trace() / (n * scatter.dim)) ** 2
    spread = (n + 1) * (mean_square - variance_squared / scatter.dim)
    return min((mean_square + variance_squared) / spread, 1.0) if spread > 0 else 1.0
