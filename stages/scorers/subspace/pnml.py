"""pNML: regret of a learner that could have seen the row's label."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.heads.affine import LinearHead
from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.moments import RANK_RTOL, Matrix, RankTolerance, float64_rows, moments_of, whitened
from stages.scorers.shared.shrinkage import ShrinkageRule, shrunk_about_zero
from stages.scorers.shared.softmax import ALONE, Softmax, finite_log, log_of_log1p, log_sum


def pnml_score(features: ArrayLike, weight: ArrayLike, bias: ArrayLike, whiten: ArrayLike) -> Floats:
    """log(Γ), Γ = log Σ_c p_c / (p_c + (1 − p_c) p_c^κ) / log C, κ = h / (1 + h), h = z̄ᵀ(XᵀX)⁺z̄; higher = more OOD.

    Bibas et al., "Single Layer Predictive Normalized Maximum Likelihood for Out-of-Distribution Detection", NeurIPS
    2021, whose score is the regret Γ; its logarithm has the same order, and keeps it where the head is sure.
    z̄ = z / ‖z‖, X the same of the ID training features, and p = softmax(W z̄ + b): the head sees z̄ as well.
    pytorch-ood clips p at 1e-12 first.

    Args:
        features: [n, D], any float type; computed in float64.
        weight: [C, D] of the head.
        bias: [C].
        whiten: [D, r] with whiten · whitenᵀ = (XᵀX)⁺ (`stages.scorers.shared.moments.Scatter.whitening`).

    Returns:
        [n] float32, at most 0: the smaller the more a row lies in all of X or the surer the head is of it. −36.7 where
        Γ is 0: with one class, and for a row without a component in X.

    Raises:
        InputError: another D, NaN or inf.

    >>> pnml_score([[2.0, 0.0]], np.zeros((2, 2)), np.zeros(2), whiten=np.eye(2)).round(4)  # p = ½, κ = ½
    array([-1.4765], dtype=float32)
    """
    whiten = np.asarray(whiten, dtype=np.float64)
    rows = float64_rows(features, normalise=True, dim=len(whiten))
    logits = rows @ np.asarray(weight, dtype=np.float64).T + np.asarray(bias, dtype=np.float64)
    if logits.shape[1] == 1:
        return np.full(len(rows), ALONE, dtype=np.float32)
    leverage = np.square(whitened(rows, whiten)).sum(axis=1, keepdims=True)
    log_regret = log_of_log1p(_log_excess(Softmax.of(logits), 1 / (1 + leverage)))
    return finite_log(log_regret - np.log(np.log(logits.shape[1])))


def _log_excess(softmax: Softmax, share: Matrix) -> NDArray[np.float64]:
    """Log of Σ_c t_c − 1, t_c = p_c / (p_c + (1 − p_c) p_c^(1 − share)), [n]; −inf where it is not above 0.

    What the largest class lacks to 1 is taken from the sum of the others: where p is near 1, Σ_c t_c rounds to 1.
    """
    odds = softmax.log_rest + share * softmax.surprise  # t = 1 / (1 + exp(odds))
    every = np.arange(len(odds))
    lacking = -np.logaddexp(0, -odds[every, softmax.largest])
    odds[every, softmax.largest] = np.inf
    others = log_sum(-np.logaddexp(0, odds))
    with np.errstate(divide="ignore", invalid="ignore"):  # no other class, or nothing above 1
        return others + np.log(-np.expm1(np.minimum(lacking - others, 0)))


@dataclass(frozen=True, eq=False)
class Design:
    """The head, and the whitening [D, r] of the normalised ID training features, shrunk or not.

    Attributes:
        shrinkage: intensity; None where it is the rows' own.
        remark: what to say of it.
    """

    head: LinearHead
    whiten: Matrix
    shrinkage: float | None
    remark: str


@dataclass(eq=False)
class PNMLScorer(Scorer):
    """`pnml_score`.

    Attributes:
        shrinkage: of XᵀX, as in `stages.scorers.shared.shrinkage.shrunk_scatter`: outside of what few rows span there
        is
            h = 0, and no regret.
        rank_rtol: eigenvalues of XᵀX that are at most this share of the largest are left out of its pseudo-inverse.
            ``"float32"``: D times the rounding of float32, as torch's pseudo-inverse does for pytorch-ood.
    """

    name: ClassVar[str] = "pnml"
    title: ClassVar[str] = "pNML"
    says: ClassVar[str] = "log of the regret"
    paper: ClassVar[str] = "Bibas 2021"
    cost: ClassVar[str] = "D² + C·D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "head", "bank"})
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
        {"pytorch-ood": {"shrinkage": "none", "rank_rtol": "float32"}}
    )

    shrinkage: ShrinkageRule = "auto"
    rank_rtol: RankTolerance = RANK_RTOL

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> Design:
        """The head, and the inverse of XᵀX."""
        moments = moments_of(train, self.name, normalise=True, by_class=False)
        shrunk = shrunk_about_zero(moments, self.shrinkage)
        whiten = shrunk.scatter.whitening(self.rank_rtol)
        return Design(train.need_head(self.name), whiten, shrunk.intensity, shrunk.remark)

    def judge(self, x: ScoreInputs, memory: Design) -> Floats:
        """Regret, [n]."""
        head = memory.head
        return pnml_score(x.need("features", self.name), head.weight, head.bias, memory.whiten)

    def facts(self, memory: Design) -> dict[str, Any]:
        """Intensity of the shrinkage."""
        return {} if memory.shrinkage is None else {"shrinkage_intensity": memory.shrinkage}

    def remark(self, memory: Design) -> str:
        """Whether XᵀX is not the rows' own."""
        return memory.remark
