"""JPEG files: decoded smaller where that is asked for, and told apart from those that Pillow alone decodes."""

import numpy as np
import pytest

from stages.inputs.images import ImageError, decode_image, undecoded_jpeg
from tests.test_stages.jpegs import damaged, difference, encode, odd, photo, plain, turned


def size(width, height, least_side, **options):
    return decode_image(encode(photo(width, height), **options), least_side).size


@pytest.mark.parametrize(
    ("given", "least_side", "shown"),
    [
        ((640, 427), 0, (640, 427)),
        ((640, 427), 214, (640, 427)),
        ((640, 427), 213, (320, 214)),  # odd sides are rounded up
        ((640, 427), 107, (320, 214)),
        ((427, 640), 106, (107, 160)),
        ((640, 427), 53, (80, 54)),
        ((640, 427), 1, (80, 54)),  # an eighth is the least
    ],
)
def test_a_jpeg_is_decoded_as_small_as_its_short_side_allows(given, least_side, shown):
    assert size(*given, least_side) == shown


def test_a_turned_jpeg_is_turned_upright_when_it_is_decoded_smaller():
    for orientation, shown in ((1, (320, 214)), (3, (320, 214)), (6, (214, 320)), (8, (214, 320))):
        assert size(640, 427, 200, **turned(orientation)) == shown


def test_smaller_it_is_the_same_picture():
    """Mean difference to a picture that is reduced by averages of 2 x 2 pixels, which a DCT coefficient is close to."""
    image = decode_image(encode(photo(640, 428)))
    assert difference(decode_image(encode(photo(640, 428)), 214), image.reduce(2)) < 1.5


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "BMP", "JPEG2000"])
def test_other_formats_are_decoded_in_full(form):
    data = encode(photo(160, 120), form)
    assert np.array_equal(decode_image(data, 8), decode_image(data))


def reason(data, least_side=0):
    """ "RGB", or why the file cannot be used."""
    try:
        return decode_image(data, least_side).mode
    except ImageError as error:
        return str(error)


def test_decoded_smaller_the_same_files_fail_for_the_same_reasons():
    files = damaged(120)
    reasons = [reason(data) for data in files]
    assert reasons == [reason(data, 8) for data in files]
    assert 20 < reasons.count("RGB") < 110


@pytest.mark.parametrize("name", plain())
def test_whole_files_of_the_usual_kind_may_be_decoded_elsewhere(name):
    left = undecoded_jpeg(plain()[name])
    assert left is not None
    assert left.data == plain()[name]
    assert left.orientation == (int(name[-1]) if name.startswith("orientation") else 1)


@pytest.mark.parametrize("name", odd())
def test_what_decoders_read_otherwise_is_pillows(name):
    assert decode_image(odd()[name]).mode == "RGB"
    assert undecoded_jpeg(odd()[name]) is None


def test_what_pillow_cannot_decode_is_never_decoded_elsewhere(request):
    """So the same files fail for the same reasons, whoever decodes the others."""
    files = damaged(2 * request.config.getoption("--mutants"))
    left = [data for data in files if undecoded_jpeg(data) is not None]
    assert len(files) / 5 < len(left) < len(files)  # most with other pixels are whole files still
    assert {reason(data) for data in left} == {"RGB"}


def test_nothing_else_is_left():
    assert undecoded_jpeg(b"") is None
    assert undecoded_jpeg(b"\xff\xd8\xff") is None
    assert undecoded_jpeg(encode(photo(8, 8))[:-2]) is None  # nothing says that it has come to its end
