"""The detector of a study that decides of new images: which score, on which features; and what it is made of."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stages.config import ScoreConfig
from stages.context import Context
from stages.detection.auto import AutoScore
from stages.detection.detector import Detector, Per
from stages.detection.detectors import FittedDetector
from stages.detection.factory import DetectorFactory
from stages.detection.frozen import FrozenFeatures
from stages.detection.parts import (
    NO_EXPERT,
    CalibrationRows,
    DetectorParts,
    Examples,
    MixtureParts,
    NetworkParts,
    ScoreParts,
    of_scores,
)
from stages.detection.refined import RefinedFeatures
from stages.detection.sources import BackboneSource
from stages.detection.subject import NO_HEAD, Head
from stages.detection.torch_runtime import TorchRuntime
from stages.errors import InputError
from stages.id_data.lazy import Floats
from stages.progress import NullProgress, Progress
from stages.scorers import AUTO, FROZEN

if TYPE_CHECKING:
    from stages.networks.backbone import Backbone


class DecidingDetector:
    """The fitted detector of a study: everything it learnt, it learnt from ID rows.

    Args:
        source: a backbone with its trained mixtures; the first one is used, or the frozen features where there is none.
        config: scores, k, temperature.
        score: name.
        head: whose logits it reads, and whose class an image is called by, where it applies.
        progress: of what has to be refined first.
        choices: folder where what ``auto`` chose is kept; None: it is chosen here.

    Attributes:
        source: as the argument.
        fitted: the detector.

    Raises:
        InputError: an unknown score, or one that needs what these features do not have.
    """

    def __init__(
        self,
        source: BackboneSource,
        config: ScoreConfig,
        score: str,
        head: str,
        progress: Progress | None = None,
        choices: Path | None = None,
    ) -> None:
        self.source = source
        self._refined: RefinedFeatures | None = None
        self._frozen = FrozenFeatures(source)
        if source.mixtures:
            self._refined = RefinedFeatures(source, source.mixtures[0], Context(progress or NullProgress()))
        self._factory = DetectorFactory((self._refined or self._frozen).subject(), config)
        self.fitted = self._chosen(config, choices) if score == AUTO else self._asked(score, head)

    def _chosen(self, config: ScoreConfig, choices: Path | None) -> FittedDetector:
        """What ``auto`` is; where that looks at the backbone's own features alone, no expert is needed."""
        frozen = DetectorFactory(self._frozen.subject(), config) if self._refined else self._factory
        found = AutoScore(self.source, choices).detector(self._factory, frozen)
        if not found.subject.n_experts:
            self._refined, self._factory = None, frozen
        return found

    def _asked(self, score: str, head: str) -> FittedDetector:
        heads = self._factory.heads_of(score)
        if not heads:
            raise InputError(f"{score} needs {self._factory.why_not(score)}: ask for another")
        # A score on features alone still wants a head: its class is what the image is called.
        return self._factory.detector(head if heads == (NO_HEAD,) or head in heads else heads[0], score)

    def detector(self, per: Per = "all") -> Detector:
        """It scores new images in this process, by the study's own networks.

        Args:
            per: as of `Detector`.
        """
        mixture = None if self._refined is None else self._refined.mixture()
        spec, backbone = of_scores(self.source.data.train.spec, self.parts), self._running_network()
        return Detector(self.parts, TorchRuntime(spec, backbone, mixture, self._reads_patches, self.device), per=per)

    @property
    def device(self) -> str:
        """Kind of the device that its network runs on."""
        network = self._running_network()
        return "cpu" if network is None else network.device.type

    @property
    def takes_images(self) -> bool:
        """Whether it scores images, and not features that were made elsewhere."""
        return not self.source.data.train.spec.origin and self.source.network is not None

    @property
    def _reads_patches(self) -> bool:
        return any("patches" in part.scorer.needs for part in self.fitted.parts)

    def _running_network(self) -> "Backbone | None":
        """The network with its weights, where rows go through it."""
        return self.source.network() if self.source.network and (self.takes_images or self._reads_patches) else None

    def _heads_read(self) -> dict[str, Head]:
        """Linear heads that say the class, or that a summand reads, by the names that summands have for them."""
        heads = (self._refined or self._frozen).row_heads() | {
            FROZEN + name: head for name, head in self._frozen.row_heads().items()
        }
        read = {self.fitted.head, *(part.head for part in self.fitted.parts)}
        return {name: head for name, head in heads.items() if name in read}

    @cached_property
    def parts(self) -> DetectorParts:
        """What it is made of, but the weights of the network."""
        fitted, data = self.fitted, self.source.data
        return DetectorParts(
            spec=data.train.spec.to_dict(),
            network=self._network_parts(),
            mixture=None if self._refined is None else _mixture_parts(self._refined),
            heads=self._heads_read(),
            head=fitted.head,
            score=fitted.score,
            scores=tuple(ScoreParts(part.scorer.state(), part.head) for part in fitted.parts),
            scales=fitted.scales,
            calibration=self._calibration(),
            class_names=tuple(data.class_names),
            examples=self._examples(),
        )

    def weights(self) -> dict[str, NDArray[Any]] | None:
        """Tensors of the network; None where features come without one."""
        if self.source.network is None:
            return None
        model = self.source.network().model
        return {name: np.array(tensor.cpu().numpy(), order="C") for name, tensor in model.state_dict().items()}

    def graph(self) -> bytes:
        """The network and its experts as ONNX, see `stages.detection.graph`.

        Raises:
            InputError: it takes no images; no onnx here; or what ONNX has no operation for.
        """
        from stages.detection.graph import export_graph

        network = self._running_network()
        if network is None or not self.takes_images:
            raise InputError("--onnx: this detector takes features: there is no network to export")
        mixture = None if self._refined is None else self._refined.mixture()
        spec = of_scores(self.source.data.train.spec, self.parts)
        return export_graph(network, mixture, spec, self._reads_patches)

    def _network_parts(self) -> NetworkParts | None:
        if self.source.network is None:
            return None
        network = self._running_network() or self.source.architecture()
        return NetworkParts(network.config.model_dump(mode="json"), network.expert_blocks)

    def _calibration(self) -> CalibrationRows:
        subject, head = self.fitted.subject, self.fitted.head
        predicted: list[NDArray[np.int32]] = [run.calibrate.predictions()[head] for run in subject.calibrating]
        return CalibrationRows(
            scores=np.asarray(self.fitted.calibration_scores, dtype=np.float32),
            expert=subject.calibration_expert,
            prediction=np.concatenate(predicted),
            exact=self.fitted.is_exact,
        )

    def _examples(self) -> dict[str, Examples]:
        """ID training images by expert, as scores that search among them hold them."""
        bank, data = self.fitted.subject.bank, self.source.data
        ids = data.train.ids[data.split.final_train]
        rows: Mapping[str, NDArray[np.intp]] = {NO_EXPERT: np.arange(len(bank))}
        if bank.expert is not None:
            rows = {str(expert): np.flatnonzero(bank.expert == expert) for expert in np.unique(bank.expert).tolist()}
        found = {}
        for name, own in rows.items():
            features: Floats = np.asarray(bank.features[own])
            found[name] = Examples(tuple(map(str, ids[own])), features)
        return found


def _mixture_parts(refined: RefinedFeatures) -> MixtureParts:
    mixture = refined.mixture()
    config = mixture.config
    tensors = {name: np.array(tensor.cpu().numpy(), order="C") for name, tensor in mixture.state_dict().items()}
    return MixtureParts(config.groups, config.kind, config.router_input, config.copies, tensors)
