"""Relation: how strongly a row is tied to the ID training rows in the relation graph."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field
from scipy.special import softmax

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.arrays import l2_normalise, scaled_logits
from stages.scorers.shared.moments import checked_dim
from stages.scorers.shared.pairs import bank_blocks, query_blocks


def relation_score(
    features: ArrayLike, logits: ArrayLike, bank: ScoreInputs, power: float = 1.0, threshold: float = 0.03
) -> Floats:
    """−Σᵢ r(z, zᵢ)^power over r > threshold, r = max(0, z̄·z̄ᵢ)·(p·pᵢ); higher = more OOD.

    Kim, Yun and Song, "Neural Relation Graph: A Unified Framework for Identifying Label Noise and Outlier Data",
    NeurIPS 2023.

    Args:
        features: [n, D], any float type.
        logits: [n, C]; p is their softmax.
        bank: ID training rows with ``features`` and ``logits``, read by blocks.
        power: of a relation; the paper takes 1 for OOD detection.
        threshold: relations up to it are no edges of the graph.

    Returns:
        [n] float32, at most 0; 0 for a row without an edge, and many may tie there.

    Raises:
        InputError: another D, NaN or inf.

    >>> bank = ScoreInputs(features=np.eye(2), logits=np.array([[9e9, 0.0], [0.0, 9e9]]))
    >>> relation_score([[3.0, 4.0]], [[0.0, 0.0]], bank).round(4), relation_score([[3.0, 4.0]], [[9e9, 0.0]], bank)
    (array([-0.7], dtype=float32), array([-0.6], dtype=float32))
    """
    unit = l2_normalise(checked_dim(features, bank.need_unread("relation").shape[1]))
    own = _probabilities(logits)
    edges = np.zeros(len(unit))
    for rows in bank_blocks(bank):
        bank_unit = l2_normalise(rows.need("features", "relation"))
        bank_probabilities = _probabilities(rows.need("logits", "relation"))
        for block, (queries, probabilities) in query_blocks(unit, own):
            relations = queries @ bank_unit.T
            np.maximum(relations, 0, out=relations)
            relations *= probabilities @ bank_probabilities.T
            relations[relations <= threshold] = 0
            sums = (relations if power == 1 else relations**power).sum(axis=1, dtype=np.float64)
            edges[block] += sums[: block.stop - block.start]
    return np.asarray(-edges, dtype=np.float32)


def _probabilities(logits: ArrayLike) -> Floats:
    return np.asarray(softmax(scaled_logits(logits, 1.0), axis=1), dtype=np.float32)


@dataclass(eq=False)
class RelationScorer(Scorer):
    """`relation_score` with the ID training rows.

    Attributes:
        power: of a relation.
        threshold: relations up to it count nothing.
    """

    name: ClassVar[str] = "relation"
    title: ClassVar[str] = "relation"
    says: ClassVar[str] = "minus the sum over the relation graph with ID rows"
    paper: ClassVar[str] = "Kim 2023"
    cost: ClassVar[str] = "N·(D + C)"
    costly: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"features", "logits", "bank"})

    power: Annotated[float, Field(gt=0)] = 1.0
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.03

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> ScoreInputs:
        """The rows themselves: they are read again for each block of rows to score."""
        return train.only("features", "logits", "head")

    def judge(self, x: ScoreInputs, memory: ScoreInputs) -> Floats:
        """Negative sum of the relations, [n]."""
        features, logits = x.need("features", self.name), x.need("logits", self.name)
        return relation_score(features, logits, memory, self.power, self.threshold)
