"""The cut-out end: it gives the backbone's own features, and is a copy that can be trained."""

import pytest
import torch

from stages.config import BackboneConfig
from stages.errors import InputError
from stages.networks.backbone import build_architecture, weights_sha
from stages.networks.ends import ResidualEnd, TransformerEnd
from tests.test_stages.drawn import DINOV2, photos
from tests.test_stages.test_networks.networks import SMALL, untrained


def test_rotary_embeddings_travel_with_the_end():
    backbone = untrained("vit_small_patch16_dinov3", img_size=64, **SMALL)
    tokens = backbone.encode(photos(backbone))
    end = backbone.end()
    assert isinstance(end, TransformerEnd)
    assert end.buffer_names == ["rope"]
    assert torch.allclose(end(tokens), tokens.cls, atol=1e-5)
    end.block_rope.zero_()
    assert (end(tokens) - tokens.cls).abs().max() > 1e-3
    end(tokens).sum().backward()  # what was measured in inference mode can be trained
    assert all(parameter.grad is not None for parameter in end.tail.blocks.parameters())


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("regnety_002", {}),  # no sequence of stages
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "embed_dim": 12, "depths": (1, 1, 1, 1)}),  # layers, NHWC
        ("swinv2_cr_tiny_ns_224", {"img_size": 64, "embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1,) * 4}),
        ("cait_xxs24_224", {"img_size": 64, "depth": 2, "embed_dim": 48}),  # the class token joins after the blocks
    ],
)
def test_end_that_cannot_be_cut_out_is_a_block_that_starts_at_zero(name, kwargs):
    backbone = untrained(name, **kwargs)
    images = photos(backbone)
    tokens = backbone.encode(images)
    assert not backbone.cut
    assert torch.equal(tokens.cls, backbone.model.forward_head(backbone.model.forward_features(images), True))
    assert tokens.patches.shape[1] == backbone.grid[0] * backbone.grid[1] > 1
    end = backbone.end()
    assert isinstance(end, ResidualEnd)
    assert torch.equal(end(tokens), tokens.cls)
    assert torch.equal(end.patch_tokens(tokens), tokens.patches)
    end(tokens).square().sum().backward()
    assert end.out.weight.grad.abs().max() > 0  # zero, but not dead


def test_end_is_a_trainable_copy(backbone):
    before = weights_sha(backbone.model)
    end = backbone.end()
    assert all(parameter.requires_grad for parameter in end.parameters())
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not end.training
    with torch.no_grad():
        for parameter in end.parameters():
            parameter += 1
    assert weights_sha(backbone.model) == before
    # Only what lies behind the tap is copied: the last of seven stages, head convolution and norm.
    assert sum(p.numel() for p in end.parameters()) < sum(p.numel() for p in backbone.model.parameters()) / 2


def test_network_of_one_stage_has_no_end_to_cut():
    backbone = untrained(DINOV2, image_size=56, img_size=56, depth=1, embed_dim=48, num_heads=3)
    assert isinstance(backbone.end(), ResidualEnd)


@pytest.mark.parametrize(("name", "depth"), [("resnet10t", 4), ("tf_efficientnet_lite0", 7)])
def test_as_many_expert_blocks_as_the_network_has_are_refused(name, depth):
    with pytest.raises(InputError, match=rf"cache\.expert_blocks: {depth} .* {name} .*{depth}"):
        build_architecture(BackboneConfig(name=name, image_size=64), depth)
