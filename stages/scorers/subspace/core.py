"""CORE: confidence, and the direction of what the head does not see of a feature."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.special import logsumexp

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.arrays import scaled_logits
from stages.scorers.shared.fitting import RowsName, fitted_on_train, fitting_rows
from stages.scorers.shared.moments import Matrix, float64_rows, moments_of
from stages.scorers.subspace.vim import PINV_RTOL

_ROUNDING = 1e-6  # a residual of at most this share of its row is the rounding of float32 features and weights


class Scale(NamedTuple):
    """Mean and deviation that a part of the score is standardised by."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Self:
        """Of values [n]; where they do not vary, the deviation is 1."""
        mean, deviation = float(values.mean()), float(values.std())
        return cls(mean, deviation if deviation > np.finfo(np.float32).eps * np.abs(values).max() else 1.0)

    def apply(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values [n] in deviations above the mean."""
        return (values - self.mean) / self.deviation


@dataclass(frozen=True, eq=False)
class Residuals:
    """Where features are measured that the head does not see.

    Attributes:
        seen: [D, r] orthonormal columns, the largest right singular vectors of the head's weights.
        means: [C, D] what these leave of the class means.
        energy: scale of −logsumexp(l).
        cosine: scale of −max_c cos.
        record: of which rows the scales are.
        remark: what to say of r; empty for nothing.
    """

    seen: Matrix
    means: Matrix
    energy: Scale
    cosine: Scale
    record: dict[str, Any]
    remark: str = ""


def core_score(
    features: ArrayLike, logits: ArrayLike, seen: ArrayLike, means: ArrayLike, energy: Scale, cosine: Scale
) -> Floats:
    """−logsumexp(l) − max_c cos(r, r_c), each standardised, r = (I − VVᵀ)z; higher = more OOD.

    Yang et al., "CORE: Robust Out-of-Distribution Detection via Confidence and Orthogonal Residual Scoring", arXiv
    2603.18290. V spans what the head looks at: the rows of its weights W; r_c is the mean of r over rows of class c.

    Args:
        features: [n, D], any float type; computed in float64.
        logits: [n, C]; −inf for classes that do not apply.
        seen: [D, r] V, orthonormal columns.
        means: [C', D] r_c.
        energy: mean and deviation of the first part.
        cosine: of the second.

    Returns:
        [n] float32. A residual that is rounding of its row, or of its class mean, has cosine 0.

    Raises:
        InputError: another D, NaN or inf.

    >>> whole = Scale(0.0, 1.0)
    >>> core_score([[9.0, 3.0, 4.0]], [[2.0]], seen=[[1.0], [0.0], [0.0]], means=[[0.0, 5.0, 0.0]],
    ...            energy=whole, cosine=whole).round(4)
    array([-2.6], dtype=float32)
    """
    parts = _parts(features, logits, np.asarray(seen, dtype=np.float64), np.asarray(means, dtype=np.float64))
    return np.asarray(energy.apply(parts[0]) + cosine.apply(parts[1]), dtype=np.float32)


def _parts(
    features: ArrayLike, logits: ArrayLike, seen: Matrix, means: Matrix
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Energy and −max_c cos(r, r_c), [n] each."""
    cosines = _unit_residuals(float64_rows(features, dim=len(seen)), seen) @ float64_rows(means, normalise=True).T
    return -logsumexp(scaled_logits(logits, 1.0), axis=1), -cosines.max(axis=1)


def _left_of(rows: Matrix, seen: Matrix) -> Matrix:
    """What a subspace leaves of rows [n, D]; nothing of those that lie in it but for rounding."""
    residual = rows - (rows @ seen) @ seen.T
    residual[np.linalg.norm(residual, axis=1) <= _ROUNDING * np.linalg.norm(rows, axis=1)] = 0
    return residual


def _unit_residuals(rows: Matrix, seen: Matrix) -> Matrix:
    return float64_rows(_left_of(rows, seen), normalise=True)


def row_space(weight: ArrayLike, rank: int | None = None) -> tuple[Matrix, str]:
    """Directions that a head looks at, the largest first.

    Args:
        weight: [C, D].
        rank: r at most. None takes all whose singular values are above 1e-5 of the largest, and where these span all
            features, or with C ≥ D classes nearly all, half as many as there are features: else nothing would be left
            of a row. How the authors cut them could not be found out.

    Returns:
        [D, r] orthonormal columns, and what to say of r; empty for nothing.

    >>> np.abs(row_space([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]])[0]).round(4).tolist()
    [[1.0], [0.0], [0.0]]
    """
    weight = np.asarray(weight, dtype=np.float64)
    _, lengths, directions = np.linalg.svd(weight, full_matrices=False)
    n_classes, dim = weight.shape
    found = int((lengths > PINV_RTOL * lengths.max(initial=0.0)).sum())
    said = ""
    if rank is None:
        rank = found
        if found > dim // 2 and (found == dim or n_classes >= dim):
            rank, said = dim // 2, "what the head looks at is cut to half as many directions as there are features"
    return np.ascontiguousarray(directions[: min(rank, found, dim - 1)].T), said


@dataclass(eq=False)
class COREScorer(Scorer):
    """`core_score`, its two parts standardised on held-out ID rows.

    On which ID rows the authors standardise could not be found out. Training rows have a say in the class means that
    they are compared with, and the head knows them: with few rows a class their cosines and energies say little of
    those of new rows.

    Attributes:
        rank: r, as in `row_space`; ``params()`` says which it came to be.
        rows: ``"select"``, held-out rows, or ``"train"``.
    """

    name: ClassVar[str] = "core"
    title: ClassVar[str] = "CORE"
    says: ClassVar[str] = "energy, less the cosine to the nearest class of what the head does not see"
    paper: ClassVar[str] = "Yang 2026"
    cost: ClassVar[str] = "D² + C·D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "logits", "head", "bank", "select", "labels"})

    rank: Annotated[int, Field(ge=0)] | None = None
    rows: RowsName = "select"

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> Residuals:
        """Row space of the head, residual class means, and the scales of both parts."""
        rows, record = fitting_rows(self.rows, train, select, self.name)
        seen, said = row_space(train.need_head(self.name).weight, self.rank)
        means = _left_of(moments_of(train, self.name, scatter=False).class_means, seen)
        found = [
            _parts(block.need("features", self.name), block.need("logits", self.name), seen, means)
            for block in rows.blocks()
        ]
        energy, cosine = (Scale.of(np.concatenate(part)) for part in zip(*found, strict=True))
        return Residuals(seen, means, energy, cosine, record, said)

    def judge(self, x: ScoreInputs, memory: Residuals) -> Floats:
        """Energy and cosine in deviations above those of ID rows, [n]."""
        features, logits = x.need("features", self.name), x.need("logits", self.name)
        return core_score(features, logits, memory.seen, memory.means, memory.energy, memory.cosine)

    def facts(self, memory: Residuals) -> dict[str, Any]:
        """The rank, where it is not the one that was set, and the rows that the scales are of."""
        used = memory.seen.shape[1]
        return ({"rank_used": used} if used != self.rank else {}) | memory.record

    def remark(self, memory: Residuals) -> str:
        """Whether the row space is cut, and whether the scales are of other rows than asked for."""
        return "; ".join(said for said in (memory.remark, fitted_on_train(self.rows, memory.record)) if said)
