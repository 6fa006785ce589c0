"""A folder made to be awkward: each kind of file that people's folders hold, by what must become of it."""

import io
import os
import socket
import struct
import zlib

import numpy as np
import pillow_heif
from PIL import Image

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


def make_folder(root, elsewhere):
    """All of that below `root`, and what its links lead to below `elsewhere`."""
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


LINKED_ROWS = {"linked/photo.jpg", "linked/photo", "linked/more/1.png"}
LINKED_FAILURES = dict.fromkeys(("linked/gone.jpg", "linked/gone-class"), "cannot be read: No such file or directory")
LINKED_FAILURES |= {"linked/itself": "cannot be read: Too many levels of symbolic links"}
