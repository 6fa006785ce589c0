"""Taps against timm's own intermediates, and which cannot be had."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stages.config import BackboneConfig
from stages.errors import InputError
from stages.networks.backbone import build_architecture, load_backbone
from tests.test_stages.drawn import DINOV2, DINOV2_REGISTERS, dinov2, photos
from tests.test_stages.test_networks.networks import EMBEDDED, SMALL, untrained


@pytest.mark.parametrize(("name", "n_registers"), [(DINOV2, 0), (DINOV2_REGISTERS, 4)])
def test_of_a_transformer_class_token_and_mean_patch_are_timms(name, n_registers):
    backbone = dinov2(name)
    images = photos(backbone)
    tokens, taps = backbone.encode_with_taps(images, (3, 12))
    intermediates = backbone.model.forward_intermediates(
        images, indices=[2, 11], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    assert taps.shape == (3, 2, 2, 384)
    for own, (patches, prefix) in zip(taps.unbind(1), intermediates, strict=True):
        assert prefix.shape[1] == 1 + n_registers
        assert torch.equal(own[:, 0], prefix[:, 0])
        assert torch.equal(own[:, 1], patches.mean(1))  # registers are no patches
    plain = backbone.encode(images)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(vars(tokens).values(), vars(plain).values(), strict=True)
    )
    assert backbone.tap_layout([12, 3]) == ((3, 12), (384, 384), 2)


def test_with_rotary_embeddings_they_are_timms_too():
    backbone = build_architecture(BackboneConfig(name="vit_small_patch16_dinov3", image_size=64))
    images = photos(backbone)
    _, taps = backbone.encode_with_taps(images, (5,))
    ((patches, prefix),) = backbone.model.forward_intermediates(
        images, indices=[4], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    assert torch.equal(taps[:, 0], torch.stack([prefix[:, 0], patches.mean(1)], 1))


@pytest.mark.parametrize(
    ("name", "first", "widths", "options"),
    [
        ("resnet10t", 1, (64, 128, 256, 512), {}),  # timm counts the stem as 0
        ("convnext_atto", 0, (40, 80, 160, 320), {}),
        ("tf_efficientnet_lite0", 1, (16, 24, 40, 80, 112, 192, 320), {"extra_blocks": True}),
        ("swin_tiny_patch4_window7_224", 0, (12, 24, 48, 96), {}),
    ],
)
def test_of_a_convolutional_net_each_stage_is_pooled(name, first, widths, options):
    small = {"img_size": 64, "embed_dim": 12, "depths": (1, 1, 1, 1)} if name.startswith("swin") else {}
    backbone = load_backbone(EMBEDDED) if name == EMBEDDED.name else untrained(name, **small)
    images = photos(backbone)
    assert backbone.tap_layout("all") == (tuple(range(1, len(widths) + 1)), widths, 1)
    _, taps = backbone.encode_with_taps(images, range(1, len(widths) + 1))
    assert taps.shape == (3, len(widths), max(widths))
    maps = backbone.model.forward_intermediates(
        images, indices=[*range(first, first + len(widths))], intermediates_only=True, **options
    )
    for own, stage, width in zip(taps.unbind(1), maps, widths, strict=True):
        torch.testing.assert_close(own[:, :width], stage.mean((2, 3)), rtol=1e-6, atol=1e-6)
        assert not own[:, width:].any()  # narrower than the widest


def test_without_a_class_token_the_mean_patch_stands_alone():
    backbone = untrained("vit_base_patch16_siglip_224", img_size=64, **SMALL)
    images = photos(backbone)
    _, taps = backbone.encode_with_taps(images, (2,))
    (patches,) = backbone.model.forward_intermediates(images, indices=[1], output_fmt="NLC", intermediates_only=True)
    assert torch.equal(taps, patches.mean(1)[:, None])


def test_threads_read_their_own_passes_and_a_copied_end_reads_none():
    backbone = dinov2(DINOV2)
    images = photos(backbone, 4)
    alone = [backbone.encode_with_taps(image[None], (1, 12))[1] for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: backbone.encode_with_taps(image[None], (1, 12))[1], images))
    assert all(torch.equal(own, expected) for own, expected in zip(together, alone, strict=True))
    assert not any(module._forward_hooks for module in backbone.end().modules())


@pytest.mark.parametrize("asked", [[13], [0], []])
def test_blocks_that_are_not_there_are_refused(asked):
    with pytest.raises(InputError, match=r"^cache.taps: .* has 12 blocks"):
        dinov2(DINOV2).tap_layout(asked)


@pytest.mark.parametrize(
    ("name", "options"), [("cait_xxs24_224", {"img_size": 64, "depth": 2}), ("xcit_nano_12_p16_224", {"img_size": 64})]
)
def test_blocks_that_the_class_token_does_not_pass_are_refused(name, options):
    """There the first token is a patch."""
    with pytest.raises(InputError, match=r"^cache.taps: what .* after block or stage 1 cannot be read"):
        untrained(name, **options).tap_layout("all")
