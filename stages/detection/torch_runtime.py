"""A detector's network run by torch, as an extraction runs it: passes of one shape, one thread each, side by side."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import nn

from cache import CacheError, FeatureSpec
from cache.spec import first_difference
from stages.config import BackboneConfig
from stages.detection.parts import DetectorParts, MixtureParts, NetworkParts, of_scores
from stages.detection.runtime import NetworkRows
from stages.errors import InputError
from stages.extraction.encoder import Encoder
from stages.extraction.gpu_jpeg import decode_left
from stages.extraction.passes import Together, pool_of_passes
from stages.extraction.reader import ReadImage
from stages.id_data.lazy import Floats
from stages.id_data.split import Rows
from stages.id_data.tokens import as_tokens
from stages.inputs.images import ImageError, decode_image, undecoded_jpeg
from stages.mixture.config import MixtureConfig
from stages.mixture.model import MixtureOfFeatureExperts, build_mixture
from stages.mixture.refine import refine_tokens
from stages.mixture.refined import Refined
from stages.networks.backbone import Backbone, load_backbone
from stages.networks.compute import COMPUTE_BATCH
from stages.networks.ends import BackboneEnd
from stages.networks.preprocessing import check_decode
from stages.networks.repeatable import repeatable
from stages.networks.tokens import Tokens
from stages.networks.weights.loading import TRANSFORM_KEYS, create_model, model_shape
from stages.scorers import needs_of


class TorchRuntime:
    """Runs a backbone and the experts behind it.

    Args:
        spec: what a cache of these features holds; without taps where nobody reads them.
        backbone: None where features come without one.
        mixture: trained; None where the backbone's own features are scored.
        patches: whether patch tokens after the final norm are wanted.
        device: where the experts run.

    Attributes:
        size, reads, batch, whole, side_by_side: as of `stages.detection.runtime.Runtime`.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        backbone: Backbone | None,
        mixture: MixtureOfFeatureExperts | None,
        patches: bool = False,
        device: str = "cpu",
    ) -> None:
        self._backbone = backbone
        self._mixture = mixture if mixture is None else mixture.eval().to(device)
        self._patches = patches
        self._device = device
        self._computing = Together(self._pool)
        self._batch = COMPUTE_BATCH.get(device, COMPUTE_BATCH["cuda"])
        self.side_by_side = torch.get_num_threads() if device == "cpu" else 1
        own = frozenset(("cls",) if mixture is None else mixture.config.reads)
        own |= {"tap_cls", "registers", "patches"} if patches else frozenset()
        self.reads = (own | {"taps"}) & set(spec.datasets())
        # Where nobody reads patch tokens, a cache without them has the same other features.
        self._spec = spec if "patches" in self.reads else replace(spec, patches="none", grid=(0, 0))
        self.size = 0 if spec.origin or backbone is None else spec.image_size

    def prepare(self, data: bytes) -> NDArray[np.uint8]:
        """See `stages.detection.runtime.Runtime`."""
        network, how = self._network, self._network.preprocessing
        if how.decode == "cuda" and (jpeg := undecoded_jpeg(data)) is not None:
            (decoded,) = decode_left([ReadImage(b"", jpeg)], how, network.device)
            if isinstance(decoded.content, str):
                raise ImageError(decoded.content)
            return decoded.content.cpu().numpy()
        return how.pixels(decode_image(data, how.least_side)).numpy()

    def run(self, pixels: NDArray[np.uint8]) -> NetworkRows:
        """See `stages.detection.runtime.Runtime`; batches that are not full are padded, as in an extraction."""
        encoder = self._encoder
        batches = [pixels[start : start + encoder.batch] for start in range(0, len(pixels), encoder.batch)]

        def encode(batch: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
            return {name: np.array(rows) for name, rows in encoder.encode(list(torch.from_numpy(batch))).items()}

        with self._computing() as pool:
            encoded = list(pool.map(encode, batches))
            stored = {name: np.concatenate([each[name] for each in encoded]) for name in encoded[0]}
            return self._behind(stored, pool)

    def run_in_float32(self, pixels: NDArray[np.uint8]) -> NetworkRows:
        """See `stages.detection.runtime.Runtime`."""
        with self._network.computing_in("float32"):
            return self.run(pixels)

    def run_stored(self, arrays: Mapping[str, NDArray[Any]]) -> NetworkRows:
        """See `stages.detection.runtime.Runtime`."""
        with self._computing() as pool:
            return self._behind(arrays, pool)

    @contextmanager
    def _pool(self) -> Iterator[Executor]:
        """Threads of passes, which all callers share: torch counts threads, and has flags, for the whole process."""
        threads = torch.get_num_threads()
        try:
            with repeatable(self._device), pool_of_passes(self.side_by_side, self._device) as pool:
                yield pool
        finally:
            torch.set_num_threads(threads)

    def _behind(self, stored: Mapping[str, NDArray[Any]], pool: Executor) -> NetworkRows:
        """What stands behind the backbone; passes have one shape, so that a row's bits are the same in any company."""
        n = len(stored["cls"])
        everybody = [np.arange(start, min(start + self._batch, n)) for start in range(0, n, self._batch)]
        kept = {name: stored[name] for name in ("cls", "tap_cls", "logits", "taps") if name in stored}
        refined = None
        if self._mixture is not None:
            chosen = np.concatenate(list(pool.map(lambda rows: self._route(stored, rows), everybody)))
            refined = self._refine(stored, chosen, pool)
        patches = None
        if self._patches:
            patches = np.concatenate(list(pool.map(lambda rows: self._patch_tokens(stored, rows), everybody)))
        return NetworkRows(kept, refined, patches)

    def _refine(self, stored: Mapping[str, NDArray[Any]], expert: NDArray[np.int64], pool: Executor) -> Refined:
        """Rows by their experts, those of one together."""
        order = [np.flatnonzero(expert == each) for each in np.unique(expert)]
        batches = [rows[start : start + self._batch] for rows in order for start in range(0, len(rows), self._batch)]
        found = list(pool.map(lambda rows: self._pass(stored, rows, int(expert[rows[0]])), batches))
        back = np.argsort(np.concatenate(batches))
        return Refined(**{name: np.concatenate([vars(each)[name] for each in found])[back] for name in vars(found[0])})

    @torch.inference_mode()
    def _route(self, stored: Mapping[str, NDArray[Any]], rows: Rows) -> NDArray[np.int64]:
        assert self._mixture is not None
        gate, _ = self._mixture.route(self._padded(stored, rows, self._device))
        return gate.argmax(1).cpu().numpy()[: len(rows)]

    def _pass(self, stored: Mapping[str, NDArray[Any]], rows: Rows, expert: int) -> Refined:
        assert self._mixture is not None
        tokens = self._padded(stored, rows, self._device)
        found = refine_tokens(self._mixture, tokens, torch.full((len(tokens),), expert, device=self._device))
        return found[np.arange(len(rows))]

    @torch.inference_mode()
    def _patch_tokens(self, stored: Mapping[str, NDArray[Any]], rows: Rows) -> Floats:
        return self._end.patch_tokens(self._padded(stored, rows, "cpu")).numpy()[: len(rows)]

    def _padded(self, stored: Mapping[str, NDArray[Any]], rows: Rows, device: str) -> Tokens:
        """A full batch of rows as float32 tokens, the last row repeated."""
        some = np.concatenate([rows, np.full(self._batch - len(rows), rows[-1])])
        return as_tokens({name: torch.from_numpy(array[some]).to(device) for name, array in stored.items()})

    @property
    def batch(self) -> int:
        """See `stages.detection.runtime.Runtime`: with experts as many as may fill a pass of each."""
        return self.whole if self._mixture is None else self.whole * self._mixture.config.n_experts

    @property
    def whole(self) -> int:
        """See `stages.detection.runtime.Runtime`."""
        return self._batch if self._backbone is None else self._encoder.batch

    @property
    def _network(self) -> Backbone:
        if self._backbone is None:
            raise InputError("this detector has no network: it takes features, not images")
        return self._backbone

    @cached_property
    def _encoder(self) -> Encoder:
        spec, device = self._spec, self._network.device.type
        if spec.compute.get("device") != device:
            # One image in a pass as large as another device's would cost as much as hundreds.
            spec = replace(spec, compute={**spec.compute, "batch": self._batch})
        return Encoder(self._network, spec)

    @cached_property
    def _end(self) -> BackboneEnd:
        return self._network.end()


def load_runtime(parts: DetectorParts, weights: Mapping[str, NDArray[Any]] | None, device: str) -> TorchRuntime:
    """The network of a detector that was stored.

    Args:
        parts: the detector's.
        weights: of the backbone; None where they are not in the file.
        device: where it runs.

    Raises:
        InputError: parts that do not go together, weights that cannot be had or are others, no such device.
    """
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {device!r} given, and torch finds {torch.cuda.device_count() or 'no'} GPU here")
    try:
        spec = FeatureSpec.from_dict(parts.spec)
    except CacheError as error:
        raise InputError(f"spec: {error}") from error
    patches = any("patches" in needs_of(part.scorer.name) for part in parts.scores)
    backbone = _stored_backbone(parts, spec, weights, device)
    mixture = None
    if parts.mixture is not None:
        mixture = _stored_mixture(parts.mixture, spec, backbone)
    return TorchRuntime(of_scores(spec, parts), backbone, mixture, patches, device)


def _stored_backbone(
    parts: DetectorParts, spec: FeatureSpec, weights: Mapping[str, NDArray[Any]] | None, device: str
) -> Backbone | None:
    if parts.network is None:
        return None
    config = _stored_config(parts.network, spec)
    blocks = parts.network.expert_blocks
    check_decode(config, device)
    if weights is None:
        backbone = load_backbone(config, blocks, device)
    else:
        _check_shapes(model_shape(config), weights, f"weights of {config.name}")
        model = create_model(config)
        model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})
        backbone = Backbone(model, config, blocks, device)
    dtype: Literal["float16", "float32"] = "float16" if spec.dtype == "float16" else "float32"
    found = backbone.feature_spec(dtype, spec.patches, None if spec.origin else spec.taps or None).to_dict()
    # Of features that were made elsewhere the network's weights alone are known; where it runs golden rows tell.
    compared = {"weights_sha"} if spec.origin else found.keys() - {"compute"}
    ours, theirs = ({key: body.get(key) for key in sorted(compared)} for body in (spec.to_dict(), found))
    if difference := first_difference(ours, theirs):
        raise InputError(f"the network here is not the detector's: {difference}")
    return backbone


def _stored_config(network: NetworkParts, spec: FeatureSpec) -> BackboneConfig:
    """What the network is built from, with the transform and the precision that the features were made with."""
    asked = {name: spec.transform[name] for name in TRANSFORM_KEYS if name in spec.transform}
    precision = {name: spec.compute[name] for name in ("precision", "batch") if name in spec.compute}
    try:
        return BackboneConfig(**{**network.config, **asked, **precision, "compile": False})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["network.config", *map(str, first["loc"])])
        raise InputError(f"{key}: {first['msg'][:120]}") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"network.config: {str(error).splitlines()[-1][:120]}") from error


def _check_shapes(model: nn.Module, tensors: Mapping[str, NDArray[Any]], what: str) -> None:
    """Refuse tensors that are not those of a network, before it is built."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: array.shape for name, array in tensors.items()}
    if wanted != given:
        names = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        name = names[0]
        raise InputError(f"{what}: {name[:60]!a} is {given.get(name, 'missing')}, not {wanted.get(name, 'there')}")


def _stored_mixture(stored: MixtureParts, spec: FeatureSpec, backbone: Backbone | None) -> MixtureOfFeatureExperts:
    groups, tensors = stored.groups, stored.tensors
    experts = set(groups)
    if not groups or experts != set(range(len(experts))) or not 1 <= stored.copies <= len(tensors):
        raise InputError("mixture.groups: must be numbers from 0 on, none left out")
    config = MixtureConfig(spec.cls_dim, spec.tap_dim, groups, stored.kind, stored.router_input, stored.copies)
    # Sizes that are only said could be any: what is allocated is what the tensors themselves have.
    shapes = {"router.linear.weight": (config.n_classes, config.router_dim)}
    shapes |= {f"experts.{e}.head.weight": (config.n_outputs(e), config.dim) for e in range(config.n_experts)}
    if wrong := [name for name, shape in shapes.items() if name not in tensors or tensors[name].shape != shape]:
        raise InputError(f"mixture.tensors: {wrong[0]} must be {shapes[wrong[0]]}")
    mixture = build_mixture(config, lambda: _end_of(backbone, stored.kind))
    _check_shapes(mixture, tensors, "mixture.tensors")
    mixture.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in tensors.items()})
    return mixture


def _end_of(backbone: Backbone | None, kind: str) -> BackboneEnd:
    if backbone is None:
        raise InputError(f'mixture.kind: "{kind}" is made of the end of a network, and there is none')
    return backbone.end()
