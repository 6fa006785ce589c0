"""Distance to the k-th nearest ID training row in the joint space of several layers."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from stages.id_data.lazy import Floats
from stages.id_data.taps import TapToken
from stages.scorers.inputs import ScoreInputs
from stages.scorers.neighbours.bank import FeatureBank
from stages.scorers.neighbours.knn import knn_score
from stages.scorers.scorer import Scorer
from stages.scorers.shared.fusion import ChosenLayers, Layers, MostLayers, choose_layers, fused


@dataclass(frozen=True, eq=False)
class LayeredBank:
    """ID training rows in the joint space of some layers."""

    chosen: ChosenLayers
    bank: FeatureBank


@dataclass(eq=False)
class KNNLayersScorer(Scorer):
    """`knn_score` of the ℓ2-normalised tokens of chosen layers and of the features, end to end.

    kNN is of Sun et al., ICML 2022; on several layers it is what the authors of MM++ compare with as "KNN (Concat.)".
    Each layer counts alike: the squared distance is the mean of the layers' own. It searches exactly, in all rows.

    Attributes:
        k: which neighbour counts, clipped to the bank's size; by default as of `knn`.
        layers, most, token: as in `stages.scorers.layers.mm.MMPlusPlusScorer`.
    """

    name: ClassVar[str] = "knn-layers"
    title: ClassVar[str] = "multi-layer kNN"
    says: ClassVar[str] = "kNN on several layers end to end"
    paper: ClassVar[str] = "Sun 2022"
    cost: ClassVar[str] = "N·L·D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "taps", "bank", "labels"})
    side_by_side: ClassVar[bool] = False  # faiss has threads of its own
    follows: ClassVar[frozenset[str]] = frozenset({"k"})

    k: Annotated[int, Field(ge=1)] = 50
    layers: Layers = "auto"
    most: MostLayers = 1
    token: TapToken = "auto"

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> LayeredBank:
        """The layers, and the bank.

        Raises:
            InputError: layers that are not cached, rows without a class, NaN or inf in a feature.
        """
        chosen = choose_layers(train, self.name, self.layers, self.token, self.most)
        return LayeredBank(chosen, FeatureBank(fused(train, chosen, self.name)))

    def judge(self, x: ScoreInputs, memory: LayeredBank) -> Floats:
        """Distance to the k-th neighbour, [n]."""
        rows = np.asarray(fused(x, memory.chosen, self.name))
        return knn_score(rows, memory.bank, min(self.k, len(memory.bank)))

    def facts(self, memory: LayeredBank) -> dict[str, Any]:
        """The layers; ``k_used``, where a bank has fewer than k rows."""
        n = len(memory.bank)
        return memory.chosen.facts() | ({"k_used": n} if n < self.k else {})

    def remark(self, memory: LayeredBank) -> str:
        """Whether no layer was chosen, or a bank has fewer than k rows."""
        return memory.chosen.remark() or ("fewer rows than k" if len(memory.bank) < self.k else "")
