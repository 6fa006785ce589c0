"""Energy after activation shaping: prune a row's smaller activations, then leave, rescale or level the rest."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stages.heads.affine import LinearHead
from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.logits.energy import energy_score
from stages.scorers.scorer import Scorer
from stages.scorers.shared.shaping import activations, kept_count, largest_mask, mass_ratio

ASHVariant = Literal["p", "s", "b"]
Percentile = Annotated[float, Field(ge=0, lt=100)]


def shape_activations(features: ArrayLike, variant: ASHVariant, percentile: float) -> NDArray[np.float32]:
    """Activations with all but each row's largest set to 0, [n, D] float32; see `ash_score`.

    >>> for variant in ("p", "b"):
    ...     shape_activations([[1.0, 2.0, 4.0, 5.0]], variant, 50).tolist()
    [[0.0, 0.0, 4.0, 5.0]]
    [[0.0, 0.0, 6.0, 6.0]]
    """
    z = activations(features, "ASH's")
    k = kept_count(z.shape[1], percentile)
    kept = largest_mask(z, k)
    if variant == "b":
        return kept * (z.sum(axis=1, dtype=np.float64) / k).astype(np.float32)[:, None]
    pruned = z * kept
    if variant == "s":
        sums = (each.sum(axis=1, dtype=np.float64) for each in (z, pruned))
        pruned *= np.exp(mass_ratio(*sums)).astype(np.float32)[:, None]
    return pruned


def ash_score(features: ArrayLike, head: LinearHead, variant: ASHVariant, percentile: float) -> Floats:
    """Energy of the head on the shaped activations; higher = more OOD.

    Djurisic et al., "Extremely Simple Activation Shaping for Out-of-Distribution Detection", ICLR 2023. Each row's
    activations below its own percentile become 0. ASH-P leaves the others, ASH-S multiplies them by exp(s₁ / s₂), the
    sums before and after, ASH-B gives all of them the value that keeps the sum. Made for activations that are not
    negative; weak on a ViT's features.

    Args:
        features: [n, D].
        head: weights and bias on them.
        variant: ``"p"``, ``"s"`` or ``"b"``.
        percentile: share of each row's activations to prune, per cent. Which of several equal ones at the border are
            kept is a choice: the first are.

    Returns:
        [n] float32.

    Raises:
        InputError: NaN or inf, or another D than the head's.

    >>> head = LinearHead(np.eye(2), np.zeros(2))
    >>> ash_score([[3.0, 1.0]], head, "p", 50).tolist() == energy_score([[3.0, 0.0]]).tolist()
    True
    """
    return energy_score(head.logits(shape_activations(features, variant, percentile)))


@dataclass(eq=False)
class _ASHScorer(Scorer):
    variant: ClassVar[ASHVariant]
    needs: ClassVar[frozenset[str]] = frozenset({"features", "head"})
    profiles: ClassVar = {"openood": {"percentile": 90.0}, "pytorch-ood": {"percentile": 65.0}}

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> LinearHead:
        """The head."""
        return train.need_head(self.name)

    def judge(self, x: ScoreInputs, memory: LinearHead) -> Floats:
        """Energy of the shaped row, [n]."""
        percentile: float = self.settings()["percentile"]
        return ash_score(x.need("features", self.name), memory, self.variant, percentile)


@dataclass(eq=False)
class ASHPScorer(_ASHScorer):
    """`ash_score` that prunes alone, at the paper's percentile for ImageNet."""

    name: ClassVar[str] = "ash-p"
    title: ClassVar[str] = "ASH-P"
    says: ClassVar[str] = "energy of pruned features"
    paper: ClassVar[str] = "Djurisic 2023"
    cost: ClassVar[str] = "C·D"
    variant: ClassVar[ASHVariant] = "p"

    percentile: Percentile = 60.0


@dataclass(eq=False)
class ASHSScorer(_ASHScorer):
    """`ash_score` that rescales, at the paper's percentile for ImageNet.

    That is ``ash_s@90`` of ``config/imagenet_config.yml`` in github.com/andrijazz/ash.
    """

    name: ClassVar[str] = "ash-s"
    title: ClassVar[str] = "ASH-S"
    says: ClassVar[str] = "energy of pruned, rescaled features"
    paper: ClassVar[str] = "Djurisic 2023"
    cost: ClassVar[str] = "C·D"
    variant: ClassVar[ASHVariant] = "s"

    percentile: Percentile = 90.0


@dataclass(eq=False)
class ASHBScorer(_ASHScorer):
    """`ash_score` that levels, at the paper's percentile for ImageNet."""

    name: ClassVar[str] = "ash-b"
    title: ClassVar[str] = "ASH-B"
    says: ClassVar[str] = "energy of pruned, binarised features"
    paper: ClassVar[str] = "Djurisic 2023"
    cost: ClassVar[str] = "C·D"
    variant: ClassVar[ASHVariant] = "b"

    percentile: Percentile = 65.0
