"""Features of the device beside the CPU's, and beside themselves."""

import copy
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cache import FeatureCache
from stages.config import BackboneConfig
from stages.inputs.images import decode_image
from stages.networks.tokens import Tokens
from tests.bench.gpu.step import Bench
from tests.bench.gpu.subjects import extracted, jpegs, named_network, network, placed

# ‖a − b‖ / ‖b‖ of features against float32 on the CPU. One rounding is 6e-8, 5e-4 and 4e-3; a network makes many, which
# add up like a random walk. float32 is held so tight that TF32, whose roundings are float16's, does not pass for it.
TOLERANCES: Mapping[str, float] = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
COMPARED = ("cls", "tap_cls", "patches")


def compare(bench: Bench, name: str) -> None:
    """Extract on the device in every precision and hold features to those of a float32 forward pass on the CPU."""
    config = named_network(bench, name, batch=bench.sizes.compared)
    folder, model = jpegs(bench, bench.sizes.compared), network(config)
    exact = on_cpu(copy.deepcopy(model), config, [path.read_bytes() for path in sorted(folder.iterdir())])
    for precision, tolerance in TOLERANCES.items():
        backbone = placed(copy.deepcopy(model), config, bench.device, precision=precision)
        cache = extracted(bench, backbone, folder, f"{config.name}-{precision}", "float32")
        for dataset in COMPARED:
            error = relative_error(cache.read(dataset), getattr(exact, dataset).numpy())
            bench.measure(f"{precision}: {dataset}, ‖a − b‖ / ‖b‖", error, at_most=tolerance)


def on_cpu(model: nn.Module, config: BackboneConfig, files: list[bytes]) -> Tokens:
    """Tokens of images by one plain forward pass on all cores."""
    backbone = placed(model, config, "cpu", precision="float32")
    return backbone.encode(torch.stack([backbone.transform(decode_image(data)) for data in files]))


def relative_error(found: NDArray[np.floating], exact: NDArray[np.floating]) -> float:
    """‖found − exact‖ / ‖exact‖ in float64."""
    there = exact.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - there) / np.linalg.norm(there))


def same_bytes(bench: Bench) -> None:
    """Extract twice, with a network that is placed anew, and count features that are not the same bits."""
    folder = jpegs(bench, 2 * bench.sizes.compared)
    for config in (named_network(bench, name, batch=bench.sizes.compared) for name in ("conv", "small")):
        model = network(config)
        for precision in ("float32", "float16"):
            first, second = (
                extracted(
                    bench,
                    placed(copy.deepcopy(model), config, bench.device, precision=precision),
                    folder,
                    f"{config.name}-{precision}-{which}",
                )
                for which in ("once", "again")
            )
            bench.measure(f"{config.name}, {precision}: features that differ", differing(first, second), at_most=0)


def differing(first: FeatureCache, second: FeatureCache) -> int:
    """How many numbers of two caches have other bits."""
    names = first.spec.datasets()
    views = ((one.read(name).view(np.uint8) for one in (first, second)) for name in names)
    return sum(int(np.count_nonzero(a != b)) for a, b in views)
