"""From a decoded image to what a network takes: timm's own transform, bit for bit; decoded as it is asked for."""

import numpy as np
import pytest
import timm.data
import torch

from stages.config import BackboneConfig
from stages.errors import InputError
from stages.inputs.images import ImageError, decode_image
from stages.networks.preprocessing import Preprocessing, check_decode
from tests.test_stages.jpegs import encode, photo

CENTRE = {
    "input_size": (3, 48, 48),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
    "crop_mode": "center",
}
WAYS = [{}, {"crop_mode": "squash"}, {"crop_mode": "border"}, {"interpolation": "lanczos", "crop_pct": 1.0}]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_in_two_steps_it_is_timms_transform_to_the_bit(way):
    config = CENTRE | way
    ours, image = Preprocessing(config, "pil"), photo(130, 97)
    pixels = ours.pixels(image)
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (3, 48, 48))
    wanted = timm.data.create_transform(**config)(image)
    assert torch.equal(ours.normalise(pixels), wanted)
    assert torch.equal(ours.normalise(torch.stack([pixels, pixels])), torch.stack([wanted, wanted]))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_tensor_is_resized_nearly_as_an_image_is(interpolation):
    """As a GPU does it: both round what they interpolate, in another order."""
    ours, image = Preprocessing(CENTRE | {"interpolation": interpolation}, "cuda"), photo(130, 97)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    away = (ours.pixels(tensor).int() - ours.pixels(image).int()).abs()
    assert away.max() <= 1


@pytest.mark.parametrize("way", [*WAYS[:2], {"interpolation": "bilinear", "crop_pct": 1.0}], ids=str)
def test_tensors_are_resized_together_as_one_by_one(way):
    """Larger, smaller, of the very size, on their side."""
    ours = Preprocessing(CENTRE | way, "cuda")
    shapes = [(130, 97), (97, 130), (54, 54), (48, 48), (60, 54), (20, 30), (400, 300)]
    tensors = [torch.from_numpy(np.array(photo(*shape))).permute(2, 0, 1) for shape in shapes]
    for together, alone in zip(ours.pixels_together(tensors), map(ours.pixels, tensors), strict=True):
        assert torch.equal(together, alone)
    assert ours.pixels_together([]) == []


def test_an_image_that_would_be_resized_beyond_all_limits_is_refused():
    for image in (photo(65_000, 1), torch.zeros(3, 1, 65_000, dtype=torch.uint8)):
        with pytest.raises(ImageError, match="too elongated: 65000 x 1 pixels"):
            Preprocessing(CENTRE, "pil").pixels(image)


def test_a_draft_is_still_made_smaller_by_interpolation():
    """The short side keeps twice what it is resized to, 54 pixels here, or all that it has."""
    pil, draft = (Preprocessing(CENTRE, decode) for decode in ("pil", "draft"))
    assert (pil.least_side, draft.least_side) == (0, 108)
    sizes = {side: decode_image(encode(photo(side, side)), draft.least_side).width for side in (60, 215, 216, 431, 432)}
    assert sizes == {60: 60, 215: 215, 216: 108, 431: 216, 432: 108}


def test_decoded_by_pillow_features_are_what_they_always_were(backbone):
    """The fingerprint from before there was a choice: caches that were made then are found."""
    spec = backbone.feature_spec("float16", "full")
    assert spec.fingerprint == "a3bd88968211210610754aa7ebb5f941c0c0cdc07bcf47aee68fd4eb40833c18"
    assert "decode" not in spec.transform


def test_a_gpu_is_asked_for_where_there_is_none():
    for decode in ("pil", "draft"):
        check_decode(BackboneConfig(decode=decode), "cpu", CENTRE)
    check_decode(BackboneConfig(decode="cuda"), "cuda", CENTRE)
    with pytest.raises(InputError, match=r'^backbone.decode: "cuda" .* there is none here: give "pil" or "draft"'):
        check_decode(BackboneConfig(decode="cuda"), "cpu")
    with pytest.raises(InputError, match=r"^backbone.decode: .* cannot interpolate 'lanczos'"):
        check_decode(BackboneConfig(decode="cuda"), "cuda", CENTRE | {"interpolation": "lanczos"})
    with pytest.raises(InputError, match=r"^backbone.decode: .* cannot fill borders"):
        check_decode(BackboneConfig(decode="cuda"), "cuda", CENTRE | {"crop_mode": "border"})
