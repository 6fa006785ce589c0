"""The graph of a network gives what torch gives, for every family and kind of expert, in batches of any size."""

import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from stages.config import BackboneConfig
from stages.detection.parts import MixtureParts
from stages.detection.torch_runtime import TorchRuntime
from stages.errors import InputError
from stages.mixture.config import MixtureConfig
from stages.mixture.model import build_mixture
from stages.networks.backbone import Backbone
from tests.test_stages.drawn import create

pytest.importorskip("onnx", reason="needs the extra export")
pytest.importorskip("onnxruntime", reason="needs the extra export")

from stages.detection.graph import OPSET, export_graph, require_onnx
from stages.detection.onnx_file import check_graph
from stages.detection.onnx_runtime import OnnxRuntime, open_session

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 2}
# name of timm's, how small it is made, side of its images
FAMILIES = {
    "efficientnet": ("test_efficientnet", {}, 64),
    "resnet": ("test_resnet", {}, 64),
    "convnext": ("test_convnext", {}, 64),
    "vit": ("vit_tiny_patch16_224", SMALL | {"img_size": 64}, 64),
    "registers": ("vit_small_patch14_reg4_dinov2", SMALL | {"img_size": 56}, 56),
    "dinov3": ("vit_tiny_patch16_dinov3_qkvb", SMALL | {"img_size": 64}, 64),
    "siglip": ("vit_base_patch32_siglip_256", SMALL | {"img_size": 64}, 64),
}
GROUPS = (1, 0, 1, 2, 0, 1, 1)
TOLERANCE = 1e-4  # of the deviation of an array


@cache
def backbone_of(family) -> Backbone:
    name, small, side = FAMILIES[family]
    return Backbone(create(name, **small), BackboneConfig(name=name, weights="hub", image_size=side))


def mixture_of(backbone, groups=GROUPS, **settings):
    """Trained, as far as drawn weights are."""
    config = MixtureConfig(backbone.dim, backbone.tap_dim, groups, **settings)
    mixture = build_mixture(config, backbone.end)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if "head." in name or "router" in name or "up." in name or "out." in name:
                parameter.normal_(0, 0.2, generator=generator)
        # Inputs of the router as training shifts and scales them, or all images would go to one expert.
        seen = backbone.encode(
            backbone.preprocessing.normalise(torch.from_numpy(drawn_pixels(backbone.config.image_size)))
        )
        inputs = getattr(seen, config.router_input)
        mixture.router.mean.copy_(inputs.mean(0))
        mixture.router.scale.copy_((inputs - inputs.mean(0)).std())
    return mixture.eval()


def runtimes(backbone, mixture, patches="full", dtype="float32", gives_patches=False):
    """By torch and by onnx."""
    spec = backbone.feature_spec(dtype, patches)
    parts = None
    if mixture is not None:
        own = mixture.config
        parts = MixtureParts(own.groups, own.kind, own.router_input, own.copies, {})
    graph = export_graph(backbone, mixture, spec, gives_patches)
    check_graph(graph)
    session = open_session(graph)
    return TorchRuntime(spec, backbone, mixture, gives_patches), OnnxRuntime(session, spec, parts, gives_patches)


@pytest.mark.parametrize("family", ["efficientnet", "registers", "siglip"])
def test_taps_are_those_of_torch(family):
    backbone = backbone_of(family)
    spec = backbone.feature_spec("float32", "none", "all")
    pixels = drawn_pixels(backbone.config.image_size, 5)
    by_torch = TorchRuntime(spec, backbone, None).run(pixels).stored["taps"]
    onnx = OnnxRuntime(open_session(export_graph(backbone, None, spec)), spec, None)
    found = onnx.run(pixels).stored["taps"]
    assert found.shape == (5, *spec.datasets()["taps"][0])
    assert np.abs(found - by_torch).max() <= TOLERANCE * by_torch.std()
    plain = OnnxRuntime(open_session(export_graph(backbone, None, spec.without_taps())), spec.without_taps(), None)
    assert "taps" not in plain.run(pixels).stored


def drawn_pixels(side, n=33):
    """Images of smooth spots, some of them dark: the router sends them to several experts."""
    generator = np.random.default_rng(0)
    small = generator.uniform(0, 255, (n, 3, 4, 4)) * generator.uniform(0.1, 1, (n, 3, 1, 1))
    return np.kron(small, np.ones((1, 1, side // 4, side // 4))).astype(np.uint8)


def assert_same(ours, theirs):
    columns = [(name, ours.stored[name], theirs.stored[name]) for name in theirs.stored if name in ours.stored]
    if theirs.refined is not None:
        columns += [(name, getattr(ours.refined, name), each) for name, each in vars(theirs.refined).items()]
    if theirs.patches is not None:
        columns.append(("patches", ours.patches, theirs.patches))
    for name, own, other in columns:
        assert (own.dtype, own.shape) == (other.dtype, other.shape), name
        finite = np.isfinite(other)
        np.testing.assert_array_equal(np.isfinite(own), finite, err_msg=name)
        own, other = own[finite].astype(np.float64), other[finite].astype(np.float64)
        if own.size:
            assert np.abs(own - other).max() <= TOLERANCE * max(other.std(), 0.01), name


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_experts_made_of_their_end(family):
    backbone = backbone_of(family)
    by_torch, by_onnx = runtimes(backbone, mixture_of(backbone))
    pixels = drawn_pixels(by_torch.size)
    theirs = by_torch.run(pixels)
    assert len(set(theirs.refined.expert)) > 1
    assert_same(by_onnx.run(pixels), theirs)
    for batch in (1, 2, 33):
        assert_same(by_onnx.with_batch(batch).run(pixels), theirs)


KINDS = {
    "none": None,
    "single": {"groups": (0,) * 7},
    "adapter": {"kind": "adapter"},
    "frozen": {"kind": "frozen", "router_input": "cls"},
    "dense": {"kind": "dense", "groups": (0,) * 7, "copies": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_experts(kind):
    backbone = backbone_of("vit")
    mixture = None if KINDS[kind] is None else mixture_of(backbone, **KINDS[kind])
    by_torch, by_onnx = runtimes(backbone, mixture)
    pixels = drawn_pixels(by_torch.size, 5)
    assert_same(by_onnx.run(pixels), by_torch.run(pixels))


@pytest.mark.parametrize(("family", "patches"), [("vit", "pool:1"), ("resnet", "pool:3")])
def test_experts_see_what_a_cache_keeps(family, patches):
    """Half as precise, and fewer patches; 3 divides no side of this ResNet's map."""
    backbone = backbone_of(family)
    assert backbone.grid[0] % 3
    by_torch, by_onnx = runtimes(backbone, mixture_of(backbone), patches, "float16")
    pixels = drawn_pixels(by_torch.size, 5)
    ours, theirs = by_onnx.run(pixels), by_torch.run(pixels)
    assert ours.stored["cls"].dtype == np.float16
    np.testing.assert_array_equal(ours.refined.expert, theirs.refined.expert)
    np.testing.assert_allclose(ours.refined.features, theirs.refined.features, atol=2e-2)


def test_patch_tokens():
    by_torch, by_onnx = runtimes(backbone_of("registers"), None, gives_patches=True)
    pixels = drawn_pixels(by_torch.size, 3)
    assert_same(by_onnx.run(pixels), by_torch.run(pixels))


def test_the_graph_is_the_same_bytes_and_leaves_the_network_as_it_was():
    import onnx

    backbone = backbone_of("vit")
    spec, mixture = backbone.feature_spec("float32", "full"), mixture_of(backbone)
    first = export_graph(backbone, mixture, spec)
    assert export_graph(backbone, mixture, spec) == first
    assert backbone.feature_spec("float32", "full") == spec
    model = onnx.load_from_string(first)
    onnx.checker.check_model(model, full_check=True)
    assert [each.version for each in model.opset_import] == [OPSET]
    assert [each.type.tensor_type.shape.dim[0].dim_param for each in model.graph.input] == ["n"]
    with pytest.raises(InputError, match=r"model\.onnx: makes .* not this detector's features"):
        OnnxRuntime(open_session(first), spec, None)
    runtime = OnnxRuntime(open_session(first), spec, MixtureParts(GROUPS, "end", "tap_cls", 1, {}))
    with pytest.raises(InputError, match=r"model\.onnx: fails: "):
        runtime.run(np.zeros((1, 3, 32, 32), np.uint8))


def test_what_is_missing_is_said(monkeypatch):
    backbone = backbone_of("vit")
    border = replace(backbone.feature_spec("float32", "full"), transform=dict(backbone.data_config, crop_mode="border"))
    with pytest.raises(
        InputError, match="cannot be prepared without torch, for the transform has crop_mode = 'border'"
    ):
        export_graph(backbone, None, border)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"--onnx needs onnxruntime: pip install 'mofe-feature-cache\[export\]'"):
        require_onnx()
    with pytest.raises(InputError, match='runtime="onnx" needs onnxruntime: '):
        open_session(b"")


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="device: 'tpu' given, this onnxruntime runs on "):
        open_session(b"", "tpu")


class Bessel(nn.Module):
    """What ONNX has no operation for."""

    def forward(self, x):
        return torch.special.i0(x.clamp(-1, 1))


def test_a_network_that_onnx_cannot_hold_is_refused():
    name, small, side = FAMILIES["vit"]
    model = create(name, **small)
    model.norm = Bessel()
    backbone = Backbone(model, BackboneConfig(name=name, weights="hub", image_size=side))
    with pytest.raises(InputError, match=rf"^--onnx: {name} cannot be written as ONNX: .*i0"):
        export_graph(backbone, None, backbone.feature_spec("float32", "full"))
