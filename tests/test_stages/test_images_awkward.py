"""A folder made to be awkward: each kind of file that people's folders hold, and the counts that a person expects.

They are listed by what must become of each: a row, a failure (with its reason), left out (by extension), or hidden.
"""

import io
import os
import socket
import struct
import subprocess
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from stages.extract import extract_set
from stages.images import describe_left_out, list_images

PIXELS = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)


def encode(form, **options):
    out = io.BytesIO()
    if form == "HEIF":
        pillow_heif.encode("RGB", (32, 24), PIXELS.tobytes(), out)
    else:
        Image.fromarray(PIXELS).save(out, form, **options)
    return out.getvalue()


def png_with(kind, body):
    data = encode("PNG")
    at = data.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data[:at] + chunk + data[at:]


JPEG, PNG, HEIC = encode("JPEG"), encode("PNG"), encode("HEIF")
LARGE = zlib.compress(bytes(5 * 2**20))
ROWS = {
    "cat/plain.jpg": JPEG,
    "cat/CAPITALS.JPEG": JPEG,
    "cat/stereo.MPO": encode("MPO", save_all=True, append_images=[Image.new("RGB", (32, 24))]),
    "cat/scan.JPX": encode("JPEG2000"),
    "cat/no-extension": JPEG,
    "cat/downloaded.jpg.1": JPEG,
    "cat/from-a-page.jpg?width=640": JPEG,
    "cat/large.jpg_large": JPEG,
    "cat/backup.png~": PNG,
    "cat/called-text.txt": PNG,
    "cat/0123456789abcdef": encode("WEBP"),
    "cat/animation": encode("GIF"),
    "cat/bitmap.dib": encode("DIB"),
    "cat/bitmap": encode("BMP"),
    "cat/drawing": b"P2\n# by hand\n2 2\n9\n0 3 6 9\n",
    "cat/phone.HEIC": HEIC,
    "cat/phone": HEIC,
    "cat/new.avif": encode("AVIF"),
    "cat/new": encode("AVIF"),
    "cat/captioned.png": png_with(b"zTXt", b"Description\0\0" + LARGE),
    "cat/colours.png": png_with(b"iCCP", b"profile\0\0" + LARGE),
    "cat/in truth a PNG.jpg": PNG,
    "cat/a.b/c.d/deep.tiff": encode("TIFF"),
}
FAILURES = {
    "dog/empty.jpg": (b"", "empty file"),
    "dog/notes.jpg": (b"no image at all", "not an image"),
    "dog/page.png": (b"<!DOCTYPE html><title>404</title>", "not an image"),
    "dog/half.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "dog/half-without-name": (PNG[: len(PNG) // 2], "truncated"),
}
LEFT_OUT = {
    "README.txt": b"Photographs of cats and dogs",
    "cat/notes.TXT": b"Mostly gray",
    "labels.json": b"{}",
    "cat/film.mp4": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
    "cat/Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "Makefile": b"all:\n",
    "P5.md": b"P5 is a small protein",
    "BM.md": b"BM is a make of car",
    "empty": b"",
}
HIDDEN = [
    ".DS_Store",
    "cat/.1.jpg.swp",
    "cat/._plain.jpg",
    ".git/1.jpg",
    "cat/@eaDir/plain.jpg/SYNOPHOTO_THUMB_M.jpg",
    "lost+found/#1234.jpg",
    "$RECYCLE.BIN/S-1-5-18/1.jpg",
    "System Volume Information/1.jpg",
    "__MACOSX/cat/1.jpg",
    "PaxHeaders.42/1.jpg",
]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    root = tmp_path_factory.mktemp("folder")
    for name, data in (ROWS | LEFT_OUT | dict.fromkeys(HIDDEN, JPEG)).items():
        write(root / name, data)
    for name, (data, _) in FAILURES.items():
        write(root / name, data)
    # Links: to files whatever their names, to folders, in circles, and to nothing.
    write(elsewhere / "blobs" / "a1b2", JPEG)
    write(elsewhere / "blobs" / "c3d4.txt", b"no image")
    write(elsewhere / "more" / "1.png", PNG)
    (root / "linked").mkdir()
    (root / "linked" / "photo.jpg").symlink_to(elsewhere / "blobs" / "a1b2")
    (root / "linked" / "photo").symlink_to(elsewhere / "blobs" / "a1b2")
    (root / "linked" / "text").symlink_to(elsewhere / "blobs" / "c3d4.txt")
    (root / "linked" / "more").symlink_to(elsewhere / "more")
    (root / "linked" / "up").symlink_to("..")
    (root / "linked" / "gone.jpg").symlink_to("nowhere.jpg")
    (root / "linked" / "gone-class").symlink_to(elsewhere / "unmounted")
    (root / "linked" / "itself").symlink_to("itself")
    os.mkfifo(root / "cat" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.open(root, os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{here}/socket.png")  # a socket's whole path must be short
        os.close(here)
    return root


LINKED_ROWS = {"linked/photo.jpg", "linked/photo", "linked/more/1.png"}
LINKED_FAILURES = dict.fromkeys(("linked/gone.jpg", "linked/gone-class"), "cannot be read: No such file or directory")
LINKED_FAILURES |= {"linked/itself": "cannot be read: Too many levels of symbolic links"}


def test_a_person_finds_each_file_where_it_belongs(folder):
    table = list_images(str(folder))
    assert set(table.ids) == {*ROWS, *FAILURES, *LINKED_ROWS, *LINKED_FAILURES}
    assert table.left_out == {
        ".txt": 2,
        "": 3,  # Makefile, empty, and the link called text
        ".md": 2,
        ".json": 1,
        ".mp4": 1,
        ".db": 1,
        "special file": 2,
    }
    assert describe_left_out(table.left_out) == (
        "left out: 12 files: 3 without extension, 2 .md, 2 .txt, 2 special file, 1 .db, 1 .json, 1 .mp4"
    )
    assert table.class_names == ("cat", "dog", "linked")


def test_every_image_is_a_row_or_a_failure_with_its_reason(folder, backbone, tmp_path):
    spec = backbone.feature_spec("float16", "none")
    cache = extract_set("awkward", list_images(str(folder)), spec, tmp_path, lambda: backbone, max_failures=1.0)
    assert set(cache.ids.tolist()) == {*ROWS, *LINKED_ROWS}
    reasons = {failure.id: failure.reason for failure in cache.failures()}
    expected = {name: reason for name, (_, reason) in FAILURES.items()} | LINKED_FAILURES
    assert reasons.keys() == expected.keys()
    assert {name: reasons[name] for name in expected if not reasons[name].startswith(expected[name])} == {}
    assert cache.n_rows + len(reasons) == cache.manifest.n_inputs
    assert sum(cache.manifest.left_out.values()) == 12


def test_a_note_added_beside_the_images_leaves_the_cache_fresh(backbone, tmp_path):
    for n in range(3):
        write(tmp_path / "images" / f"{n}.png", png_with(b"tEXt", b"n\0%d" % n))

    def extract():
        spec = backbone.feature_spec("float16", "none")
        return extract_set("pets", list_images(str(tmp_path / "images")), spec, tmp_path, lambda: backbone)

    cache = extract()
    write(tmp_path / "images" / "README.txt", b"three pets")
    again = extract()
    assert again.path == cache.path
    assert again.manifest.left_out == {}  # as it was sealed
    write(tmp_path / "images" / "3.png", PNG)
    newer = extract()
    assert newer.manifest.left_out == {".txt": 1}
    assert newer.fingerprint == cache.fingerprint


def test_one_file_is_an_image_by_its_name_or_by_its_first_bytes(folder):
    for name in ("cat/stereo.MPO", "cat/no-extension", "cat/downloaded.jpg.1", "cat/phone", "dog/half-without-name"):
        (only,) = list_images(str(folder / name)).ids
        assert only == os.path.basename(name)


def test_folders_that_link_to_one_another_end(tmp_path):
    for name in "abc":
        write(tmp_path / name / f"{name}.png", PNG)
    for name, other in ("ab", "bc", "ca"):
        (tmp_path / name / other).symlink_to(tmp_path / other)
    ids = list_images(str(tmp_path)).ids
    assert {os.path.basename(i) for i in ids} == {"a.png", "b.png", "c.png"}
    assert "a/b/c/c.png" in ids
    assert len(ids) == 9  # each of the three from each of the three


def test_a_tree_deeper_than_python_recurses(tmp_path):
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.symlink("gone.png", "1.png", dir_fd=here)
    os.close(here)
    try:
        assert list_images(str(tmp_path)).ids == ("d/" * 1100 + "1.png",)
    finally:
        subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # what cleans up after tests recurses
