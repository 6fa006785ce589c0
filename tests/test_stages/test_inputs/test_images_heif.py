"""HEIC photographs: decoded where pillow-heif is installed, else failures that say what to install, until then."""

import io
import sys

import numpy as np
import pillow_heif
import pytest
from PIL import Image, features

from stages.extract import ExtractOptions, extract_set
from stages.inputs.images import ImageError, decode_image, is_overcome, list_images

GRAYS = np.kron(np.array([[0, 60, 120, 150], [180, 210, 250, 20]], np.uint8), np.ones((16, 16), np.uint8))
PIXELS = np.dstack([GRAYS, GRAYS[::-1], np.full_like(GRAYS, 99)])  # [32, 64, 3]; every wrong turn shows
NEEDED = r"pip install 'mofe-feature-cache\[heif\]'"


def heic(pixels=PIXELS, mode="RGB", **options):
    out = io.BytesIO()
    pillow_heif.encode(mode, pixels.shape[1::-1], pixels.tobytes(), out, quality=-1, chroma=444, **options)
    return out.getvalue()


@pytest.fixture
def without_heif(monkeypatch):
    """As where the package is not installed: importing it fails."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    return monkeypatch


def test_a_heic_is_decoded():
    shown = decode_image(heic())
    assert shown.mode == "RGB"
    np.testing.assert_allclose(np.asarray(shown, int), PIXELS, atol=8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_upright(orientation):
    """Turned once: by the file's own transformation or by EXIF, not by both."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    png = io.BytesIO()
    Image.fromarray(PIXELS).save(png, "PNG", exif=exif)
    expected = np.asarray(decode_image(png.getvalue()), int)
    np.testing.assert_allclose(np.asarray(decode_image(heic(exif=exif.tobytes())), int), expected, atol=8)


def test_gray_and_transparency():
    np.testing.assert_allclose(np.asarray(decode_image(heic(GRAYS, "L")), int)[..., 0], GRAYS, atol=8)
    clear = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    assert np.asarray(decode_image(heic(clear, "RGBA"))).min() > 250  # white shows through


def test_damaged_ones_are_failures():
    data = heic()
    for cut in (40, 200, len(data) // 2, len(data) - 50):
        with pytest.raises(ImageError, match=r"damaged|truncated"):
            decode_image(data[:cut])


def test_without_the_package_the_reason_names_the_extra(without_heif):
    with pytest.raises(ImageError, match=NEEDED) as caught:
        decode_image(heic())
    assert not is_overcome(str(caught.value))
    without_heif.undo()
    assert is_overcome(str(caught.value))
    assert not is_overcome("empty file")


def test_without_avif_in_pillow_the_reason_names_the_extra(without_heif):
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, "AVIF", quality=100)
    assert decode_image(out.getvalue()).size == (64, 32)
    without_heif.setattr(features, "check", lambda name: name != "avif")  # Pillow says so where it was built without
    with pytest.raises(ImageError, match=NEEDED):
        decode_image(out.getvalue())


def folder_of(path):
    path.mkdir()
    for n in range(6):
        (path / f"{n}.HEIC").write_bytes(heic(PIXELS[:, n : n + 40]))
        Image.fromarray(PIXELS[:, n + 10 : n + 50]).save(path / f"{n}.png")
    (path / "notes.png").write_text("no image")
    return path


def test_what_failed_for_want_of_it_is_extracted_once_it_is_there(tmp_path, backbone, without_heif):
    folder, spec = folder_of(tmp_path / "images"), backbone.feature_spec("float16", "none")

    def extract(**options):
        chosen, root = ExtractOptions(**{"max_failures": 1.0} | options), tmp_path / "caches"
        return extract_set("photos", list_images(str(folder)), spec, root, lambda: backbone, options=chosen)

    before = extract()
    assert (before.n_rows, len(before.failures())) == (6, 7)
    assert extract().path == before.path
    without_heif.undo()
    after = extract()
    assert (after.n_rows, [failure.id for failure in after.failures()]) == (12, ["notes.png"])
    assert after.ids[0] == "0.HEIC"
    assert after.manifest.made_with["pillow-heif"] == pillow_heif.__version__
    assert extract().path == after.path  # fresh: no failure that is left was for want of anything


def test_nor_is_a_stopped_extraction_stuck_with_them(tmp_path, backbone, without_heif):
    folder, spec = folder_of(tmp_path / "images"), backbone.feature_spec("float16", "none")

    def extract():
        images, options = list_images(str(folder)), ExtractOptions(max_failures=0.1)
        return extract_set("photos", images, spec, tmp_path / "caches", lambda: backbone, options=options)

    with pytest.raises(Exception, match=NEEDED):
        extract()
    without_heif.undo()
    assert extract().n_rows == 12
