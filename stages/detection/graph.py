"""A detector's network as one ONNX graph: pixels in, what a cache would hold and what experts make of it out.

Every expert is computed for every image, and the routed one's rows are gathered: so the graph has no loop, no branch,
and one shape for a batch of any size. An image costs E ends instead of one.

It is written by torch's exporter that traces: the newer one takes twenty times as long, and writes this machine's paths
into the file.
"""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from cache import FeatureSpec
from stages.detection.onnx_runtime import PIXELS, needs_extra, onnxruntime_library
from stages.errors import InputError
from stages.mixture.model import MixtureOfFeatureExperts
from stages.networks.backbone import Backbone
from stages.networks.pillow_transform import PillowTransform
from stages.networks.surgery import restore_forward
from stages.networks.taps import stacked
from stages.networks.tokens import Tokens, reduce_patches
from stages.networks.weights.loading import first_line

OPSET = 18


class NetworkGraph(nn.Module):
    """What is traced.

    Args:
        backbone: on the CPU, in float32, traced by nobody else: tracing changes what it knows of its shapes.
        mixture: trained; None where the backbone's own features are scored.
        spec: what a cache of these features holds: experts see features as it stores them. Taps are wanted where it has
            them.
        patches: whether patch tokens after the final norm are wanted.

    Attributes:
        names: of what `forward` gives, in order.
    """

    member: Tensor
    pool: Tensor

    def __init__(
        self, backbone: Backbone, mixture: MixtureOfFeatureExperts | None, spec: FeatureSpec, patches: bool
    ) -> None:
        super().__init__()
        self._backbone = backbone
        self._dtype = getattr(torch, spec.dtype)
        self._option = spec.patches
        self._taps = spec.taps
        self.model = backbone.model
        self.mixture = mixture
        self.end = backbone.end() if patches else None
        self.register_buffer("pool", _pooling(backbone, spec.patches))
        if mixture is not None:
            self.register_buffer("member", nn.functional.one_hot(mixture.group, mixture.n_experts).float())
        self.names: tuple[str, ...] = ()

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """``[n, 3, H, W]`` uint8 to the rows of each of `names`."""
        backbone = self._backbone
        with backbone.taps.reading(self._taps) as read:
            tokens = self._stored(backbone.tokens(backbone.preprocessing.normalise(pixels)))
        found = {"cls": tokens.cls, "tap_cls": tokens.tap_cls}
        if self._taps:
            found["taps"] = stacked(read).to(self._dtype).float()
        if self.mixture is not None:
            found |= self._behind(self.mixture, tokens)
        if self.end is not None:
            found["patches"] = self.end.patch_tokens(tokens)
        self.names = tuple(found)
        return tuple(found.values())

    def _stored(self, tokens: Tokens) -> Tokens:
        """As they come back from a cache."""
        if self._option == "none":
            tokens = reduce_patches(tokens, (0, 0), "none")
        elif self._option != "full":
            tokens = Tokens(tokens.cls, tokens.tap_cls, tokens.registers, self.pool @ tokens.patches)
        return tokens.map(lambda x: x.to(self._dtype).float())

    def _behind(self, mixture: MixtureOfFeatureExperts, tokens: Tokens) -> dict[str, Tensor]:
        """Router, and what its choice makes of each row."""
        router_logits = mixture.class_logits(tokens)
        gate = router_logits.softmax(1) @ self.member
        expert = gate.argmax(1)
        features, outputs = zip(*(each(tokens) for each in mixture.experts), strict=True)
        found = {"router_logits": router_logits, "gate": gate, "expert": expert}
        found["features"] = _routed(features, expert)
        found["logits"] = _routed([self._of_classes(mixture, n, each) for n, each in enumerate(outputs)], expert)
        if mixture.config.has_other:
            others = [each[:, -1:] for each in outputs]
            found["other"] = _routed(others, expert)[:, 0]
            if mixture.config.kind == "frozen":
                odds = [each[:, -1] - each[:, :-1].logsumexp(1) for each in outputs]
                found["others"] = torch.stack(odds, dim=1)
        return found

    @staticmethod
    def _of_classes(mixture: MixtureOfFeatureExperts, number: int, outputs: Tensor) -> Tensor:
        """``[n, C]`` of an expert's head, −inf outside its group."""
        own = mixture.group == number
        return torch.where(own, outputs[:, mixture.column.where(own, 0)], -torch.inf)


def _routed(by_expert: Sequence[Tensor], expert: Tensor) -> Tensor:
    """Of ``[n, …]`` of each expert, the rows of the one that each went to."""
    stacked = torch.stack(list(by_expert), dim=1)
    return stacked.gather(1, expert[:, None, None].expand(-1, 1, stacked.shape[2]))[:, 0]


def _pooling(backbone: Backbone, option: str) -> Tensor:
    """``[P', P]`` that pools patches as the option asks: ONNX knows adaptive pooling of some sizes alone."""
    if not option.startswith("pool:"):
        return torch.zeros(0)
    height, width = backbone.grid
    unit = torch.eye(height * width)[None]
    empty = unit[:, 0]
    return reduce_patches(Tokens(empty, empty, unit, unit), backbone.grid, option).patches[0]


def require_onnx() -> None:
    """Refuse to export where what writes a graph, or what proves it, is missing.

    Raises:
        InputError: it is.
    """
    with needs_extra("--onnx"):
        import onnx  # noqa: F401  # torch's exporter does
    onnxruntime_library("--onnx")


def export_graph(
    backbone: Backbone, mixture: MixtureOfFeatureExperts | None, spec: FeatureSpec, patches: bool = False
) -> bytes:
    """A network, and the experts behind it, as ONNX; the same network gives the same bytes.

    Args:
        backbone: with its weights, on any device; it stays as it is.
        mixture: likewise.
        spec: of the features.
        patches: whether patch tokens after the final norm are wanted.

    Raises:
        InputError: there is no onnx here, a transform that only torch does, or a part of the network that ONNX has no
            operation for.
    """
    require_onnx()
    PillowTransform(spec.transform)
    model = copy.deepcopy(backbone.model).cpu()
    restore_forward(model)
    config = backbone.config.model_copy(update={"precision": "float32", "compile": False})
    own = Backbone(model, config, backbone.expert_blocks)
    graph = NetworkGraph(own, None if mixture is None else copy.deepcopy(mixture).cpu().eval(), spec, patches).eval()
    side = spec.image_size
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        graph(pixels)
        return _traced(graph, pixels, config.name)


def _traced(graph: NetworkGraph, pixels: Tensor, name: str) -> bytes:
    names = list(graph.names)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is the older exporter; that sizes of images become constants
        path = Path(folder) / "model.onnx"
        try:
            torch.onnx.export(
                graph,
                (pixels,),
                path,
                input_names=[PIXELS],
                output_names=names,
                dynamic_axes={each: {0: "n"} for each in (PIXELS, *names)},
                opset_version=OPSET,
                dynamo=False,
            )
        except RuntimeError as error:  # of the exporter, also where one file of ONNX cannot hold it: more than 2 GiB
            raise InputError(f"--onnx: {name} cannot be written as ONNX: {first_line(error)[:200]}") from error
        return path.read_bytes()
