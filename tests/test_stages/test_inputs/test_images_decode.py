"""Decoding: what a person would see, or an ImageError, and nothing else."""

import io
import random
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from stages.inputs.images import ImageError, decode_image, image_size, list_images

ORIENTATION = 0x0112
RAMP = np.arange(0, 256, 4, np.uint8).reshape(8, 8)  # no symmetry, so that every wrong turn shows


def encode(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def decode(image, form="PNG", **options):
    """Pixels [h, w, 3] after a round trip through a file."""
    result = decode_image(encode(image, form, **options))
    assert result.mode == "RGB"
    return np.asarray(result)


def png(color_type, depth, rows, *chunks, width=2, height=1):
    """PNG written by hand, for what Pillow does not write."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG"])
def test_the_size_is_known_before_anything_is_decoded(form):
    data = encode(Image.new("RGB", (300, 200)), form)
    assert image_size(data) == (300, 200)


def test_the_size_is_what_the_file_says():
    assert image_size(png(0, 8, [b"\0"], width=10_000, height=9_000)) == (10_000, 9_000)
    bomb = png(0, 8, [b"\0"], width=100_000, height=50_000)
    for data, reason in ((b"", "empty file"), (b"no image", "not an image"), (bomb, "too large")):
        with pytest.raises(ImageError, match=reason):
            image_size(data)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_gray_becomes_three_equal_channels(form):
    options = {"lossless": True} if form == "WEBP" else {}
    assert (decode(Image.fromarray(RAMP), form, **options) == RAMP[..., None]).all()


def test_one_bit():
    assert decode(Image.fromarray(RAMP > 100)).tolist() == (np.repeat((RAMP > 100)[..., None], 3, 2) * 255).tolist()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(form, orientation):
    """The files are made by turning the picture back: rows 0 and columns 0 lie as the EXIF standard says."""
    turn_back = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.T,
        6: lambda a: a.T[::-1],
        7: lambda a: a[::-1, ::-1].T,
        8: lambda a: a.T[:, ::-1],
    }
    upright = np.kron(np.array([[0, 60, 120], [180, 210, 250]], np.uint8), np.ones((8, 8), np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turn_back[orientation](upright)))
    options = {"lossless": True} if form == "WEBP" else {}
    shown = decode(stored, form, exif=exif, **options)
    np.testing.assert_allclose(shown[..., 0].astype(int), upright, atol=3)


def test_damaged_exif_does_not_cost_the_image():
    assert decode(Image.fromarray(RAMP), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40).shape == (
        8,
        8,
        3,
    )


def test_alpha_is_laid_over_white():
    image = Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]], np.uint8))
    assert decode(image).tolist() == [[[200, 0, 0], [255, 255, 255], [204, 204, 204]]]
    assert decode(Image.new("LA", (1, 1), (10, 0))).tolist() == [[[255, 255, 255]]]


def test_palette_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert decode(image).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert decode(image, transparency=1).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert decode(image, transparency=bytes([255, 0])).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_gray_with_a_transparent_value():
    data = png(0, 8, [bytes([7, 9])], (b"tRNS", struct.pack(">H", 9)))
    assert np.asarray(decode_image(data)).tolist() == [[[7, 7, 7], [255, 255, 255]]]


def test_cmyk():
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:, 8:, 0] = 255  # cyan takes the red away
    shown = decode(Image.frombytes("CMYK", (16, 16), ink.tobytes()), "JPEG", quality=95)
    np.testing.assert_allclose(shown[4, 2].astype(int), [255, 255, 255], atol=4)
    np.testing.assert_allclose(shown[4, 13].astype(int), [0, 255, 255], atol=4)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_gray_is_scaled_not_clipped(form):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert decode(Image.fromarray(values), form)[..., 0].tolist() == [[0, 1, 128, 255]]


def test_sixteen_bit_gray_with_a_transparent_value():
    data = png(0, 16, [struct.pack(">2H", 0x0707, 0x0909)], (b"tRNS", struct.pack(">H", 0x0909)))
    assert np.asarray(decode_image(data)).tolist() == [[[7, 7, 7], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("values", "tags", "seen"),
    [
        (np.array([[0, 257, 65535]], np.uint16), {262: 0}, [255, 254, 0]),  # white is zero
        (np.array([[0, 1, 255]], np.uint8), {262: 0}, [255, 254, 0]),
        (np.array([[0, 1, 2]], np.float32), {262: 0}, [255, 128, 0]),
        (np.array([[0, 2**31, 2**32 - 1]], np.uint32).view(np.int32), {339: 1}, [0, 128, 255]),
        (np.array([[-(2**31), 0, 2**31 - 1]], np.int32), {339: 2}, [0, 128, 255]),
        (np.array([[-128, 0, 127]], np.int8).view(np.uint8), {339: 2}, [0, 128, 255]),
    ],
)
def test_gray_of_a_tiff_means_what_its_tags_say(values, tags, seen):
    """Which Pillow does not look at, but for the photometric tag of 8 bits."""
    data = bytearray(encode(Image.fromarray(values), "TIFF", tiffinfo={339: 1} if 339 in tags else {}))
    for tag, value in tags.items():
        at = data.index(struct.pack("<HHI", tag, 3, 1)) + 8
        data[at : at + 2] = struct.pack("<H", value)
    assert np.asarray(decode_image(bytes(data)))[0, :, 0].tolist() == seen


def test_sixteen_bit_colour():
    data = png(2, 16, [struct.pack(">6H", 0, 32896, 65535, 65535, 0, 257)])
    assert np.asarray(decode_image(data)).tolist() == [[[0, 128, 255], [255, 0, 1]]]


def test_floats_and_integers_are_stretched():
    assert decode(Image.fromarray(np.array([[-1, 0, 1]], np.float32)), "TIFF")[..., 0].tolist() == [[0, 128, 255]]
    assert decode(Image.fromarray(np.array([[-10, 0, 90]], np.int32)), "TIFF")[..., 0].tolist() == [[0, 26, 255]]
    assert decode(Image.fromarray(np.full((2, 2), 7, np.float32)), "TIFF").max() == 0
    wide = np.array([[-3e38, 0, 3e38]], np.float32)
    assert decode(Image.fromarray(wide), "TIFF")[..., 0].tolist() == [[0, 128, 255]]
    with pytest.raises(ImageError, match="not finite"):
        decode(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF")


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(form):
    first, second = Image.new("RGB", (4, 4), (250, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 250))
    shown = decode(first, form, save_all=True, append_images=[second])
    np.testing.assert_allclose(shown[0, 0].astype(int), [250, 0, 0], atol=3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"\0" * 1000, "not an image"),
        (b"plain text, named .jpg", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # would start Ghostscript
        (encode(Image.fromarray(RAMP), "JPEG")[:-60], "truncated"),
        (encode(Image.fromarray(RAMP), "BMP")[:-9], "truncated"),
        (b"P5\n0 5\n255\n", "not an image"),
        (b"P5\n100000 100000\n255\n", "too large"),
        (png(0, 8, [b"\0"], width=60_000, height=60_000), "too large"),
    ],
)
def test_reasons(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode_image(data)


def corpus(form):
    """The same small photograph in every mode that the format holds."""
    photo = decode_image(list_images("sklearn:photos").reader().read(40)).resize((24, 20))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    options = {"exif": exif} if form in ("JPEG", "PNG", "TIFF") else {}
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16", "CMYK", "F", "YCbCr"):
        try:
            image = photo.convert("L").convert("I;16") if mode == "I;16" else photo.convert(mode)
            yield encode(image, form, **options)
        except (OSError, ValueError):
            continue
    yield encode(photo, form, **{"TIFF": {"compression": "tiff_lzw"}, "JPEG": {"progressive": True}}.get(form, {}))


def mutate(data, rng):
    data = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:
        start = rng.randrange(len(data))
        data[start : start + rng.randrange(1, 40)] = bytes(rng.randrange(40))
    for _ in range(rng.randrange(1, 12) if kind > 1 else 0):  # headers more often than pixels
        data[rng.randrange(min(len(data), 200) if kind == 2 else len(data))] = rng.randrange(256)
    return bytes(data)


def outcome(data):
    """ "RGB", or the reason why not; anything but an ImageError fails the test."""
    try:
        return decode_image(data).mode
    except ImageError as error:
        return str(error)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
def test_mutated_images_decode_or_raise_image_error_and_never_make_a_sound(form, capfd):
    rng, outcomes = random.Random(form), []
    for data in corpus(form):
        assert outcome(data) == "RGB"
        mutated = [mutate(data, rng) for _ in range(8)]
        reasons = [outcome(m) for m in mutated]
        assert reasons == [outcome(m) for m in mutated]  # reasons are written to a file that must not vary
        outcomes += reasons
    assert 0 < outcomes.count("RGB") < len(outcomes)
    assert not any("\n" in reason or " at 0x" in reason for reason in outcomes)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "" or form == "TIFF"  # libtiff speaks from C


def test_threads_share_the_silence_and_give_the_callers_filters_back():
    loud = encode(Image.fromarray(RAMP), "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")  # Pillow warns: truncated EXIF
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(decode_image, [loud] * 200))
    assert all(image.size == (8, 8) for image in images)
    assert warnings.filters == before
