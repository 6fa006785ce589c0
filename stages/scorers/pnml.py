"""pNML: regret of a learner that could have seen the row's label."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from stages.scorers.base import ClassifierHead, Floats, ScoreInputs, Scorer
from stages.scorers.moments import RANK_RTOL, RankTolerance, float64_rows, moments_of, whitened

Matrix = NDArray[np.float64]
_SMALLEST = 1e-12  # probabilities are kept this far from 0 and 1: pytorch-ood's bound


def pnml_score(features: ArrayLike, weight: ArrayLike, bias: ArrayLike, whiten: ArrayLike) -> Floats:
    """The regret log Σ_c p_c / (p_c + (1 − p_c) p_c^κ) / log C, κ = h / (1 + h), h = z̄ᵀ(XᵀX)⁺z̄; higher = more OOD.

    Bibas et al., "Single Layer Predictive Normalized Maximum Likelihood for Out-of-Distribution Detection", NeurIPS
    2021. z̄ = z / ‖z‖, X the same of the ID training features, and p = softmax(W z̄ + b): the head sees z̄ as well.

    Args:
        features: [n, D], any float type; computed in float64.
        weight: [C, D] of the head.
        bias: [C].
        whiten: [D, r] with whiten · whitenᵀ = (XᵀX)⁺ (`stages.scorers.moments.Scatter.whitening`).

    Returns:
        [n] float32 in [0, 1]: 0 for a row that lies in all of X or that the head is sure of. With one class, 0.

    Raises:
        InputError: another D, NaN or inf.

    >>> pnml_score([[2.0, 0.0]], np.zeros((2, 2)), np.zeros(2), whiten=np.eye(2)).round(4)  # p = ½, κ = ½
    array([0.2284], dtype=float32)
    """
    whiten = np.asarray(whiten, dtype=np.float64)
    rows = float64_rows(features, normalise=True, dim=len(whiten))
    logits = rows @ np.asarray(weight, dtype=np.float64).T + np.asarray(bias, dtype=np.float64)
    if logits.shape[1] == 1:
        return np.zeros(len(rows), dtype=np.float32)
    p = np.clip(softmax(logits, axis=1), _SMALLEST, 1 - _SMALLEST)
    leverage = np.square(whitened(rows, whiten)).sum(axis=1, keepdims=True)
    terms = p / (p + (1 - p) * p ** (leverage / (1 + leverage)))
    return np.asarray(np.log(terms.sum(axis=1)) / np.log(logits.shape[1]), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Design:
    """The head, and the whitening [D, r] of the normalised ID training features."""

    head: ClassifierHead
    whiten: Matrix


@dataclass(eq=False)
class PNMLScorer(Scorer):
    """`pnml_score`.

    Attributes:
        rank_rtol: eigenvalues of XᵀX that are at most this share of the largest are left out of its pseudo-inverse.
            ``"float32"``: D times the rounding of float32, as torch's pseudo-inverse does for pytorch-ood.
    """

    name: ClassVar[str] = "pnml"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "head", "bank"})
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({"pytorch-ood": {"rank_rtol": "float32"}})

    rank_rtol: RankTolerance = RANK_RTOL

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> Design:
        """The head, and the pseudo-inverse of XᵀX."""
        moments = moments_of(train, self.name, normalise=True, by_class=False)
        return Design(train.need_head(self.name), moments.about(np.zeros(moments.dim)).whitening(self.rank_rtol))

    def judge(self, x: ScoreInputs, memory: Design) -> Floats:
        """Regret, [n]."""
        head = memory.head
        return pnml_score(x.need("features", self.name), head.weight, head.bias, memory.whiten)
