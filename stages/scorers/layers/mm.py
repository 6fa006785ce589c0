"""Mahalanobis distance in the joint space of several layers, with one shrunk covariance."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from stages.id_data.lazy import Floats
from stages.id_data.taps import TapToken
from stages.scorers.features.mahalanobis import TiedGaussians, mahalanobis_score
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.fusion import ChosenLayers, Layers, MostLayers, choose_layers, fused
from stages.scorers.shared.moments import moments_of
from stages.scorers.shared.shrinkage import ShrinkageRule, shrunk_scatter


@dataclass(frozen=True, eq=False)
class LayeredGaussians:
    """Class means and their one covariance in the joint space of some layers."""

    chosen: ChosenLayers
    classes: TiedGaussians


@dataclass(eq=False)
class MMPlusPlusScorer(Scorer):
    """MM++: `mahalanobis_score` of φ = [z̄₁; …; z̄], the ℓ2-normalised tokens of chosen layers and of the features.

    Hossain et al., "MM++: Post-Hoc Scale-Invariant Multilayer OOD Detection via Top-K Gated Feature Fusion", arXiv
    2606.17352, 2026. The paper could not be had; its equations are those that its authors wrote out for their
    reviewers. With no layer it is Mahalanobis++.

    Attributes:
        layers: blocks or stages whose tokens stand beside the features, of those that are cached; ``"auto"``: as
            `stages.scorers.shared.fusion` has it, from ID training rows.
        most: layers that ``"auto"`` takes at most; the paper's K counts the features, too, and is 2.
        token: ``"cls"``, ``"mean"`` (of the patches) or ``"auto"``, the class token where there is one.
        shrinkage: as in `stages.scorers.shared.shrinkage.shrunk_scatter`; the paper's is Ledoit and Wolf's however many
            rows there are.
    """

    name: ClassVar[str] = "mm-pp"
    title: ClassVar[str] = "MM++"
    says: ClassVar[str] = "Mahalanobis++ on several layers end to end"
    paper: ClassVar[str] = "Hossain 2026"
    cost: ClassVar[str] = "(L·D)² + C·L·D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "taps", "bank", "labels"})

    layers: Layers = "auto"
    most: MostLayers = 1
    token: TapToken = "auto"
    shrinkage: ShrinkageRule = "ledoit-wolf"

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> LayeredGaussians:
        """The layers; class means and their covariance.

        Raises:
            InputError: layers that are not cached, rows without a class, NaN or inf in a feature.
        """
        chosen = choose_layers(train, self.name, self.layers, self.token, self.most)
        joint = ScoreInputs(fused(train, chosen, self.name), labels=train.labels)
        moments = moments_of(joint, self.name)
        shrunk = shrunk_scatter(joint, self.name, moments, self.shrinkage)
        whiten = shrunk.scatter.whitening() * np.sqrt(len(moments))
        remark = "" if shrunk.varies else shrunk.remark  # that it is shrunk is the method
        return LayeredGaussians(chosen, TiedGaussians.of(moments.class_means, whiten, shrunk.intensity, remark))

    def judge(self, x: ScoreInputs, memory: LayeredGaussians) -> Floats:
        """Squared distance to the nearest class mean, [n]."""
        return mahalanobis_score(np.asarray(fused(x, memory.chosen, self.name)), memory.classes)

    def facts(self, memory: LayeredGaussians) -> dict[str, Any]:
        """The layers; intensity of the shrinkage."""
        intensity = memory.classes.shrinkage
        return memory.chosen.facts() | ({} if intensity is None else {"shrinkage_intensity": intensity})

    def remark(self, memory: LayeredGaussians) -> str:
        """Whether no layer was chosen, or rows around one mean do not differ."""
        return memory.chosen.remark() or memory.classes.remark
