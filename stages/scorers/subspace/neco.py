"""NECO: the share of a feature that lies in the principal subspace of the ID training features."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.components import explaining
from stages.scorers.shared.moments import RANK_RTOL, Matrix, float64_rows, moments_of


def neco_score(
    features: ArrayLike,
    mean: ArrayLike,
    scale: ArrayLike,
    components: ArrayLike,
    max_logits: ArrayLike | None = None,
) -> Floats:
    """−‖Pz‖ / ‖z‖ of standardised features, times the largest logit where given; higher = more OOD.

    Ben Ammar et al., "NECO: NEural Collapse Based Out-of-distribution detection", ICLR 2024. The authors multiply by
    the largest logit for all but ResNets.

    Args:
        features: [n, D], any float type; computed in float64.
        mean: [D], subtracted first.
        scale: [D], divided by then.
        components: [D, d] orthonormal columns that span the principal subspace.
        max_logits: [n] largest logit of each row.

    Returns:
        [n] float32, in [−1, 0] without logits. A row that is the mean has no direction: its share is 0.

    Raises:
        InputError: another D, NaN or inf.

    >>> neco_score([[3.0, 4.0]], mean=[0.0, 0.0], scale=[1.0, 1.0], components=[[1.0], [0.0]]).round(4).tolist()
    [-0.6000000238418579]
    """
    mean = np.asarray(mean, dtype=np.float64)
    rows = (float64_rows(features, dim=len(mean)) - mean) / np.asarray(scale, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1)
    share = np.divide(
        np.linalg.norm(rows @ np.asarray(components, dtype=np.float64), axis=1),
        lengths,
        out=np.zeros(len(rows)),
        where=lengths > 0,
    )
    return np.asarray(-share if max_logits is None else -share * np.asarray(max_logits, np.float64), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Principal:
    """Arguments of `neco_score`: mean and scale [D], components [D, d]."""

    mean: Matrix
    scale: Matrix
    components: Matrix


@dataclass(eq=False)
class NECOScorer(Scorer):
    """`neco_score`, standardised and with the principal components of the ID training features.

    Attributes:
        dim: d, which the authors choose for each network. None takes as many components as explain ``variance``.
        variance: share of the variance of the standardised features, 0.9 as in the code of Mahalanobis++'s authors.
        max_logit: multiply by the largest logit.
    """

    name: ClassVar[str] = "neco"
    title: ClassVar[str] = "NECO"
    says: ClassVar[str] = "minus the share inside the principal subspace, times the largest logit"
    paper: ClassVar[str] = "Ben Ammar 2024"
    cost: ClassVar[str] = "D²"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "logits", "bank"})

    dim: Annotated[int, Field(ge=1)] | None = None
    variance: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_logit: bool = True

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> Principal:
        """Mean, deviations and principal components.

        A feature that does not vary over ID training rows is divided by 1, as by scikit-learn's StandardScaler.
        """
        moments = moments_of(train, self.name, by_class=False)
        total = moments.total
        variances = np.diagonal(total.matrix) / len(moments)
        scale = np.sqrt(np.where(variances > RANK_RTOL * variances.max(), variances, 1.0))
        if not variances.max() > 0:  # no direction in which rows differ: nothing lies inside
            return Principal(moments.mean, scale, np.zeros((moments.dim, 0)))
        lengths, directions = total.over(scale).spectrum()
        dim = self.dim or explaining(lengths, self.variance)
        return Principal(moments.mean, scale, np.ascontiguousarray(directions[:, :dim]))

    def judge(self, x: ScoreInputs, memory: Principal) -> Floats:
        """Negative share of the principal subspace, times the largest logit where asked, [n]."""
        largest = x.need("logits", self.name).max(axis=1) if self.max_logit else None
        features = x.need("features", self.name)
        return neco_score(features, memory.mean, memory.scale, memory.components, largest)

    def facts(self, memory: Principal) -> dict[str, Any]:
        """The dimension, where it is not the one that was set."""
        dim = memory.components.shape[1]
        return {"dim_used": dim} if dim != self.dim else {}

    def remark(self, memory: Principal) -> str:
        """Whether there is a principal subspace at all."""
        return "" if memory.components.size else "every row scores 0, for no two ID training rows differ"
