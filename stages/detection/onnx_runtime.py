"""A detector's network run by ONNX Runtime: neither torch nor timm is imported."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cache import CacheError, FeatureSpec
from stages.config import LARGEST_SIDE
from stages.detection.onnx_file import check_graph
from stages.detection.parts import DetectorParts, MixtureParts, of_scores
from stages.detection.runtime import NetworkRows
from stages.errors import InputError
from stages.inputs.images import decode_image
from stages.machine import usable_cores
from stages.mixture.refined import Refined
from stages.networks.compute import COMPUTE_BATCH
from stages.networks.pillow_transform import PillowTransform
from stages.scorers import needs_of

PIXELS = "pixels"  # the graph's input

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_SETTINGS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}  # float32 means float32, as for torch


@contextmanager
def needs_extra(what: str) -> Iterator[None]:
    """Around an import of what the extra ``export`` brings.

    Raises:
        InputError: it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(f"{what} needs {error.name}: pip install 'mofe-feature-cache[export]'") from error


class OnnxRuntime:
    """Runs a graph of `stages.detection.graph`.

    Args:
        session: of the graph.
        spec: of the detector's features; without taps where the graph gives none.
        mixture: of the detector.
        patches: whether the graph gives patch tokens after the final norm.
        batch: images of a pass, the last one repeated, so that a row's bits are the same in any company.

    Attributes:
        size, reads, batch, whole, side_by_side: as of `stages.detection.runtime.Runtime`.

    Raises:
        InputError: a transform that only torch does, or a graph that is not of this network.
    """

    def __init__(
        self,
        session: Any,
        spec: FeatureSpec,
        mixture: MixtureParts | None,
        patches: bool = False,
        batch: int = COMPUTE_BATCH["cpu"],
    ) -> None:
        self._session = session
        self._spec = spec
        self._mixture = mixture
        self._patches = patches
        self.batch = self.whole = batch
        self.side_by_side = 1  # a pass has all cores
        self._transform = PillowTransform(spec.transform)
        self.size = spec.image_size
        if not 0 < self.size == self._transform.size <= LARGEST_SIDE:
            said = f"{self.size} given, its transform makes {self._transform.size}"
            raise InputError(f"spec.image_size: {said}, {LARGEST_SIDE} is the most")
        self._stored = tuple(name for name in ("cls", "tap_cls", "taps") if name != "taps" or spec.taps)
        self.reads = frozenset(self._stored) - {"tap_cls"}
        self._shapes = _row_shapes(spec, mixture, patches)
        self._names = list(self._shapes)
        taken, given = (
            {each.name: each.type for each in side} for side in (session.get_inputs(), session.get_outputs())
        )
        wanted = {name: "tensor(int64)" if name == "expert" else "tensor(float)" for name in self._names}
        if taken != {PIXELS: "tensor(uint8)"} or given != wanted:
            said = f"{', '.join(given)[:80]!a} of {', '.join(taken)[:20]!a}"
            raise InputError(f"model.onnx: makes {said}, not this detector's features")

    def with_batch(self, batch: int) -> Self:
        """The same with passes of so many images."""
        return type(self)(self._session, self._spec, self._mixture, self._patches, batch)

    def prepare(self, data: bytes) -> NDArray[np.uint8]:
        """See `stages.detection.runtime.Runtime`."""
        return self._transform.pixels(decode_image(data, self._transform.least_side))

    def run(self, pixels: NDArray[np.uint8]) -> NetworkRows:
        """See `stages.detection.runtime.Runtime`."""
        starts = range(0, len(pixels), self.batch)
        passes = [self._pass(pixels[start : start + self.batch]) for start in starts]
        found = {name: np.concatenate([each[name] for each in passes]) for name in self._names}
        dtype = np.dtype(self._spec.dtype)
        stored = {name: found[name].astype(dtype) for name in self._stored}
        return NetworkRows(stored, _refined(found), found.get("patches"))

    def run_in_float32(self, pixels: NDArray[np.uint8]) -> NetworkRows:
        """See `stages.detection.runtime.Runtime`: a graph computes in nothing else."""
        return self.run(pixels)

    def run_stored(self, arrays: Mapping[str, NDArray[Any]]) -> NetworkRows:
        """See `stages.detection.runtime.Runtime`; the graph begins with images, so that only what needs none of it.

        Raises:
            InputError: something of the graph stands behind the features.
        """
        if self._shapes.keys() - {*self._stored}:
            raise InputError('by onnx this detector takes images alone: load it with runtime="torch" for features')
        return NetworkRows({name: arrays[name] for name in self._stored if name in arrays})

    def _pass(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        padded = np.concatenate([pixels, np.repeat(pixels[-1:], self.batch - len(pixels), axis=0)])
        try:
            rows = dict(zip(self._names, self._session.run(self._names, {PIXELS: padded}), strict=True))
        except Exception as error:  # its own types, one for each status of the library
            raise InputError(f"model.onnx: fails: {' '.join(str(error).split())[:120]}") from error
        for name, shape in self._shapes.items():
            if rows[name].shape[:1] != (len(padded),) or (shape is not None and rows[name].shape[1:] != shape):
                raise InputError(f"model.onnx: makes {name} of shape {rows[name].shape}, must be [n, {str(shape)[1:]}")
        return {name: array[: len(pixels)] for name, array in rows.items()}


def _row_shapes(spec: FeatureSpec, mixture: MixtureParts | None, patches: bool) -> dict[str, tuple[int, ...] | None]:
    """What the graph of a detector gives, and the shape of a row of it; None: whatever it is."""
    shapes: dict[str, tuple[int, ...] | None] = {"cls": (spec.cls_dim,), "tap_cls": (spec.tap_dim,)}
    if mixture is not None:
        n_classes, n_experts = len(mixture.groups), max(mixture.groups) + 1
        shapes |= {"router_logits": (n_classes,), "gate": (n_experts,), "expert": ()}
        shapes |= {"features": (spec.cls_dim,), "logits": (n_classes,)}
        if n_experts > 1:
            shapes["other"] = ()
            if mixture.kind == "frozen":
                shapes["others"] = (n_experts,)
    if spec.taps:
        shapes["taps"] = spec.datasets()["taps"][0]
    if patches:
        shapes["patches"] = None
    return shapes


def _refined(found: Mapping[str, NDArray[Any]]) -> Refined | None:
    if "expert" not in found:
        return None
    n = len(found["expert"])
    return Refined(
        features=found["features"],
        logits=found["logits"],
        other=found.get("other", np.full(n, -np.inf, np.float32)),
        expert=found["expert"],
        gate=found["gate"],
        router_class=found["router_logits"].argmax(axis=1),
        others=found.get("others", np.zeros((n, 0), np.float32)),
    )


def onnxruntime_library(what: str) -> Any:
    """The library.

    Args:
        what: needs it, for the error.

    Raises:
        InputError: it is not installed.
    """
    with needs_extra(what):
        import onnxruntime
    return onnxruntime


def open_session(graph: bytes, device: str = "cpu") -> Any:
    """An `onnxruntime.InferenceSession` of a graph.

    Args:
        graph: ONNX.
        device: where it runs: ``"cpu"``, ``"cuda"``, or ``"auto"``, a GPU where there is one.

    Raises:
        InputError: no onnxruntime, no such device, or a graph that it cannot run.
    """
    onnxruntime = onnxruntime_library('runtime="onnx"')
    there = onnxruntime.get_available_providers()
    if device == "auto":
        device = "cuda" if _PROVIDERS["cuda"] in there else "cpu"
    if _PROVIDERS.get(device) not in there:
        raise InputError(f"device: {device!r} given, this onnxruntime runs on {', '.join(there)}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(graph, options, providers=[(_PROVIDERS[device], _SETTINGS[device])])
    except Exception as error:  # its own types, one for each status of the library
        raise InputError(f"model.onnx: cannot be run: {' '.join(str(error).split())[:120]}") from error


def load_onnx_runtime(parts: DetectorParts, graph: bytes | None, device: str = "cpu") -> OnnxRuntime:
    """The network of a detector that was stored with its graph.

    Args:
        parts: the detector's.
        graph: ONNX; None where the file has none.
        device: as of `open_session`.

    Raises:
        InputError: as `open_session`; no graph, or one that is not of this network.
    """
    if graph is None:
        raise InputError('it has no model.onnx: export it with --onnx, or load it with runtime="torch"')
    try:
        spec = FeatureSpec.from_dict(parts.spec)
    except CacheError as error:
        raise InputError(f"spec: {error}") from error
    patches = any("patches" in needs_of(part.scorer.name) for part in parts.scores)
    check_graph(graph)
    return OnnxRuntime(open_session(graph, device), of_scores(spec, parts), parts.mixture, patches)
