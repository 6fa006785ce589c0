"""Density of von Mises-Fisher distributions on the unit sphere, one for each class."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import ive, logsumexp

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.moments import FeatureMoments, Matrix, float64_rows, moments_of

_MANY = 100.0  # order of a Bessel function from which its expansion for large orders is good to 1e-10
_LENGTHS = (1e-3, 1 - 1e-6)  # between which a mean resultant length is taken: κ is 0 and infinite at 0 and 1
_ENOUGH_ROWS = 10  # of a class that gets a concentration of its own
NO_PAIR = "the concentration is as high as it may be, for no class has two rows"


def log_bessel(order: float, x: float) -> float:
    """log(e^−x · I_order(x)) of the modified Bessel function of the first kind, for x > 0.

    scipy's I_v underflows at the orders that D features have, D / 2 − 1. From `_MANY` on it is the uniform expansion
    for large orders, https://dlmf.nist.gov/10.41.E3, to its third term.

    >>> round(log_bessel(0.5, 2.0) - float(np.log(np.sqrt(1 / np.pi) * np.sinh(2.0) * np.exp(-2.0))), 12)
    0.0
    """
    if order < _MANY:
        return float(np.log(ive(order, x)))
    z = x / order
    root = np.sqrt(1 + z * z)
    t = 1 / root
    terms = (
        1.0,
        (3 * t - 5 * t**3) / 24 / order,
        (81 * t**2 - 462 * t**4 + 385 * t**6) / 1152 / order**2,
        (30375 * t**3 - 369603 * t**5 + 765765 * t**7 - 425425 * t**9) / 414720 / order**3,
    )
    exponent = order * (1 / (root + z) + np.log(z / (1 + root)))  # √(1 + z²) − z, which would cancel
    return float(exponent - 0.5 * np.log(2 * np.pi * order * root) + np.log(sum(terms)))


def concentration_of(length: float, dim: int) -> float:
    """κ whose mean resultant length is the given one: I_{D/2}(κ) / I_{D/2−1}(κ) = length, for a length in (0, 1).

    Banerjee et al., "Clustering on the Unit Hypersphere using von Mises-Fisher Distributions", JMLR 2005, approximate
    it by R·(D − R²) / (1 − R²); here it is solved. The ratio is less than κ / D, and κ less than R·D / (1 − R²).

    >>> round(concentration_of(1 / np.tanh(2.0) - 1 / 2.0, 3), 6)  # in three dimensions it is coth κ − 1 / κ
    2.0
    """

    def excess(kappa: float) -> float:
        return float(np.exp(log_bessel(dim / 2, kappa) - log_bessel(dim / 2 - 1, kappa))) - length

    return float(brentq(excess, dim * length, 2 * dim * length / (1 - length**2), rtol=1e-12))


@dataclass(frozen=True, eq=False)
class VonMisesFisher:
    """One von Mises-Fisher distribution a class, weighted by the share of rows that the class has.

    Attributes:
        shares: [C] π_c, adding up to 1.
        directions: [C, D] mean directions μ_c, of length 1.
        concentrations: [C] κ_c.
        log_constants: [C] log of C_D(κ_c)·e^κ_c, the density at the mean direction.
        remark: what to say of the concentrations; empty for nothing.
    """

    shares: Matrix
    directions: Matrix
    concentrations: Matrix
    log_constants: Matrix
    remark: str = ""

    @classmethod
    def of(cls, shares: ArrayLike, directions: ArrayLike, concentrations: ArrayLike, remark: str = "") -> Self:
        """From shares [C], directions [C, D] of any length, and concentrations [C], which may repeat."""
        directions, kappas = float64_rows(directions, normalise=True), np.asarray(concentrations, np.float64)
        order = directions.shape[1] / 2 - 1
        different, which = np.unique(kappas, return_inverse=True)
        constants = [
            order * np.log(kappa) - (order + 1) * np.log(2 * np.pi) - log_bessel(order, float(kappa))
            for kappa in different
        ]
        return cls(np.asarray(shares, np.float64), directions, kappas, np.asarray(constants)[which], remark)


def vmf_score(features: ArrayLike, mixture: VonMisesFisher) -> Floats:
    """−log Σ_c π_c C_D(κ_c) exp(κ_c·μ_cᵀz̄), z̄ = z / ‖z‖; higher = more OOD.

    The likelihood of hyperspherical features: Burapacheep and Li, "Your Classifier Can Be Secretly a Likelihood-Based
    OOD Detector", arXiv 2408.04851, 2024, who train for it, with one κ and equal shares; here it is fitted to features
    as they are.

    Args:
        features: [n, D], any float type; computed in float64.
        mixture: of the ID training rows.

    Returns:
        [n] float32.

    Raises:
        InputError: another D, NaN or inf.

    >>> vmf_score([[0.0, 3.0, 0.0]], VonMisesFisher.of([1.0], [[0.0, 1.0, 0.0]], [2.0])).round(4).tolist()
    [1.1261999607086182]
    """
    cosines = float64_rows(features, True, mixture.directions.shape[1]) @ mixture.directions.T
    exponents = mixture.log_constants + mixture.concentrations * (cosines - 1)
    return np.asarray(-logsumexp(exponents, b=mixture.shares, axis=1), dtype=np.float32)


@dataclass(eq=False)
class VMFScorer(Scorer):
    """`vmf_score`, by the mean directions of the ID training rows' classes.

    κ is that of the mean resultant length ρ. Of n rows of a class the length of their mean overstates it, by 1 / n in
    its square, which with few rows is nearly all of it; the mean cosine of two different rows is ρ² whatever n.

    Attributes:
        concentration: ``"shared"``: one κ, of the cosines of all pairs of rows that have one class. ``"class"``: each
            class its own, where it has ten rows or more.
    """

    name: ClassVar[str] = "vmf"
    title: ClassVar[str] = "vMF"
    says: ClassVar[str] = "minus the log density of one von Mises-Fisher distribution a class"
    paper: ClassVar[str] = "Burapacheep 2024"
    cost: ClassVar[str] = "C·D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "bank", "labels"})

    concentration: Literal["shared", "class"] = "shared"

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> VonMisesFisher:
        """Shares, mean directions and concentrations of the classes."""
        moments = moments_of(train, self.name, normalise=True, scatter=False)
        pairs = moments.counts * (moments.counts - 1.0)
        cosines = _cosines_of_pairs(moments)
        kappas = np.full(len(pairs), _concentration(cosines.sum(), pairs.sum(), moments.dim))
        if self.concentration == "class":
            for index in np.flatnonzero(moments.counts >= _ENOUGH_ROWS):
                kappas[index] = _concentration(cosines[index], pairs[index], moments.dim)
        remark = "" if pairs.any() else NO_PAIR
        return VonMisesFisher.of(moments.counts / len(moments), moments.class_means, kappas, remark)

    def judge(self, x: ScoreInputs, memory: VonMisesFisher) -> Floats:
        """Negative log density, [n]."""
        return vmf_score(x.need("features", self.name), memory)

    def facts(self, memory: VonMisesFisher) -> dict[str, Any]:
        """κ, the median where classes have their own."""
        return {"kappa": float(np.median(memory.concentrations))}

    def remark(self, memory: VonMisesFisher) -> str:
        """Whether there was anything to tell a concentration by."""
        return memory.remark


def _cosines_of_pairs(moments: FeatureMoments) -> Matrix:
    """Sum of the cosines of all ordered pairs of different rows of each class, [C]."""
    sums = moments.counts[:, None] * moments.class_means
    return np.einsum("cd,cd->c", sums, sums) - moments.counts


def _concentration(cosines: float, pairs: float, dim: int) -> float:
    """κ of the mean cosine of so many pairs of rows."""
    squared = cosines / pairs if pairs else 1.0
    return concentration_of(float(np.clip(np.sqrt(max(squared, 0.0)), *_LENGTHS)), dim)
