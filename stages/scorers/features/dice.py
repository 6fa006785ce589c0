"""Energy of a head that keeps the weights which contribute most."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from stages.heads.affine import LinearHead
from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.logits.energy import energy_score
from stages.scorers.scorer import Scorer
from stages.scorers.shared.shaping import activations


def sparse_head(head: LinearHead, mean: ArrayLike, percentile: float) -> LinearHead:
    """The head with 0 for every weight whose mean contribution W ⊙ mean z is not above a percentile of them all.

    Args:
        head: weights [C, D] and bias.
        mean: [D] of ID training features.
        percentile: share of the C·D contributions to leave out, per cent.

    >>> sparse_head(LinearHead(np.array([[1.0, 2.0], [3.0, 4.0]]), np.zeros(2)), [1.0, 1.0], 50).weight.tolist()
    [[0.0, 0.0], [3.0, 4.0]]
    """
    contribution = head.weight * np.asarray(mean)
    kept = contribution > np.percentile(contribution, percentile)
    return LinearHead(np.where(kept, head.weight, 0), head.bias)


def dice_score(features: ArrayLike, head: LinearHead) -> Floats:
    """Energy of a sparse head on the features; higher = more OOD.

    Sun and Li, "DICE: Leveraging Sparsification for Out-of-Distribution Detection", ECCV 2022. A masked matrix product:
    the libraries lay out n × C × D. Made for activations that are not negative; weak on a ViT's features.

    Args:
        features: [n, D].
        head: of `sparse_head`.

    Returns:
        [n] float32.

    Raises:
        InputError: NaN or inf, or another D than the head's.

    >>> dice_score([[1.0, 5.0]], LinearHead(np.array([[2.0, 0.0]]), np.array([0.5]))).tolist()
    [-2.5]
    """
    return energy_score(head.logits(activations(features, "DICE's")))


class _Memory(NamedTuple):
    head: LinearHead
    rows: int


@dataclass(eq=False)
class DICEScorer(Scorer):
    """`dice_score` with the mean of the ID training features.

    Attributes:
        percentile: of the contributions to leave out; the paper takes 90 for CIFAR, 70 for ImageNet (``demo-cifar.sh``
            and ``demo-imagenet.sh`` of github.com/deeplearning-wisc/dice).
    """

    name: ClassVar[str] = "dice"
    title: ClassVar[str] = "DICE"
    says: ClassVar[str] = "energy by the weights that contribute most"
    paper: ClassVar[str] = "Sun 2022"
    cost: ClassVar[str] = "C·D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "head", "bank"})

    percentile: Annotated[float, Field(ge=0, lt=100)] = 90.0

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> _Memory:
        """The sparse head."""
        total = np.zeros(train.need_unread(self.name).shape[1])
        for block in train.blocks():
            total += activations(block.need("features", self.name), "DICE's").sum(axis=0, dtype=np.float64)
        return _Memory(sparse_head(train.need_head(self.name), total / len(train), self.percentile), len(train))

    def judge(self, x: ScoreInputs, memory: _Memory) -> Floats:
        """Energy of the sparse head, [n]."""
        return dice_score(x.need("features", self.name), memory.head)

    def facts(self, memory: _Memory) -> dict[str, Any]:
        """Which rows the mean is of."""
        return {"fitted_on": "train", "fitted_rows": memory.rows}
