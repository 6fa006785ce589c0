"""Cosine to the nearest class prototype."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.moments import float64_rows, moments_of


def cosine_score(features: ArrayLike, prototypes: ArrayLike) -> Floats:
    """−max_c cos(z, μ_c); higher = more OOD.

    Bitterwolf et al., "In or Out? Fixing ImageNet Out-of-Distribution Detection Evaluation", ICML 2023.

    Args:
        features: [n, D], any float type; computed in float64.
        prototypes: [C, D] class means.

    Returns:
        [n] float32 in [−1, 1]; a zero row has cosine 0 with everything.

    Raises:
        InputError: another D, NaN or inf.

    >>> cosine_score([[3.0, 4.0]], prototypes=[[2.0, 0.0], [0.0, 5.0]])
    array([-0.8], dtype=float32)
    """
    unit = float64_rows(prototypes, normalise=True)
    cosines = float64_rows(features, normalise=True, dim=unit.shape[1]) @ unit.T
    return np.asarray(-cosines.max(axis=1), dtype=np.float32)


@dataclass(eq=False)
class CosineScorer(Scorer):
    """`cosine_score` to the means of the ID training features as they are; ``ncm`` takes those of normalised ones."""

    name: ClassVar[str] = "cosine"
    title: ClassVar[str] = "cosine"
    says: ClassVar[str] = "minus the cosine to the nearest class mean"
    paper: ClassVar[str] = "Bitterwolf 2023"
    cost: ClassVar[str] = "C·D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "bank", "labels"})

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> NDArray[np.float64]:
        """Class means, [C, D]."""
        return moments_of(train, self.name, scatter=False).class_means

    def judge(self, x: ScoreInputs, memory: NDArray[np.float64]) -> Floats:
        """Negative cosine to the nearest class mean, [n]."""
        return cosine_score(x.need("features", self.name), memory)
