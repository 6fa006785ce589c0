"""SHE: inner product with the pattern of the predicted class."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.arrays import scaled_logits
from stages.scorers.shared.moments import FeatureMoments, Matrix, float64_rows, known_labels


def she_score(features: ArrayLike, logits: ArrayLike, patterns: ArrayLike) -> Floats:
    """−z · M_ŷ with ŷ the predicted class; higher = more OOD.

    Zhang et al., "Out-of-Distribution Detection based on In-Distribution Data Patterns Memorization with Modern
    Hopfield Energy", ICLR 2023.

    Args:
        features: [n, D], any float type; computed in float64.
        logits: [n, C]; the first of equal ones is predicted.
        patterns: [C, D] mean of the correctly classified ID training features of each class.

    Returns:
        [n] float32.

    Raises:
        InputError: another D, NaN or inf.

    >>> she_score([[1.0, 2.0]], [[0.0, 5.0]], patterns=[[9.0, 9.0], [3.0, 4.0]])
    array([-11.], dtype=float32)
    """
    patterns = np.asarray(patterns, dtype=np.float64)
    predicted = scaled_logits(logits, 1.0).argmax(axis=1)
    rows = float64_rows(features, dim=patterns.shape[1])
    return np.asarray(-np.einsum("nd,nd->n", rows, patterns[predicted]), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Patterns:
    """Patterns [C', D] of the classes [C'] that have ID training rows, and how many of these have no correct one."""

    patterns: Matrix
    classes: NDArray[np.integer]
    n_never_right: int


@dataclass(eq=False)
class SHEScorer(Scorer):
    """`she_score`, by the patterns of the ID training rows that are classified correctly.

    A class without such a row has no pattern in the paper (OpenOOD: NaN, pytorch-ood: an error). It takes the mean of
    all its rows, and ``params()`` says how many classes do. The predicted class is the best of those that have rows: a
    routed expert's are those of its group, whatever its head covers.
    """

    name: ClassVar[str] = "she"
    title: ClassVar[str] = "SHE"
    says: ClassVar[str] = "minus the product with the predicted class's pattern"
    paper: ClassVar[str] = "Zhang 2023"
    cost: ClassVar[str] = "D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "logits", "bank", "labels"})

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> Patterns:
        """Mean of each class's correctly classified rows.

        Raises:
            InputError: rows without a class.
        """
        right, every = FeatureMoments(scatter=False), FeatureMoments(scatter=False)
        for block in train.blocks():
            features, labels = block.need("features", self.name), known_labels(block, self.name)
            predicted = block.need("logits", self.name).argmax(axis=1)
            every.add(features, labels)
            right.add(features[predicted == labels], labels[predicted == labels])
        patterns = every.class_means
        if len(right):  # else no class has a row that is classified right
            patterns[np.searchsorted(every.classes, right.classes)] = right.class_means
        return Patterns(patterns, every.classes, len(every.classes) - len(right.classes))

    def judge(self, x: ScoreInputs, memory: Patterns) -> Floats:
        """Negative inner product with the predicted class's pattern, [n]."""
        logits = x.need("logits", self.name)[:, memory.classes]
        return she_score(x.need("features", self.name), logits, memory.patterns)

    def facts(self, memory: Patterns) -> dict[str, Any]:
        """Classes without a correctly classified row, where there are any."""
        return {"classes_never_right": memory.n_never_right} if memory.n_never_right else {}

    def remark(self, memory: Patterns) -> str:
        """Whether there are classes without a correctly classified row."""
        return (
            "classes of which no row is classified right have all their rows as pattern" if memory.n_never_right else ""
        )
