"""DINOv2's official recipe, against numbers that the official code gave and against torchvision's transforms."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from stages.config import BackboneConfig, FinetuneConfig
from stages.networks.backbone import Backbone
from stages.networks.weights.loading import build_model
from stages.networks.weights.official import interpolate_positions
from stages.training.augment import transforms as training_transforms
from stages.training.recipes import resolve_recipe
from tests.test_stages.drawn import DINOV2, DINOV2_REGISTERS

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}

# Six values of `x_norm_clstoken`, and the first value of three `x_norm_patchtokens` (first, 18th, last), that
# facebookresearch/dinov2 (commit b8931f7, float32, one CPU thread, without xFormers) gave for the weights and the image
# below: DinoVisionTransformer(img_size=518, patch_size=14, embed_dim=48, depth=2, num_heads=3, init_values=1.0,
# block_chunks=0) with the settings of its hub: interpolate_offset=0.1 without registers, and num_register_tokens=4,
# interpolate_antialias=True, interpolate_offset=0.0 with them.
OFFICIAL = {
    (DINOV2, 518): (
        [0.291934, -0.098851, -0.571732, -0.349491, 1.492268, -1.289779],
        [0.629376, 1.188529, 2.21188],
    ),
    (DINOV2, 224): (
        [0.082677, 0.321074, -1.149831, -0.617085, 1.792607, -1.746816],
        [1.577751, 1.004884, 0.55287],
    ),
    (DINOV2_REGISTERS, 518): (
        [0.286308, -0.105001, -0.585248, -0.345501, 1.497591, -1.298011],
        [0.631656, 1.188896, 2.212527],
    ),
    (DINOV2_REGISTERS, 224): (
        [0.055805, 0.233208, -1.175205, -0.595134, 1.75967, -1.744819],
        [1.615891, 1.020805, 0.521256],
    ),
}


@pytest.fixture(scope="module")
def official_files(tmp_path_factory):
    """Weights of a small network as the official files have them, by name; drawn in the order of their names."""
    folder, paths = tmp_path_factory.mktemp("official"), {}
    for name in (DINOV2, DINOV2_REGISTERS):
        shapes = {"cls_token": (1, 1, 48), "mask_token": (1, 48), "pos_embed": (1, 1 + 37 * 37, 48)}
        if name == DINOV2_REGISTERS:
            shapes["register_tokens"] = (1, 4, 48)
        shapes |= {"patch_embed.proj.weight": (48, 3, 14, 14), "patch_embed.proj.bias": (48,)}
        shapes |= {"norm.weight": (48,), "norm.bias": (48,)}
        for at in ("blocks.0.", "blocks.1."):
            shapes |= {f"{at}norm{i}.{kind}": (48,) for i in (1, 2) for kind in ("weight", "bias")}
            shapes |= {f"{at}attn.qkv.weight": (144, 48), f"{at}attn.qkv.bias": (144,)}
            shapes |= {f"{at}attn.proj.weight": (48, 48), f"{at}attn.proj.bias": (48,)}
            shapes |= {f"{at}mlp.fc1.weight": (192, 48), f"{at}mlp.fc1.bias": (192,)}
            shapes |= {f"{at}mlp.fc2.weight": (48, 192), f"{at}mlp.fc2.bias": (48,)}
            shapes |= {f"{at}ls1.gamma": (48,), f"{at}ls2.gamma": (48,)}
        generator, state = np.random.RandomState(0), {}
        for key in sorted(shapes):
            drawn = torch.from_numpy(generator.uniform(-0.3, 0.3, shapes[key])).float()
            is_scale = key.endswith("gamma") or ("norm" in key and key.endswith("weight"))
            state[key] = drawn + 1.0 if is_scale else drawn
        paths[name] = folder / f"{name}.pth"
        torch.save(state, paths[name])
    return paths


@pytest.mark.parametrize(("name", "size"), OFFICIAL)
def test_features_are_those_of_the_official_code(official_files, name, size):
    config = BackboneConfig(name=name, weights=str(official_files[name]), image_size=size)
    assert config.recipe == "official"
    image = torch.from_numpy(np.random.RandomState(1).uniform(-1, 1, (1, 3, size, size))).float()
    with torch.inference_mode():
        tokens = build_model(config, **SMALL).forward_features(image)[0]
    patches = tokens[-((size // 14) ** 2) :, 0]
    cls, first = OFFICIAL[name, size]
    assert tokens[0, :6].tolist() == pytest.approx(cls, abs=1e-5)
    assert patches[[0, 17, -1]].tolist() == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("recipe", ["official", "timm"])
@pytest.mark.parametrize("name", [DINOV2, DINOV2_REGISTERS])
def test_where_the_size_is_that_of_the_weights_nothing_is_interpolated(official_files, name, recipe):
    config = BackboneConfig(name=name, weights=str(official_files[name]), image_size=518, recipe=recipe)
    stored = torch.load(official_files[name])["pos_embed"]
    loaded = build_model(config, **SMALL).pos_embed
    assert torch.equal(loaded, stored[:, stored.shape[1] - loaded.shape[1] :])


def test_timms_recipe_differs_without_registers_alone(official_files):
    for name, equal in ((DINOV2, False), (DINOV2_REGISTERS, True)):
        configs = [
            BackboneConfig(name=name, weights=str(official_files[name]), image_size=224, recipe=recipe)
            for recipe in ("official", "timm")
        ]
        official, timms = (build_model(config, **SMALL).pos_embed for config in configs)
        assert torch.equal(official, timms) == equal


def test_positions_are_interpolated_by_a_factor_a_tenth_of_a_patch_too_large():
    stored = torch.randn(1, 1 + 37 * 37, 5, generator=torch.Generator().manual_seed(0))
    grid = stored[:, 1:].reshape(1, 37, 37, 5).permute(0, 3, 1, 2)
    scaled = F.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
    wanted = torch.cat([stored[:, :1], scaled.permute(0, 2, 3, 1).reshape(1, 256, 5)], 1)
    assert torch.equal(interpolate_positions(stored, 16, registers=False), wanted)
    without_class = interpolate_positions(stored[:, 1:], 16, registers=False)
    assert torch.equal(without_class, wanted[:, 1:])
    resized = F.interpolate(grid, (16, 16), mode="bicubic", antialias=True)
    assert torch.equal(interpolate_positions(stored, 16, registers=True)[:, 1:], resized.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(("size", "resized"), [(224, 256), (518, 592), (448, 512)])
def test_transform_is_that_of_the_official_evaluation(official_files, size, resized):
    """Resize 256, crop 224; other sizes by the same ratio."""
    official = transforms.Compose(
        [
            transforms.Resize(resized, interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )
    config = BackboneConfig(name=DINOV2, weights=str(official_files[DINOV2]), image_size=size)
    model = build_model(config, **SMALL)
    backbone = Backbone(model, config)
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    assert torch.equal(backbone.transform(photograph), official(photograph))
    assert backbone.transform_notes() == []
    settings = resolve_recipe(FinetuneConfig(), 100)
    _, held_out = training_transforms(model, config, settings)
    assert torch.equal(held_out(photograph), official(photograph))  # the end-to-end fine-tune judges by it as well


def test_recipe_is_part_of_the_fingerprint(official_files):
    config = BackboneConfig(name=DINOV2, weights=str(official_files[DINOV2]), image_size=56)
    official, timms = (
        Backbone(build_model(each, **SMALL), each)
        for each in (config, BackboneConfig(**config.model_dump() | {"recipe": "timm"}))
    )
    specs = [each.feature_spec("float16", "full") for each in (official, timms)]
    assert specs[0].fingerprint != specs[1].fingerprint
    assert specs[0].transform["recipe"] == "official"
    assert "recipe" not in specs[1].transform  # caches from before there was a choice are still found
    assert (official.cut, official.grid) == (True, (4, 4))


def test_a_transform_of_ones_own_is_told_against_the_recipe(official_files):
    config = BackboneConfig(name=DINOV2, weights=str(official_files[DINOV2]), image_size=56, crop_pct=1.0)
    notes = Backbone(build_model(config, **SMALL), config).transform_notes()
    assert notes == ["backbone.crop_pct: 1.0 is asked for, the official recipe has 0.875"]


def test_fine_tuned_weights_keep_their_positions(official_files, tmp_path):
    """They are stored at the size that they were trained at, under timm's names."""
    config = BackboneConfig(name=DINOV2_REGISTERS, weights=str(official_files[DINOV2_REGISTERS]), image_size=56)
    model = build_model(config, **SMALL)
    torch.save(model.state_dict(), tmp_path / "tuned.pth")
    again = build_model(config.model_copy(update={"weights": str(tmp_path / "tuned.pth")}), **SMALL)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
