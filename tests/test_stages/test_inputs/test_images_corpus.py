"""A folder as bad as folders get, through the real extraction: every input ends as a row or as a listed failure."""

import io
import json
import os
import random
import struct
import time
import zlib
from functools import cache

import numpy as np
import pytest
from PIL import Image

from stages.extract import ExtractOptions, extract_set
from stages.inputs.images import ImageError, decode_image, list_images

FORMATS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "WEBP": "webp", "PPM": "ppm"}
FORMATS |= {"JPEG2000": "jp2", "AVIF": "avif"}
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I;16B", "I", "F")
ROW, FAILED, EITHER = "row", "failed", "either"
SECONDS = 2.0  # for one image at most, on a busy machine; a bomb of these dimensions would take much longer


def encode(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@cache
def photo(width=40, height=32):
    return decode_image(list_images("sklearn:photos").reader().read(40)).resize((width, height))


def in_mode(mode):
    gray = np.asarray(photo().convert("L"))
    if mode in ("I", "F", "I;16"):
        return Image.fromarray(gray.astype({"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]) * 200)
    if mode == "I;16B":
        return Image.frombytes("I;16B", (40, 32), (gray.astype(">u2") * 200).tobytes())
    if mode == "PA":
        return photo().quantize(16).convert("PA")
    return Image.new("LAB", (40, 32), (120, 90, 200)) if mode == "LAB" else photo().convert(mode)


def modes():
    """Every colour mode in every format that holds it."""
    for form, suffix in FORMATS.items():
        for mode in MODES:
            try:
                data = encode(in_mode(mode), form)
            except (OSError, ValueError):  # not in this format
                continue
            yield f"modes/{mode.replace(';', '-')}.{suffix}", data


def variants():
    """What else an intact file may be: palettes, inks, animations, orientations, odd sizes."""
    yield "palette.png", encode(photo().quantize(16), "PNG", transparency=3)
    yield "palette-alpha.png", encode(photo().quantize(4), "PNG", transparency=bytes([0, 100, 200, 255]))
    yield "gray-transparent.png", encode(photo().convert("L"), "PNG", transparency=7)
    inks = encode(photo().convert("CMYK"), "JPEG")
    adobe = inks.index(b"\xff\xee")
    yield "adobe.jpg", inks
    yield "not-adobe.jpg", inks[:adobe] + inks[adobe + 2 + struct.unpack(">H", inks[adobe + 2 : adobe + 4])[0] :]
    yield "progressive.jpg", encode(photo(), "JPEG", progressive=True)
    yield "lzw.tif", encode(photo(), "TIFF", compression="tiff_lzw")
    for form in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
        frames = {"save_all": True, "append_images": [photo().rotate(90 * turn) for turn in (1, 2, 3)]}
        yield f"animation.{FORMATS[form]}", encode(photo(), form, **frames)
    for form in ("JPEG", "PNG", "TIFF", "WEBP"):
        for orientation in (*range(10), 65535):
            exif = Image.Exif()
            exif[0x0112] = orientation
            yield f"turned-{orientation}.{FORMATS[form]}", encode(photo(), form, exif=exif)
    for width, height in ((1, 1), (1, 2), (1, 5000), (5000, 1)):
        yield f"{width}x{height}.png", encode(photo(width, height), "PNG")
    yield "in-truth-a.png", encode(photo(), "JPEG")
    yield "in-truth-a.jpg", encode(photo(), "WEBP")
    yield "more-after-the-end.jpg", encode(photo(), "JPEG") + b"\0" * 999


def names():
    data = encode(photo(), "PNG")
    for name in (
        "new\nline",
        "tab\tand bell\a",
        "🐈",
        "quote'\"`$(x)",
        "  spaces  ",
        "ü" * 100,
        "-rf",
        "a.jpg",
        "%s{0}",
    ):
        yield f"names/{name}.png", data
    yield "names/UPPER.PNG", data
    yield os.fsdecode(b"names/not-utf8-\xff\xfe.png"), data
    yield os.fsdecode(b"class-\xe9t\xe9/1.png"), data
    yield "a/b/c/d/e/f/g/deep.png", data
    yield "folder.jpg/inside.png", data


def patch(data, at, *values, form=">I"):
    """Data with numbers written over it from a place on."""
    new = b"".join(struct.pack(form, value) for value in values)
    return data[:at] + new + data[at + len(new) :]


def bombs():
    """Small files that say they are huge."""
    png = patch(encode(photo(), "PNG"), 16, 100_000, 100_000)
    yield "bomb.png", patch(png, 29, zlib.crc32(png[12:29]))
    jpeg = encode(photo(), "JPEG")
    yield "bomb.jpg", patch(jpeg, jpeg.index(b"\xff\xc0") + 5, 65_500, 65_500, form=">H")
    tiff = encode(photo(), "TIFF")
    for tag in (256, 257):
        tiff = patch(tiff, tiff.index(struct.pack("<HH", tag, 4)) + 8, 100_000, form="<I")
    yield "bomb.tif", tiff
    webp = encode(photo(), "WEBP", exif=b"Exif\0\0MM\0*")  # extended: the canvas has its own size
    assert webp[12:16] == b"VP8X"
    yield "bomb.webp", webp[:24] + b"\xff\xff\x00\xff\xff\x00" + webp[30:]
    lossless = encode(photo(), "WEBP", lossless=True)
    yield "bomb-lossless.webp", patch(lossless, 21, 0x0FFFFFFF, form="<I")
    yield "bomb.gif", patch(encode(photo(), "GIF"), 6, 65_535, 65_535, form="<H")
    yield "bomb.bmp", patch(encode(photo(), "BMP"), 18, 100_000, 100_000, form="<i")
    yield "bomb.ppm", b"P6\n100000 100000\n255\n" + bytes(99)
    jp2 = encode(photo(), "JPEG2000")
    yield "bomb.jp2", patch(jp2, jp2.index(b"ihdr") + 4, 100_000, 100_000)
    avif = encode(photo(), "AVIF")
    yield "bomb.avif", patch(avif, avif.index(b"ispe") + 8, 100_000, 100_000)


def garbage():
    yield "empty.jpg", b""
    yield "zeros.png", bytes(5000)
    yield "text.jpg", b"This is a note, and no photograph.\n" * 20
    yield "page.jpg", b"<!DOCTYPE html><title>404 Not Found</title>"
    yield "script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    yield "drawing.gif", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    yield "noise.webp", random.Random(1).randbytes(3000)
    for form, suffix in FORMATS.items():
        yield f"head.{suffix}", encode(photo(), form)[:12]
    yield "nan.tif", encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF")


def mutations():
    """Cut and flipped at random: whether enough is left is the decoder's to say."""
    rng = random.Random(0)
    for form, suffix in FORMATS.items():
        whole = encode(photo(), form)
        for number in range(12):
            yield f"cut/{number}.{suffix}", whole[: rng.randrange(len(whole))]
            flipped = bytearray(whole)
            for _ in range(rng.randrange(1, 6)):
                flipped[rng.randrange(len(whole) // 4, len(whole))] ^= 1 << rng.randrange(8)
            yield f"flipped/{number}.{suffix}", bytes(flipped)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder, and what must become of each id."""
    root, fates = tmp_path_factory.mktemp("corpus"), {}
    for fate, makers in {ROW: (modes, variants, names), FAILED: (bombs, garbage), EITHER: (mutations,)}.items():
        for make in makers:
            for name, data in make():
                path = os.path.join(root, name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "xb") as file:
                    file.write(data)
                fates[name.encode("utf-8", "backslashreplace").decode()] = fate
    (root / "empty-folder.jpg").mkdir()
    (root / "notes.txt").write_text("no image")
    (root / "around").symlink_to(root)  # and so for ever
    for name, target in {"loop.png": "loop.png", "gone.png": "nowhere.png", "under.png": "notes.txt/x.png"}.items():
        (root / name).symlink_to(target)
        fates[name] = FAILED
    (root / "link.png").symlink_to("palette.png")
    fates["link.png"] = ROW
    return root, fates


def test_every_input_ends_as_a_row_or_as_a_listed_failure(corpus, backbone, tmp_path, capfd):
    root, fates = corpus
    samples = list_images(str(root))
    assert len(samples) >= 300
    assert set(samples.ids) == set(fates)
    assert list_images(str(root)).ids == samples.ids

    spec = backbone.feature_spec("float16", "none")
    cache = extract_set("corpus", samples, spec, tmp_path, lambda: backbone, options=ExtractOptions(max_failures=1.0))

    inputs = cache.inputs()
    failures = [json.loads(line) for line in (cache.path / "failures.jsonl").read_text("utf-8").splitlines()]
    assert inputs.ids == samples.ids
    assert cache.n_rows + len(failures) == len(samples)
    failed = {failure["id"] for failure in failures}
    assert failed == {i for i, lost in zip(inputs.ids, inputs.failed, strict=True) if lost}
    assert {i for i in failed if fates[i] == ROW} == set()
    assert {i for i, fate in fates.items() if fate == FAILED} - failed == set()
    assert 0 < sum(fates[i] == EITHER for i in failed) < sum(fate == EITHER for fate in fates.values())
    reasons = [failure["reason"] for failure in failures]
    assert all(reason and len(reason) <= 160 and reason.isprintable() for reason in reasons)
    assert not any(" at 0x" in reason or str(root) in reason for reason in reasons)
    assert capfd.readouterr().out == ""

    def not_needed():
        pytest.fail("nothing has changed")

    again = extract_set(
        "corpus", list_images(str(root)), spec, tmp_path, not_needed, options=ExtractOptions(max_failures=1.0)
    )
    assert again.path == cache.path


def test_no_image_takes_long(corpus):
    """Whatever a header says, nothing is decoded that is too large."""
    samples = list_images(str(corpus[0]))
    reader, seconds = samples.reader(), {}
    for i, name in enumerate(samples.ids):
        began, outcome = time.monotonic(), ROW
        try:
            decode_image(reader.read(i))
        except ImageError as error:
            outcome = str(error)
        seconds[name] = time.monotonic() - began
        if name.startswith("bomb") and name != "bomb.avif":  # libavif has a limit of its own, and gives no reason
            assert outcome.startswith("too large"), name
    assert not {name: taken for name, taken in seconds.items() if taken > SECONDS}
