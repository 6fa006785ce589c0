"""ViM and residual: how much of a feature lies outside the principal subspace of the ID training features."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.special import logsumexp

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.arrays import scaled_logits
from stages.scorers.shared.moments import Matrix, float64_rows, moments_of
from stages.scorers.shared.shrinkage import ENOUGH_ROWS

# A softmax head of C classes has rank C − 1 but for rounding: adding one vector to all its weights changes nothing.
# numpy's pinv divides by that rounding where the head is float32, and the origin is then off by orders of magnitude.
PINV_RTOL = 1e-5


def virtual_origin(weight: ArrayLike, bias: ArrayLike) -> Matrix:
    """The origin u = −W⁺b, where the logits are as near to 0 as the head gets them: ViM measures features from it.

    Args:
        weight: [C, D].
        bias: [C].

    Returns:
        [D] float64; singular values of W below 1e-5 of the largest count as 0.

    >>> virtual_origin([[2.0, 0.0], [0.0, 4.0]], [2.0, 8.0]).tolist()
    [-1.0, -2.0]
    """
    return -np.linalg.pinv(np.asarray(weight, np.float64), rcond=PINV_RTOL) @ np.asarray(bias, np.float64)


def residual_score(features: ArrayLike, origin: ArrayLike, principal: ArrayLike) -> Floats:
    """‖P⊥(z − u)‖, the length of what the principal subspace leaves of a feature; higher = more OOD.

    Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022, section 3.

    Args:
        features: [n, D], any float type; computed in float64.
        origin: [D] u.
        principal: [D, d] orthonormal columns that span the principal subspace; P⊥ takes away what lies in it.

    Returns:
        [n] float32, at least 0.

    Raises:
        InputError: another D, NaN or inf.

    >>> residual_score([[7.0, 4.0, 3.0]], origin=[0.0, 0.0, 0.0], principal=[[1.0], [0.0], [0.0]])
    array([5.], dtype=float32)
    """
    return np.asarray(_residual(features, np.asarray(origin), np.asarray(principal)), dtype=np.float32)


def vim_score(features: ArrayLike, logits: ArrayLike, origin: ArrayLike, principal: ArrayLike, alpha: float) -> Floats:
    """α·‖P⊥(z − u)‖ − logsumexp(l); higher = more OOD.

    Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022. Their score, the softmax probability
    of the virtual logit among the others, is 1 / (1 + exp(−this)): the same ranks, but it does not saturate.

    Args:
        features: as in `residual_score`.
        logits: [n, C].
        origin: as in `residual_score`.
        principal: as in `residual_score`.
        alpha: what a unit of the residual counts in logits.

    Returns:
        [n] float32.

    Raises:
        InputError: another D, NaN or inf.

    >>> vim_score([[7.0, 2.0]], [[1.0]], origin=[0.0, 0.0], principal=[[1.0], [0.0]], alpha=3.0)
    array([5.], dtype=float32)
    """
    virtual = alpha * _residual(features, np.asarray(origin), np.asarray(principal))
    return np.asarray(virtual - logsumexp(scaled_logits(logits, 1.0), axis=1), dtype=np.float32)


def _residual(features: ArrayLike, origin: Matrix, principal: Matrix) -> NDArray[np.float64]:
    rows = float64_rows(features, dim=len(origin)) - origin
    rows -= (rows @ principal) @ principal.T
    return np.linalg.norm(rows, axis=1)


@dataclass(frozen=True, eq=False)
class PrincipalSubspace:
    """The directions in which ID training features are longest, seen from u.

    Attributes:
        origin: [D] u.
        directions: [D, d] orthonormal.
        alpha: of `vim_score`.
        remark: what to say of their number; empty for nothing.
    """

    origin: Matrix
    directions: Matrix
    alpha: float = 1.0
    remark: str = ""

    @property
    def dim(self) -> int:
        """D."""
        return self.directions.shape[1]


def principal_subspace_of(train: ScoreInputs, who: str, dim: int | None) -> PrincipalSubspace:
    """By the second moments of ID training features around u = −W⁺b, read block by block.

    Args:
        train: rows with ``features`` and their ``head``.
        who: the score that needs it, for messages.
        dim: d; None takes that of ViM's authors, 1000 where D ≥ 2048, 512 where D ≥ 768, else D / 2, and of few rows
            no more than one for every 10 of them: a subspace of more follows the rows' own noise, in which they have
            less of a residual than any other row. Where the rows span no more than d dimensions, half of those that
            they span: they would have no residual at all.

    Raises:
        InputError: no head, NaN or inf in a feature.
    """
    head = train.need_head(who)
    origin = virtual_origin(head.weight, head.bias)
    moments = moments_of(train, who, by_class=False)
    around = moments.about(origin)
    directions = around.spectrum()[1] if around.trace() > 0 else np.zeros((moments.dim, 0))
    rank = directions.shape[1]
    authors, remark = 1000 if moments.dim >= 2048 else 512 if moments.dim >= 768 else moments.dim // 2, ""
    if dim is None:
        # Held-out ID log-likelihood of a probabilistic PCA (EfficientNet's features of Caltech-101) is best at one
        # direction for 7 to 10 rows, from 50 rows to 720.
        dim = min(authors, max(1, len(moments) // ENOUGH_ROWS))
        if dim < authors:
            remark = f"the principal subspace is smaller, for there are fewer than {ENOUGH_ROWS} rows a direction"
    if dim >= rank:
        dim = rank // 2
        remark = "the principal subspace is half of what the rows span"
    return PrincipalSubspace(origin, np.ascontiguousarray(directions[:, :dim]), remark=remark)


@dataclass(eq=False)
class ResidualScorer(Scorer):
    """`residual_score`. OpenOOD fits it on validation rows, ViM's authors on training rows, as here.

    Attributes:
        dim: d, as in `principal_subspace_of`; ``params()`` says which it came to be.
    """

    name: ClassVar[str] = "residual"
    title: ClassVar[str] = "residual"
    says: ClassVar[str] = "the residual outside the principal subspace alone"
    paper: ClassVar[str] = "Wang 2022"
    cost: ClassVar[str] = "D²"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "head", "bank"})
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({"openood": {"dim": 512}})

    dim: Annotated[int, Field(ge=1)] | None = None

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> PrincipalSubspace:
        """The principal subspace."""
        return principal_subspace_of(train, self.name, self.dim)

    def judge(self, x: ScoreInputs, memory: PrincipalSubspace) -> Floats:
        """Length of the residual, [n]."""
        return residual_score(x.need("features", self.name), memory.origin, memory.directions)

    def facts(self, memory: PrincipalSubspace) -> dict[str, Any]:
        """The dimension, where it is not the one that was set."""
        return {"dim_used": memory.dim} if memory.dim != self.dim else {}

    def remark(self, memory: PrincipalSubspace) -> str:
        """Whether the dimension is not the one that was set, or that of ViM's authors."""
        return memory.remark


@dataclass(eq=False)
class ViMScorer(ResidualScorer):
    """`vim_score`, with α such that the residual is on average as large as the largest logit of ID training rows."""

    name: ClassVar[str] = "vim"
    title: ClassVar[str] = "ViM"
    says: ClassVar[str] = "residual outside the principal subspace, less energy"
    paper: ClassVar[str] = "Wang 2022"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "logits", "head", "bank"})
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({"openood": {"dim": 256}})

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> PrincipalSubspace:
        """The principal subspace, and α; 1 where ID training rows have no residual, as those have that are all u."""
        found = super().learn(train, select)
        largest = residual = 0.0
        for block in train.blocks():
            largest += float(block.need("logits", self.name).max(axis=1).sum(dtype=np.float64))
            residual += float(_residual(block.need("features", self.name), found.origin, found.directions).sum())
        if not residual > 0:
            return replace(found, remark="a unit of the residual counts as one logit, for ID training rows have none")
        return replace(found, alpha=largest / residual)

    def judge(self, x: ScoreInputs, memory: PrincipalSubspace) -> Floats:
        """Virtual logit less energy, [n]."""
        features, logits = x.need("features", self.name), x.need("logits", self.name)
        return vim_score(features, logits, memory.origin, memory.directions, memory.alpha)

    def facts(self, memory: PrincipalSubspace) -> dict[str, Any]:
        """α, and the dimension where it is not the one that was set."""
        return super().facts(memory) | {"alpha": memory.alpha}
