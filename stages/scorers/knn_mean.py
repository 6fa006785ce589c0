"""Mean distance to the k nearest ID training features."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from stages.bank import FeatureBank
from stages.scorers.base import Floats, ScoreInputs, Scorer


def knn_mean_score(features: ArrayLike, bank: FeatureBank, k: int) -> Floats:
    """Mean of √(2 − 2·cos) to the k nearest features of the bank; higher = more OOD.

    Angiulli and Pizzuti, "Fast Outlier Detection in High Dimensional Spaces", PKDD 2002; on features as in cleanlab
    (Kuan and Mueller, "Back to the Basics: Revisiting Out-of-Distribution Detection Baselines", 2022). It differs from
    the distance to the k-th alone.

    Args:
        features: [n, D], any float type; normalised by the bank.
        bank: ID training features.
        k: how many neighbours are averaged.

    Returns:
        [n] float32 in [0, 2].

    Raises:
        InputError: as `FeatureBank.search`.

    >>> knn_mean_score([[2.0, 0.0]], FeatureBank([[1.0, 0.0], [0.0, 1.0]]), k=2).round(3).tolist()
    [0.7070000171661377]
    """
    return bank.search(features, k)[0].mean(axis=1, dtype=np.float64).astype(np.float32)


@dataclass(eq=False)
class KNNMeanScorer(Scorer):
    """`knn_mean_score` with its k and bank.

    Attributes:
        k: how many neighbours are averaged; clipped to a bank's size, and ``params()`` says so.
    """

    name: ClassVar[str] = "knn-mean"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "bank"})
    side_by_side: ClassVar[bool] = False  # faiss has threads of its own
    follows: ClassVar[frozenset[str]] = frozenset({"k"})

    k: Annotated[int, Field(ge=1)] = 50

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> FeatureBank:
        """The bank."""
        return FeatureBank(train.need("features", "a bank"))

    def judge(self, x: ScoreInputs, memory: FeatureBank) -> Floats:
        """Mean distance to the neighbours, [n]."""
        return knn_mean_score(x.need("features", self.name), memory, min(self.k, len(memory)))

    def facts(self, memory: FeatureBank) -> dict[str, Any]:
        """``k_used``, where a bank has fewer than k rows."""
        return {"k_used": len(memory)} if len(memory) < self.k else {}
