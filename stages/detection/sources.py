"""All that is on disk of one backbone, for scoring."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cache import FeatureCache
from stages.heads.choose import FittedHeads
from stages.id_data.rows import IdData

if TYPE_CHECKING:
    from stages.networks.backbone import Backbone


CS_ID = "cs-id"  # group of the covariate-shifted ID sets: other images of the ID classes, in no average of OOD sets


@dataclass(frozen=True)
class ScoredSet:
    """A set to score: its cache, and ``id``, ``near``, ``far`` or `CS_ID`."""

    name: str
    group: str
    cache: FeatureCache


@dataclass(frozen=True)
class MixtureFolder:
    """A trained mixture on disk.

    Attributes:
        variant: its name.
        seed: that it was trained with.
        path: of its folder.
        scores: those of the study's that its features are judged by; None for all.
    """

    variant: str
    seed: int
    path: Path
    scores: tuple[str, ...] | None = None


@dataclass(frozen=True)
class BackboneSource:
    """All that stage three needs of one backbone.

    Attributes:
        name: ``pretrained`` or ``finetuned``.
        seed: of the fine-tune; None for the pre-trained backbone.
        data: ID features and split.
        probe: the linear probe.
        finetuned_head: weight ``[C, D]`` and bias ``[C]`` that were trained with the backbone, if it was.
        mixtures: trained on its cache.
        tests: the ID test set, the OOD sets and the covariate-shifted ID sets, as this backbone sees them.
        architecture: gives the untrained network, whose end stored experts are loaded into.
        network: gives the network that the caches were made with, whose end makes patch tokens; None where there is
            none to be had.
        models: digests of all that was trained on its cache, by their bytes.
        pseudo: images that play OOD for ``auto``, made of its ID images; None where there are none.
    """

    name: str
    seed: int | None
    data: IdData
    probe: FittedHeads
    finetuned_head: tuple[NDArray[np.float32], NDArray[np.float32]] | None
    mixtures: tuple[MixtureFolder, ...]
    tests: tuple[ScoredSet, ...]
    architecture: "Callable[[], Backbone]"
    network: "Callable[[], Backbone] | None" = None
    models: Mapping[str, str | None] = field(default_factory=dict)
    pseudo: FeatureCache | None = None
