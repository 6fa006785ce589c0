"""NAC: how often ID training rows have had every neuron in the state that it is in."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.special import expit

from stages.heads.affine import LinearHead
from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.moments import Matrix, float64_rows
from stages.scorers.shared.softmax import Softmax

Dense = Literal["middle", "ends"]
_LOG_BASE = 1000.0  # of the authors' edges
_NEAREST_END = 1e-6  # of pytorch-ood's: states closer to 0 or 1 are in the outer bins


def neuron_states(features: ArrayLike, logits: ArrayLike, weight: ArrayLike, alpha: float) -> Matrix:
    """σ(α · z ⊙ ∂KL(u ‖ p)/∂z), u = 1/C for each class, p = softmax(l); the gradient is Wᵀ(p − u).

    Liu et al., "Neuron Activation Coverage: Rethinking Out-of-distribution Detection and Generalization", ICLR 2024, at
    the last layer, where the gradient is closed.

    Args:
        features: [n, D], the last layer's input; computed in float64.
        logits: [n, C].
        weight: [C, D] W of the head.
        alpha: steepness.

    Returns:
        [n, D] in [0, 1]; ½ for what is 0 or pulls nowhere.

    Raises:
        InputError: another D, NaN or inf.

    >>> neuron_states([[1.0, -1.0]], [[0.0, 0.0]], weight=np.eye(2), alpha=1.0).tolist()  # p = u
    [[0.5, 0.5]]
    """
    weight = np.asarray(weight, dtype=np.float64)
    rows, p = float64_rows(features, dim=weight.shape[1]), Softmax.of(logits).p
    states: Matrix = expit(alpha * rows * ((p - 1 / len(weight)) @ weight))
    return states


def bin_edges(bins: int, dense: Dense) -> Matrix:
    """Edges between the bins of states from 0 to 1, ascending, symmetric around ½, which is one of them.

    Args:
        bins: M, even.
        dense: where bins are narrow. ``"middle"`` as in the authors' code: M − 2 bins that end at log(x) / log(1000), x
            in equal steps from 1 to √1000, and their mirror images. ``"ends"`` as in pytorch-ood: M bins that end at a
            geometric series from 1e-6 to ½, and their mirror images.

    Returns:
        [number of bins − 1]: the first bin begins at 0, the last ends at 1.

    >>> bin_edges(4, "ends").round(4).tolist()
    [0.0007, 0.5, 0.9993]
    >>> bin_edges(6, "middle").round(4).tolist()
    [0.4042, 0.5, 0.5958]
    """
    half = bins // 2
    if dense == "middle":
        left = np.log(np.linspace(1, np.sqrt(_LOG_BASE), half)) / np.log(_LOG_BASE)
    else:
        left = np.geomspace(_NEAREST_END, 0.5, half + 1)
    inner = left[1:-1]
    return np.concatenate([inner, [0.5], (1 - inner)[::-1]])


def nac_score(states: ArrayLike, edges: ArrayLike, coverage: ArrayLike, upper: bool = True) -> Floats:
    """−mean over neurons of min(n / O, 1), n ID rows whose state is in the same bin; higher = more OOD.

    Args:
        states: [n, D] `neuron_states`.
        edges: `bin_edges`.
        coverage: [D, bins] min(n / O, 1) of each neuron's bins.
        upper: whether a state that is an edge is of the upper of its two bins.

    Returns:
        [n] float32 in [−1, 0].

    >>> nac_score([[0.2, 0.9]], edges=[0.5], coverage=[[0.25, 1.0], [0.0, 0.75]]).tolist()
    [-0.5]
    """
    coverage = np.asarray(coverage, dtype=np.float64)
    found = coverage[np.arange(len(coverage)), _bins_of(np.asarray(states), np.asarray(edges), upper)]
    return np.asarray(-found.mean(axis=1), dtype=np.float32)


def _bins_of(states: Matrix, edges: Matrix, upper: bool) -> NDArray[np.intp]:
    return np.searchsorted(edges, states, side="right" if upper else "left")


@dataclass(frozen=True, eq=False)
class Covered:
    """The head, and the coverage [D, bins] of each neuron's bins by so many ID training rows."""

    head: LinearHead
    coverage: Matrix
    rows: int


@dataclass(eq=False)
class NACScorer(Scorer):
    """`nac_score` of the last layer: NAC-UE, of one layer.

    Attributes:
        alpha: α of `neuron_states`.
        bins: M of `bin_edges`.
        full: O, ID rows that cover a bin. The authors search α, M and O for each network on sets with OOD rows, and fit
            on a part of the rows: for the last layer 100, 50 and 50 with 1,000 rows of CIFAR-10, 3000, 50 and 10 with
            1,000 of ImageNet (ResNets), 100, 50 and 500 with 50,000 of them (ViT). The defaults are the first.
        dense: of `bin_edges`.
    """

    name: ClassVar[str] = "nac"
    title: ClassVar[str] = "NAC"
    says: ClassVar[str] = "minus the share of neurons whose state ID rows have had"
    paper: ClassVar[str] = "Liu 2024"
    cost: ClassVar[str] = "C·D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "logits", "head", "bank"})
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({"pytorch-ood": {"dense": "ends"}})

    alpha: Annotated[float, Field(gt=0)] = 100.0
    bins: Annotated[int, Field(ge=4, multiple_of=2)] = 50
    full: Annotated[int, Field(ge=1)] = 50
    dense: Dense = "middle"

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> Covered:
        """Bins of every neuron, counted over blocks of rows."""
        head = train.need_head(self.name)
        counts = np.zeros((head.weight.shape[1], len(self._edges()) + 1), dtype=np.int64)
        for block in train.blocks():
            counts += self._counted(block, head)
        return Covered(head, np.minimum(counts / self.full, 1.0), len(train))

    def judge(self, x: ScoreInputs, memory: Covered) -> Floats:
        """Minus the coverage, [n]."""
        return nac_score(self._states(x, memory.head), self._edges(), memory.coverage, self._upper)

    def remark(self, memory: Covered) -> str:
        """Whether a bin can be covered at all."""
        return "" if memory.rows >= self.full else "no bin is covered in full, for there are fewer rows than that takes"

    def _counted(self, x: ScoreInputs, head: LinearHead) -> NDArray[np.intp]:
        """[D, bins] rows of a block in each bin."""
        edges = self._edges()
        bins = _bins_of(self._states(x, head), edges, self._upper)
        dim, n_bins = bins.shape[1], len(edges) + 1
        bins += np.arange(dim) * n_bins
        return np.bincount(bins.ravel(), minlength=dim * n_bins).reshape(dim, n_bins)

    def _states(self, x: ScoreInputs, head: LinearHead) -> Matrix:
        return neuron_states(x.need("features", self.name), x.need("logits", self.name), head.weight, self.alpha)

    def _edges(self) -> Matrix:
        return bin_edges(self.bins, self.dense)

    @property
    def _upper(self) -> bool:
        return self.dense == "middle"  # as the two codes have it
