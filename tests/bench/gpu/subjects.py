"""What the steps compute on: photographs as JPEG files, networks with seeded weights, and how they time."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pipeline.__main__  # noqa: F401  the process is set up as the command line sets it up
from cache import FeatureCache
from stages.config import BackboneConfig
from stages.extract import extract_set
from stages.inputs.images import list_images
from stages.networks.backbone import Backbone
from stages.networks.weights.loading import build_model, create_model
from tests.bench.gpu.step import LITE0, Bench


def jpegs(bench: Bench, n: int) -> Path:
    """A folder of n JPEG files, crops of two photographs; beyond ``sizes.jpegs`` some are the same file again."""
    from tests.bench.bench_extract import write_jpegs

    folder = bench.shared / f"jpegs-{n}"
    if not folder.exists():
        drawn = bench.shared / "jpegs"
        if not drawn.exists():
            write_jpegs(begun := bench.shared / f"jpegs-{os.getpid()}", bench.sizes.jpegs)
            begun.rename(drawn)
        files = sorted(drawn.iterdir())
        linked = bench.shared / f"jpegs-{n}-{os.getpid()}"
        linked.mkdir()
        for number in range(n):
            os.link(files[number % len(files)], linked / f"{number:05d}.jpg")
        linked.rename(folder)
    return folder


def seeded(config: BackboneConfig) -> nn.Module:
    """A network whose every part matters, where timm's initialisation leaves LayerScale at 1e-5.

    Attention logits are drawn to vary by about 2, as in trained networks: what is near one-hot would magnify rounding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "gamma" in name:
                    parameter.uniform_(0.1, 1)
                elif name in ("cls_token", "reg_token"):
                    parameter.normal_(0, 0.5)
                elif "attn.qkv.weight" in name:
                    parameter.normal_(0, (2 / parameter.shape[1]) ** 0.5)
    return model


def network(config: BackboneConfig) -> nn.Module:
    """With the weights that the project brings, or seeded ones."""
    return build_model(config) if config.weights == "embedded" else seeded(config)


def extracted(bench: Bench, backbone: Backbone, folder: Path, name: str, dtype: Any = "float16") -> FeatureCache:
    """A cache of a folder's images, made by stage one as a user's is."""
    spec = backbone.feature_spec(dtype, "full")
    return extract_set("bench", list_images(str(folder)), spec, bench.scratch / name, lambda: backbone)


def placed(model: nn.Module, config: BackboneConfig, device: str, **changes: Any) -> Backbone:
    """A backbone of a model, which it takes as its own."""
    return Backbone(model, config.model_copy(update=changes), device=device)


def settle(device: str) -> None:
    """Wait for what a GPU has still to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def rate(bench: Bench, amount: float, function: Callable[[], object]) -> float:
    """``amount`` of work a second: calls, after one that warms up, for ``sizes.seconds`` at least."""
    function()
    settle(bench.device)
    n, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < bench.sizes.seconds or not n:
        function()
        settle(bench.device)
        n += 1
    return n * amount / taken


def named_network(bench: Bench, name: str, large: bool = False, batch: Any = "auto") -> BackboneConfig:
    """EfficientNet-Lite0 ("lite0", or what stands for it: "conv") or DINOv2's ViT "small", "base" or "large".

    With "auto" a batch is chosen by passes of several sizes: for each, cuDNN picks kernels of all convolutions anew,
    which takes seconds. A step that is about something else gives one.
    """
    size = bench.sizes.large_image_size if large else bench.sizes.image_size
    model = LITE0 if name == "lite0" else bench.sizes.networks[name]
    return BackboneConfig(name=model, weights="embedded" if model == LITE0 else "hub", image_size=size, batch=batch)
