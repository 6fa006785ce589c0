"""JPEG files that are decoded on the device: as Pillow has them to a few values, the same files failing.

torchvision decodes on the CPU with the same call, so all but nvJPEG itself is tried here.
"""

import hashlib

import numpy as np
import pytest
import torch

from stages.config import BackboneConfig
from stages.extract import ExtractOptions, extract_set
from stages.extraction.gpu_jpeg import decode_jpegs, decode_left
from stages.extraction.reader import Reader, ReadImage
from stages.inputs.images import ImageReader, UndecodedJpeg, decode_image, list_images
from stages.networks.backbone import load_backbone
from stages.networks.preprocessing import Preprocessing
from tests.test_stages.jpegs import damaged, encode, odd, photo, plain, turned
from tests.test_stages.test_networks.test_preprocessing import CENTRE

CPU = torch.device("cpu")
DEVICES = [
    CPU,
    pytest.param(
        torch.device("cuda"),
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU answers here")],
    ),
]


def read(files, decode, device):
    preprocessing = Preprocessing(CENTRE, decode)
    reader = Reader(ImageReader(files), preprocessing)
    return decode_left([reader.read(index) for index in range(len(files))], preprocessing, device)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_plain_files_are_decoded_there_and_turned_upright(device):
    files = [*plain().values()]
    elsewhere, here = read(files, "cuda", device), read(files, "pil", CPU)
    for name, one, other in zip(plain(), elsewhere, here, strict=True):
        assert one.digest == other.digest == hashlib.sha256(plain()[name]).digest()
        assert one.content.device.type == device.type
        away = (one.content.cpu().int() - other.content.int()).abs().float()
        assert away.mean() < 3, name  # of 255: decoders interpolate colour otherwise


def test_each_orientation_is_turned_as_pillow_turns_it():
    """On the same decoded pixels, so to the last one but for rounding."""
    for orientation in range(1, 10):
        data = encode(photo(96, 64), quality=95, subsampling="4:4:4", **turned(orientation))
        ((_, ours),) = read([data], "cuda", CPU)
        pixels = Preprocessing(CENTRE, "pil").pixels(decode_image(data))
        assert (ours.int() - pixels.int()).abs().max() <= 3, orientation


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_all_others_are_pillows_to_the_bit(device):
    files = [*odd().values()]
    for one, other in zip(read(files, "cuda", device), read(files, "pil", CPU), strict=True):
        assert one.content.device.type == device.type
        assert torch.equal(one.content.cpu(), other.content)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_the_same_files_fail_for_the_same_reasons(device):
    files = [*damaged(80), b"", b"no image", encode(photo(4000, 1))]
    reasons = [
        [image.content if isinstance(image.content, str) else "pixels" for image in read(files, decode, where)]
        for decode, where in (("cuda", device), ("pil", CPU))
    ]
    assert reasons[0] == reasons[1]
    assert 10 < reasons[0].count("pixels") < 75


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_file_that_the_device_does_not_decode_costs_no_other(device):
    files = [encode(photo(40, 30)), b"\xff\xd8\xff\xd9", encode(photo(20, 10)), b"no image"]
    found = decode_jpegs(files, device)
    assert [None if image is None else tuple(image.shape) for image in found] == [(3, 30, 40), None, (3, 10, 20), None]


def test_what_the_device_does_not_decode_pillow_does():
    """A file that another decoder refuses for whatever reason; here, since it is no JPEG at all."""
    preprocessing, data = Preprocessing(CENTRE, "cuda"), odd()["another kind"]
    ((_, content),) = decode_left([ReadImage(bytes(32), UndecodedJpeg(data, 1))], preprocessing, CPU)
    assert torch.equal(content, preprocessing.pixels(decode_image(data)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU answers here")
def test_an_extraction_decodes_on_the_gpu_to_the_same_bytes_twice(tmp_path):
    for index, (name, data) in enumerate({**plain(), **odd()}.items()):
        (tmp_path / f"{index:02d}-{name.replace(' ', '-')}.jpg").write_bytes(data)
    config = BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=48, decode="cuda")
    network = load_backbone(config, device="cuda")
    spec = network.feature_spec("float16", "none")
    samples, options = list_images(str(tmp_path)), ExtractOptions(max_failures=1.0)
    caches = [
        extract_set("jpeg", samples, spec, tmp_path / name, lambda: network, options=options) for name in ("a", "b")
    ]
    assert caches[0].n_rows == len(samples)
    assert np.array_equal(caches[0].read("cls"), caches[1].read("cls"))
