"""What counts as an image: names, first bytes, hidden names, and how what is left out is told."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stages.inputs.images.kind import (
    FORMATS,
    HEAD_BYTES,
    coding,
    describe_left_out,
    extension,
    is_hidden,
    is_image,
    is_image_head,
    is_image_name,
)

FTYP = b"\0\0\0\x1cftyp%s\0\0\0\0mif1%smiaf"


def encode(mode, size, form):
    """File of an image in a format, or None where it does not hold the mode."""
    out = io.BytesIO()
    try:
        Image.new(mode, size).save(out, form)
    except (OSError, ValueError, KeyError):
        return None
    return out.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "BMP", "DIB", "WEBP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_every_format_that_pillow_writes_is_known_by_its_first_bytes(form):
    files = [encode(mode, (33, 17), form) for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16")]
    files = [data for data in files if data]
    assert files
    assert all(is_image_head(data[:HEAD_BYTES]) for data in files)
    assert not any(is_image_head(b"\0" + data[: HEAD_BYTES - 1]) for data in files)


def test_names_are_those_that_pillow_registers():
    """As far as formats are decoded here; a name in capitals is the same name."""
    Image.init()
    formats = {**Image.EXTENSION, ".mpo": "JPEG"}
    expected = {suffix for suffix, form in formats.items() if form in FORMATS}
    assert all(is_image_name(f"a/b{suffix.upper()}") for suffix in expected)
    assert not any(is_image_name(name) for name in ("jpg", "a.jpg/b", "a.jpg.1", "a.txt", "a.eps", "a.mp4"))


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (FTYP % (b"heic", b"heic"), "HEIF"),
        (FTYP % (b"mif1", b"heic"), "HEIF"),
        (FTYP % (b"msf1", b"hevc"), "HEIF"),
        (FTYP % (b"avif", b"MA1B"), "AVIF"),
        (FTYP % (b"mif1", b"avif"), "AVIF"),
        (b"\0\0\0\x1cftypisom\0\0\2\0isomiso2mp41", None),  # a film
        (b"\0\0\0\x14ftypqt  \0\0\2\0qt  ", None),
        (b"\0\0\0\x10ftypmp42\0\0\0\0heic", None),  # heic stands behind the end of the box
    ],
)
def test_heic_and_avif_are_told_from_films_and_from_each_other(head, kind):
    assert is_image_head(head) == (kind is not None)
    assert coding(head) == kind


@pytest.mark.parametrize(
    "head",
    [
        b"P5\n# made by hand\n24 7\n255\n",
        b"P6 640 480 65535\n\0",
        b"P4\n#" + b"x" * 300 + b"\r\n24 7\n\xff",
        b"P1\n3 2\n0 1 0\n",
        b"P3 2 1 255 0 0 0",
        b"Pf\n3 2\n-1.0\n",
        b"MM\0*\0\0\0\x08",
        b"II+\0\x08\0\0\0",
        b"\xff\x4f\xff\x51\0",
    ],
)
def test_images_that_pillow_does_not_write(head):
    assert is_image_head(head)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"P",
        b"P5",
        b"P5 is a protein",
        b"P1 10\nP2 20\n",  # a list of paths and labels
        b"P2 10 20 30\nP3 11 21 31\n",
        b"P6\n640 0\n255\n",
        b"BM",
        b"BMW 320i, 1978, black, one owner",
        b"BM" + bytes(100),
        b"RIFF\x24\0\0\0WAVEfmt ",
        b"GIF images are old",
        b"\x89PNG",
        b"\xff\xfb\x90\0",  # MP3
        b"(\0\0\0" + b"\xff" * 60,
        b"{\"label\": 3}",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
    ],
)  # fmt: skip
def test_a_few_letters_do_not_make_an_image(head):
    assert not is_image_head(head)


@given(st.text(max_size=30))
def test_the_first_bytes_are_read_only_where_the_name_says_nothing(stem):
    def unread():
        raise AssertionError("opened for nothing")

    assert is_image(f"{stem}/a.jpg", unread)
    assert is_image("notes.txt", lambda: b"GIF89a\1\0\1\0")
    assert not is_image("notes.txt", lambda: b"GIF files")


@pytest.mark.parametrize(
    "name",
    [".1.jpg", "a/.1.jpg", ".git/1.jpg", "a/.cache/1.jpg", "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "lost+found/#12",
     "$RECYCLE.BIN/S-1-5/1.jpg", "$Recycle.Bin/1.jpg", "System Volume Information/1", "__MACOSX/cat/._1.jpg",
     "PaxHeader/1.jpg", "cat/PaxHeaders.1234/1.jpg", "@eaDir/", ".git/", "./.1.jpg", "./@eaDir/1.jpg"],
)  # fmt: skip
def test_hidden(name):
    assert is_hidden(name)


@pytest.mark.parametrize(
    "name",
    ["1.jpg", "./1.jpg", "../cat/1.jpg", "/cat/1.jpg", "cat/", "./", "@home/1.jpg", "lost+found", "a.b/c", "paxos/1"],
)
def test_not_hidden(name):
    assert not is_hidden(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.TXT", ".txt"),
        ("a.tar.GZ", ".gz"),
        ("Makefile", ""),
        ("a.b/c", ""),
        ("trailing.", ""),
        ("notes.1", ".1"),
        ("1.2.840.113619.2.55.3", ".3"),
        ("1.2.840.10008.5.1.4.1234567", ""),
        ("What is this. A sentence", ""),
        ("a.\udcff", ""),
        ("a.фото", ".фото"),
    ],
)
def test_extension(name, expected):
    assert extension(name) == expected


@pytest.mark.parametrize(
    ("left_out", "line"),
    [
        ({}, ""),
        ({".txt": 25, ".json": 2}, "left out: 27 files: 25 .txt, 2 .json"),
        ({"": 1}, "left out: 1 file: 1 without extension"),
        ({".b": 1, ".a": 1, "special file": 2}, "left out: 4 files: 2 special file, 1 .a, 1 .b"),
        ({".txt": 12_000}, "left out: 12,000 files: 12,000 .txt"),
        (
            {f".{i}": 20 - i for i in range(10)},
            "left out: 155 files: 20 .0, 19 .1, 18 .2, 17 .3, 16 .4, 15 .5, 14 .6, 13 .7, 23 of 2 other kinds",
        ),
    ],
)
def test_what_was_left_out_is_one_line(left_out, line):
    assert describe_left_out(left_out) == line
