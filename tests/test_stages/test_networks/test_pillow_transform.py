"""Pixels without torch are timm's pixels, to the bit."""

import numpy as np
import pytest
from PIL import Image

from stages.config import BackboneConfig
from stages.errors import InputError
from stages.inputs.images import ImageError
from stages.networks.pillow_transform import PillowTransform
from stages.networks.preprocessing import Preprocessing
from stages.networks.weights.loading import create_model, transform_config

SIZES = [(640, 480), (333, 500), (97, 31), (224, 224), (225, 224), (256, 341), (20, 20), (1, 7), (500, 499)]


def transform(interpolation="bicubic", crop_pct=0.875, crop_mode="center", side=224):
    how = {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    return how | {"input_size": (3, side, side), "mean": (0.5,) * 3, "std": (0.25,) * 3}


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize(("interpolation", "crop_pct"), [("bicubic", 0.875), ("bilinear", 1.0), ("lanczos", 0.96)])
@pytest.mark.parametrize("side", [224, 33])
def test_they_are_the_same_bits(crop_mode, interpolation, crop_pct, side):
    how = transform(interpolation, crop_pct, crop_mode, side)
    ours, theirs = PillowTransform(how), Preprocessing(how, "pil")
    generator = np.random.default_rng(0)
    for width, height in SIZES:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        found = ours.pixels(image)
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, theirs.pixels(image).numpy(), err_msg=f"{width} x {height}")


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "vit_tiny_patch16_224", "convnext_atto", "resnet18"])
def test_what_weights_carry_is_known(name):
    config = BackboneConfig(name=name, weights="hub", image_size=64)
    how = transform_config(create_model(config), config)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    theirs = Preprocessing(how, "pil").pixels(image).numpy()
    np.testing.assert_array_equal(PillowTransform(how).pixels(image), theirs)


def test_draft_keeps_as_much_of_an_image():
    how = transform(crop_pct=0.9)
    assert PillowTransform(how | {"decode": "draft"}).least_side == Preprocessing(how, "draft").least_side == 496
    assert PillowTransform(how).least_side == 0


def test_what_only_torch_does_is_refused():
    for how, why in (
        (transform(crop_mode="border"), "crop_mode = 'border'"),
        (transform(crop_pct=1.1), "crop_pct = 1.1"),
        (transform("random"), "interpolation = 'random'"),
        (transform() | {"decode": "cuda"}, 'decode = "cuda"'),
    ):
        with pytest.raises(InputError, match=f"without torch, for the transform has {why}"):
            PillowTransform(how)
    with pytest.raises(ImageError, match="too elongated: 2 x 20000"):
        PillowTransform(transform()).pixels(Image.new("RGB", (2, 20000)))
