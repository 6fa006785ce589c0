"""Backbones: tokens against timm's own, the transform, how it computes, and what a cache of it will hold."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from timm.models.volo import VOLO
from torch.nn import functional as F

from stages.config import BackboneConfig
from stages.errors import InputError
from stages.inputs.images import ImageError
from stages.networks.backbone import Backbone, build_architecture, load_backbone, weights_sha
from stages.networks.batch import CHOICES
from stages.networks.ends import ConvolutionalEnd, TransformerEnd
from tests.test_stages.drawn import DINOV2, DINOV2_REGISTERS, create, dinov2, photos
from tests.test_stages.test_networks.networks import EMBEDDED, SMALL, untrained


@pytest.mark.parametrize("expert_blocks", [1, 2])
@pytest.mark.parametrize(("name", "n_registers"), [(DINOV2, 0), (DINOV2_REGISTERS, 4)])
def test_dinov2_tokens_are_timms_own(name, n_registers, expert_blocks):
    backbone = dinov2(name, expert_blocks)
    images = photos(backbone)
    tokens = backbone.encode(images)
    model = backbone.model
    entering = len(model.blocks) - expert_blocks - 1  # the block whose output enters the last blocks
    (patches, prefix), (final_patches, final_prefix) = model.forward_intermediates(
        images, indices=[entering, len(model.blocks) - 1], return_prefix_tokens=True, output_fmt="NLC",
        intermediates_only=True,
    )  # fmt: skip
    assert torch.equal(tokens.patches, patches)
    assert torch.equal(tokens.tap_cls, prefix[:, 0])
    assert torch.equal(tokens.registers, prefix[:, 1:])  # registers are never patches
    assert torch.equal(tokens.cls, model.norm(torch.cat([final_prefix, final_patches], 1))[:, 0])
    assert (backbone.dim, backbone.tap_dim, backbone.n_registers, backbone.grid) == (384, 384, n_registers, (4, 4))
    assert tokens.registers.shape == (3, n_registers, 384)
    end = backbone.end()
    assert isinstance(end, TransformerEnd)
    normalised = model.forward_features(images)[:, 1 + n_registers :]
    torch.testing.assert_close(end.patch_tokens(tokens), normalised, rtol=1e-4, atol=1e-4)


def test_patches_are_row_major():
    """A change in the image's top right corner moves the fourth of 4 x 4 patches most."""
    backbone = dinov2(DINOV2, expert_blocks=11)  # one block before the tap, so that patches still stay local
    images = photos(backbone, 1)
    changed = images.clone()
    changed[:, :, :14, 42:] += 2
    moved = (backbone.encode(changed).patches - backbone.encode(images).patches).norm(dim=2)
    assert moved.argmax() == 3


def test_dinov3_with_rotary_embeddings_gives_its_class_token():
    """timm pools DINOv3 by the mean; its authors' class embedding is the normalised class token."""
    name = "vit_small_patch16_dinov3"
    backbone = build_architecture(BackboneConfig(name=name, image_size=64))
    images = photos(backbone)
    tokens = backbone.encode(images)
    patches, prefix = backbone.model.forward_intermediates(
        images, indices=[len(backbone.model.blocks) - 2], return_prefix_tokens=True, output_fmt="NLC",
        intermediates_only=True,
    )[0]  # fmt: skip
    assert torch.equal(tokens.patches, patches)
    assert torch.equal(torch.cat([tokens.tap_cls[:, None], tokens.registers], 1), prefix)
    assert torch.equal(tokens.cls, backbone.model.forward_features(images)[:, 0])
    assert backbone.n_registers == 4


@pytest.mark.parametrize(("name", "n_registers"), [("vit_base_patch16_siglip_224", 0), ("test_vit3", 1)])
def test_without_class_token_the_pooled_vector_is_the_feature(name, n_registers):
    backbone = untrained(name, img_size=64, **SMALL)
    images = photos(backbone)
    tokens = backbone.encode(images)
    assert torch.equal(tokens.cls, backbone.model(images))  # attention pooling, as timm has it
    assert torch.equal(tokens.tap_cls, tokens.patches.mean(1))
    assert (tokens.patches.shape, tokens.registers.shape) == ((3, 16, 48), (3, n_registers, 48))
    end = backbone.end()
    assert isinstance(end, TransformerEnd)
    assert torch.allclose(end(tokens), tokens.cls, atol=1e-5)


@pytest.mark.parametrize(("name", "stage", "tap_dim"), [("resnet10t", 3, 256), ("convnext_atto", 2, 160)])
def test_map_that_enters_the_last_stage_of_a_convolutional_net(name, stage, tap_dim):
    backbone = untrained(name)
    images = photos(backbone)
    tokens = backbone.encode(images)
    (entering,) = backbone.model.forward_intermediates(images, indices=[stage], intermediates_only=True)
    assert torch.equal(tokens.patches, entering.flatten(2).transpose(1, 2))
    assert torch.equal(tokens.tap_cls, tokens.patches.mean(1))
    assert torch.allclose(tokens.cls, backbone.model(images), atol=1e-6)
    assert (tokens.patches.shape, tokens.registers.shape) == ((3, 16, tap_dim), (3, 0, tap_dim))
    assert isinstance(backbone.end(), ConvolutionalEnd)


@pytest.mark.parametrize(("expert_blocks", "shape"), [(1, (3, 2 * 2, 192)), (2, (3, 3 * 3, 112))])
def test_efficientnet_is_tapped_before_its_last_stages(expert_blocks, shape):
    """A stage is an entry of `blocks`, not a level of timm's `feature_info`."""
    backbone = load_backbone(EMBEDDED, expert_blocks)
    images = photos(backbone)
    tokens = backbone.encode(images)
    model = backbone.model
    with torch.inference_mode():
        x = model.bn1(model.conv_stem(images.contiguous(memory_format=torch.channels_last)))
        for stage in model.blocks[:-expert_blocks]:
            x = stage(x)
    assert tokens.patches.shape == shape
    assert torch.equal(tokens.patches, x.flatten(2).transpose(1, 2))
    assert torch.equal(tokens.cls, model(images))


def test_map_with_channels_last_becomes_the_same_tokens():
    backbone = untrained("swin_tiny_patch4_window7_224", img_size=64, embed_dim=12, depths=(1, 1, 1, 1))
    images = photos(backbone)
    final = backbone.model.forward_features(images)  # (B, h, w, D)
    assert torch.equal(backbone.encode(images).patches, final.flatten(1, 2))
    assert (backbone.tap_dim, backbone.grid) == (96, (2, 2))


def test_class_token_is_no_patch_where_timm_does_not_count_prefix_tokens():
    four = {"layers": (1,) * 4, "embed_dims": (48,) * 4, "num_heads": (3,) * 4}
    model = VOLO(**four, img_size=64, num_classes=0)
    assert not hasattr(model, "num_prefix_tokens")
    backbone = Backbone(model, BackboneConfig(name="volo_d1_224", image_size=64))
    tokens = backbone.encode(photos(backbone))
    final = model.forward_features(photos(backbone))
    assert torch.equal(torch.cat([tokens.tap_cls[:, None], tokens.patches], 1), final)
    assert backbone.grid == (4, 4)


def test_patch_size_may_be_a_number():
    assert untrained("xcit_nano_12_p16_224", img_size=64).grid == (4, 4)


def test_weights_carry_their_transform(backbone):
    white = Image.new("RGB", (90, 70), "white")
    assert torch.equal(backbone.transform(white), torch.ones(3, 48, 48))  # mean and std 0.5
    (level,) = dinov2(DINOV2).transform(white)[0].unique()
    assert level.item() == pytest.approx((1 - 0.485) / 0.229)  # ImageNet's


def test_another_transform_than_the_weights_have_is_told(backbone):
    assert backbone.transform_notes() == []
    asked = EMBEDDED.model_copy(update={"mean": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_pct": 1.0})
    other = load_backbone(asked)
    assert other.transform_notes() == [
        "backbone.mean: (0.4, 0.5, 0.6) is asked for, the weights of tf_efficientnet_lite0 have (0.5, 0.5, 0.5)",
        "backbone.interpolation: bilinear is asked for, the weights of tf_efficientnet_lite0 have bicubic",
        "backbone.crop_pct: 1.0 is asked for, the weights of tf_efficientnet_lite0 have 0.875",
    ]
    white = other.transform(Image.new("RGB", (90, 70), "white"))
    assert [channel.unique().item() for channel in white] == pytest.approx([1.2, 1.0, 0.8])
    specs = [each.feature_spec("float16", "full") for each in (backbone, other)]
    assert specs[0].first_difference(specs[1]) == "transform.crop_pct: 0.875 in the cache, 1.0 asked"


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_an_image_that_would_grow_beyond_all_limits_is_refused(backbone, size):
    """Its short side is resized to 54 pixels, so its long one to 5,400,000."""
    with pytest.raises(ImageError, match=f"too elongated: {size[0]} x {size[1]} pixels"):
        backbone.transform(Image.new("RGB", size))
    assert backbone.transform(Image.new("RGB", (1, 1000))).shape == (3, 48, 48)


def test_overlapping_patches_ask_for_no_multiple():
    assert build_architecture(BackboneConfig(name="pvt_v2_b0", image_size=64)).grid == (2, 2)  # patches of 7, stride 4


def test_image_size_that_the_network_cannot_run():
    with pytest.raises(InputError, match=r"backbone\.image_size: crossvit_9_240 .* 64 px \(.+\)"):
        build_architecture(BackboneConfig(name="crossvit_9_240", image_size=64))


def test_network_with_several_sequences_of_tokens_is_refused():
    with pytest.raises(InputError, match=r"backbone\.name: crossvit_9_240 "):
        build_architecture(BackboneConfig(name="crossvit_9_240", image_size=240))


def test_passes_side_by_side_do_not_mix():
    """One backbone, several threads, another backbone on the same network."""
    one, two = dinov2(DINOV2, 1), dinov2(DINOV2, 2)
    images = photos(one, 8)
    alone = {backbone: [backbone.encode(images[i : i + 1]) for i in range(8)] for backbone in (one, two)}
    with ThreadPoolExecutor(4) as pool:
        jobs = [(backbone, i) for i in range(8) for backbone in (one, two)] * 4
        for (backbone, i), tokens in zip(
            jobs, pool.map(lambda job: job[0].encode(images[job[1] : job[1] + 1]), jobs), strict=True
        ):
            assert torch.equal(tokens.patches, alone[backbone][i].patches)
            assert torch.equal(tokens.cls, alone[backbone][i].cls)


def test_a_lower_precision_gives_nearly_the_same_features_and_another_fingerprint(backbone):
    half = load_backbone(EMBEDDED.model_copy(update={"precision": "bfloat16"}))
    images = photos(backbone)
    exact, near = backbone.encode(images).cls, half.encode(images).cls
    assert near.dtype == torch.float32
    assert not torch.equal(near, exact)
    assert F.cosine_similarity(near, exact).min() > 0.95
    assert half.cut  # the end is checked, and trained, in full precision
    difference = backbone.feature_spec("float16", "full").first_difference(half.feature_spec("float16", "full"))
    assert difference == 'compute.precision: "float32" in the cache, "bfloat16" asked'
    assert backbone.precision == "float32"  # "auto" on a CPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU answers here")
def test_on_a_gpu_autocast_gives_nearly_the_same_features(backbone):
    gpu = load_backbone(EMBEDDED, device="cuda")
    assert gpu.precision == "float16"
    assert gpu.batch in CHOICES
    images = photos(backbone)
    exact, near = backbone.encode(images).cls, gpu.encode(images.cuda()).cls.cpu()
    assert F.cosine_similarity(near, exact).min() > 0.99


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_it_gives_the_same_features_and_a_plain_end():
    images = photos(dinov2(DINOV2))
    plain = Backbone(create(DINOV2, img_size=56, **SMALL), BackboneConfig(name=DINOV2, image_size=56))
    config = BackboneConfig(name=DINOV2, image_size=56, compile=True)
    compiled = Backbone(create(DINOV2, img_size=56, **SMALL), config)
    assert torch.allclose(compiled.encode(images).cls, plain.encode(images).cls, atol=1e-5)
    assert torch.equal(compiled.encode(images).patches, compiled.encode(images).patches)
    end = compiled.end()
    end(plain.encode(images)).sum().backward()
    assert all(parameter.grad is not None for name, parameter in end.named_parameters() if "blocks" in name)


def test_spec_says_what_the_features_are(backbone):
    spec = backbone.feature_spec("float16", "pool:1")
    assert (spec.backbone, spec.image_size, spec.expert_blocks) == ("tf_efficientnet_lite0", 48, 1)
    assert (spec.cls_dim, spec.tap_dim, spec.n_registers, spec.grid) == (1280, 192, 0, (1, 1))
    assert spec.weights_sha == weights_sha(backbone.model)
    assert spec.transform["mean"] == [0.5, 0.5, 0.5]
    assert backbone.feature_spec("float16", "pool:1").fingerprint == spec.fingerprint
    assert backbone.feature_spec("float16", "full").fingerprint != spec.fingerprint
    assert load_backbone(EMBEDDED, 2).feature_spec("float16", "pool:1").fingerprint != spec.fingerprint
    larger = load_backbone(EMBEDDED.model_copy(update={"image_size": 96}))
    assert larger.feature_spec("float16", "pool:1").first_difference(spec) is not None


def test_one_changed_weight_is_another_fingerprint():
    model = create("test_resnet")
    before = weights_sha(model)
    assert weights_sha(create("test_resnet")) == before
    with torch.no_grad():
        model.layer4[0].conv1.weight[0, 0, 0, 0] += 1e-3
    assert weights_sha(model) != before


def test_architecture_without_weights_has_the_same_shapes(backbone):
    architecture = build_architecture(EMBEDDED)
    assert {k: v.shape for k, v in architecture.end().state_dict().items()} == {
        k: v.shape for k, v in backbone.end().state_dict().items()
    }
    assert (architecture.dim, architecture.tap_dim, architecture.grid) == (
        backbone.dim,
        backbone.tap_dim,
        backbone.grid,
    )
    assert weights_sha(architecture.model) != weights_sha(backbone.model)
