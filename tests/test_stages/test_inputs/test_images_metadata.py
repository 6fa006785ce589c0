"""Intact images whose metadata is larger than Pillow or OpenJPEG likes: rows, in bounded memory; bombs stay refused."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import MAX_TEXT_CHUNK, PngInfo

from stages.inputs.images import ImageError, decode_image
from stages.inputs.images.metadata import without_large_metadata

PIXELS = np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8)
TEXT = b"a caption that never ends. " * (3 * MAX_TEXT_CHUNK // 27)  # 3 MiB, packed in a few KB
NOISE = np.random.default_rng(1).integers(0, 255, 3 * MAX_TEXT_CHUNK, np.uint8).tobytes()  # 3 MiB, packed or not
MEGABYTE = zlib.compress(bytes(MAX_TEXT_CHUNK), 1)


def encode(form, **options):
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, form, **options)
    return out.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks, after=b"", **options):
    """PNG with more chunks before its pixels, and after them."""
    data = encode("PNG", **options)
    start, end = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    return data[:start] + b"".join(chunks) + data[start:end] + after + data[end:]


def box(kind, body):
    return struct.pack(">I4s", len(body) + 8, kind) + body


def jp2(before, **options):
    """JP2 with another box before that of a kind."""
    data = encode("JPEG2000", irreversible=False, **options)
    at = data.index(before) - 4
    return data[:at] + box(b"uuid", NOISE) + data[at:]


def jpeg(*segments):
    data = encode("JPEG", quality=100, subsampling=0)
    return data[:2] + b"".join(struct.pack(">HH", kind, len(body) + 2) + body for kind, body in segments) + data[2:]


def text(packed):
    info = PngInfo()
    info.add_itxt("Description", TEXT.decode(), zip=packed)
    return info


EXACT = {
    "PNG: zTXt": png(chunk(b"zTXt", b"k\0\0" + zlib.compress(TEXT))),
    "PNG: zTXt after the pixels": png(after=chunk(b"zTXt", b"k\0\0" + zlib.compress(TEXT))),
    "PNG: iTXt as Pillow writes it": encode("PNG", pnginfo=text(packed=True)),
    "PNG: iTXt, not packed": encode("PNG", pnginfo=text(packed=False)),
    "PNG: ICC profile": encode("PNG", icc_profile=NOISE),
    "PNG: tEXt of 65 MiB": png(chunk(b"tEXt", b"k\0" + bytes(65 * MAX_TEXT_CHUNK))),
    "PNG: 80 zTXt of 1 MiB each": png(
        *[chunk(b"zTXt", b"k%d\0\0" % i + MEGABYTE) for i in range(80)]
    ),
    "PNG: everything at once": png(
        chunk(b"iCCP", b"k\0\0" + zlib.compress(NOISE)), after=chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(TEXT))
    ),
    "PNG: EXIF": encode("PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + NOISE),
    "TIFF: ICC profile, XMP, description": encode("TIFF", icc_profile=NOISE, tiffinfo={700: NOISE, 270: "x" * 10**6}),
    "TIFF: the same, packed": encode("TIFF", icc_profile=NOISE, tiffinfo={700: NOISE}, compression="tiff_lzw"),
    "WebP: ICC profile, XMP": encode("WEBP", lossless=True, icc_profile=NOISE, xmp=NOISE),
    "JP2: box before its header": jp2(b"jp2h"),
    "JP2: box before its pixels": jp2(b"jp2c"),
}  # fmt: skip
CLOSE = {
    "JPEG: ICC profile in 60 segments": encode("JPEG", quality=100, subsampling=0, icc_profile=NOISE),
    "JPEG: extended XMP, remarks": jpeg(
        *[(0xFFE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(65_000))] * 40, *[(0xFFFE, bytes(65_533))] * 20
    ),
    "JPEG: MPF of a second picture that is gone": encode(
        "MPO", quality=100, subsampling=0, save_all=True, append_images=[Image.new("RGB", (20, 12))]
    )[:-300],
    "AVIF: ICC profile, XMP": encode("AVIF", quality=100, subsampling="4:4:4", icc_profile=NOISE, xmp=NOISE),
}


@pytest.mark.parametrize("name", EXACT)
def test_large_metadata_costs_no_pixel(name):
    assert (np.asarray(decode_image(EXACT[name])) == PIXELS).all()


@pytest.mark.parametrize("name", CLOSE)
def test_nor_where_coding_loses_a_little(name):
    np.testing.assert_allclose(np.asarray(decode_image(CLOSE[name]), int), PIXELS, atol=12)


def test_a_remark_in_a_gif():
    out = io.BytesIO()
    Image.fromarray(PIXELS[..., 0]).save(out, "GIF", comment=NOISE)
    assert (np.asarray(decode_image(out.getvalue()))[..., 0] == PIXELS[..., 0]).all()


def test_the_orientation_beside_large_text_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 3
    assert (np.asarray(decode_image(encode("PNG", pnginfo=text(packed=True), exif=exif))) == PIXELS[::-1, ::-1]).all()
    profile = b"\nexif\n%d\n" % len(exif.tobytes()) + exif.tobytes().hex().encode()  # as ImageMagick writes it
    raw = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile))
    large = chunk(b"iCCP", b"k\0\0" + zlib.compress(NOISE))
    assert (np.asarray(decode_image(png(large, raw))) == PIXELS[::-1, ::-1]).all()


def test_text_that_would_unpack_to_much_is_not_unpacked():
    packed = zlib.compress(bytes(64 * MAX_TEXT_CHUNK), 1)
    data = png(
        chunk(b"zTXt", b"k\0\0" + packed),
        chunk(b"iCCP", b"k\0\0" + packed),
        after=chunk(b"iTXt", b"k\0\1\0\0\0" + packed),
    )
    tracemalloc.start()
    try:
        assert decode_image(data).size == (20, 12)
        assert tracemalloc.get_traced_memory()[1] < 8 * MAX_TEXT_CHUNK
    finally:
        tracemalloc.stop()


def test_a_bomb_of_pixels_is_refused_whatever_its_text():
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"zTXt", b"k\0\0" + zlib.compress(TEXT))
    bomb += chunk(b"IDAT", zlib.compress(bytes(60_000))) + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="too large: more than"):
        decode_image(bomb)


@pytest.mark.parametrize("name", ["PNG: zTXt", "PNG: ICC profile", "JP2: box before its pixels"])
def test_a_truncated_one_is_still_damaged(name):
    with pytest.raises(ImageError, match=r"truncated|damaged"):
        decode_image(EXACT[name][:-40])


def test_an_image_with_nothing_to_take_out_is_left_alone():
    for data in (b"", b"no image", encode("PNG"), encode("JPEG2000"), png(chunk(b"tEXt", b"k\0short")), encode("JPEG")):
        assert without_large_metadata(data) is None
    for name in ("PNG: zTXt", "JP2: box before its header"):
        for end in range(0, 200, 7):
            without_large_metadata(EXACT[name][:end])  # a damaged file ends somewhere, and so does this
