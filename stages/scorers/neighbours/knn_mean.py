"""Mean distance to the k nearest ID training features."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.neighbours.bank import FeatureBank
from stages.scorers.neighbours.knn import KNNScorer, SearchedIn


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
class KNNMeanScorer(KNNScorer):
    """`knn_mean_score` with the settings of `KNNScorer`; ``k`` says how many neighbours are averaged."""

    name: ClassVar[str] = "knn-mean"
    title: ClassVar[str] = "mean-kNN"
    says: ClassVar[str] = "mean distance to the k nearest"
    paper: ClassVar[str] = "Angiulli 2002"
    cost: ClassVar[str] = "N·D"
    few_rows: ClassVar[str] = "fewer rows than k: all are averaged"

    def judge(self, x: ScoreInputs, memory: SearchedIn) -> Floats:
        """Mean distance to the neighbours, [n]."""
        return self._distances(x, memory, nearer=True).mean(axis=0, dtype=np.float64).astype(np.float32)
