"""What a detector is made of, apart from the study that it comes from: plain values and arrays, and no code.

`stages.detection.deciding` takes them out of a study, `stages.detection.bundle` stores them in a file, and
`stages.detection.detector` scores images by them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache import FeatureSpec
from stages.config import ExpertKind, RouterInput
from stages.detection.detectors import Scales
from stages.detection.subject import Head
from stages.scorers import needs_of
from stages.scorers.scorer import ScorerState

NO_EXPERT = "none"


@dataclass(frozen=True, eq=False)
class NetworkParts:
    """The network, but its weights.

    Attributes:
        config: fields of `stages.config.BackboneConfig`; ``weights`` says where they come from.
        expert_blocks: how many last blocks or stages lie behind the tap.
    """

    config: dict[str, Any]
    expert_blocks: int


@dataclass(frozen=True, eq=False)
class MixtureParts:
    """A trained mixture: its shape, as of `stages.mixture.config.MixtureConfig`, and its tensors."""

    groups: tuple[int, ...]
    kind: ExpertKind
    router_input: RouterInput
    copies: int
    tensors: dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class ScoreParts:
    """A summand of the score: the fitted score, and whose logits it reads (``"none"``: nobody's)."""

    scorer: ScorerState
    head: str


@dataclass(frozen=True, eq=False)
class CalibrationRows:
    """The rows that thresholds and p-values come from.

    Attributes:
        scores: ``[n]`` float32, higher = more OOD.
        expert: ``[n]`` that each went to; None without experts.
        prediction: ``[n]`` number of the class that each was taken for.
        exact: whether what they promise holds exactly, see `stages.detection.detectors.FittedDetector.is_exact`.
    """

    scores: NDArray[np.float32]
    expert: NDArray[np.int64] | None
    prediction: NDArray[np.int32]
    exact: bool


@dataclass(frozen=True, eq=False)
class Examples:
    """ID training images of an expert, or all where there are none: ids, and features ``[n, D]`` to search among."""

    ids: tuple[str, ...]
    features: NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class DetectorParts:
    """All that says how OOD an image is, but the weights of the network.

    Attributes:
        spec: of the features, fields of `cache.FeatureSpec`: network, transform, types, the network's digest.
        network: None where features come without one.
        mixture: None where the backbone's own features are scored.
        heads: linear heads that are read, by name; one for all rows, or one for each expert.
        head: whose class an image is called by.
        score: name, ``"a+b"`` for a sum.
        scores: the summands.
        scales: what makes them addable.
        calibration: of thresholds and p-values.
        class_names: of the study.
        examples: ID training images by the number of their expert, or ``none``.
    """

    spec: dict[str, Any]
    network: NetworkParts | None
    mixture: MixtureParts | None
    heads: dict[str, Head]
    head: str
    score: str
    scores: tuple[ScoreParts, ...]
    scales: Scales
    calibration: CalibrationRows
    class_names: tuple[str, ...]
    examples: dict[str, Examples]


def of_scores(spec: FeatureSpec, parts: DetectorParts) -> FeatureSpec:
    """What of its features a network is to make: without taps where none of a detector's scores reads them."""
    return spec if any("taps" in needs_of(part.scorer.name) for part in parts.scores) else spec.without_taps()


@dataclass(frozen=True, eq=False)
class GoldenRows:
    """Rows whose scores are known, to be scored again wherever the detector is started.

    Attributes:
        sets: the set of each, by the study's names.
        ids: of each.
        images: pixels ``[h, w, 3]`` after decoding; None where the detector takes features.
        features: arrays ``[n, …]`` as a cache has them; None where it takes images.
        values: what came of them on the way, in order: of the network, of the experts, of each summand, by name.
        score: ``[n]``.
        decision: of each.
    """

    sets: tuple[str, ...]
    ids: tuple[str, ...]
    images: tuple[NDArray[np.uint8], ...] | None
    features: dict[str, NDArray[np.floating]] | None
    values: dict[str, NDArray[Any]]
    score: NDArray[np.float32]
    decision: tuple[str, ...]
