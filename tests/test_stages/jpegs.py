"""JPEG files of every kind, whole and damaged."""

import io
import random

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]  # 640 x 427


def encode(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def photo(width: int, height: int) -> Image.Image:
    return PHOTOS[0].resize((width, height))


def turned(orientation: int) -> dict:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def plain() -> dict[str, bytes]:
    """Files that every decoder reads."""
    image = photo(120, 90)
    kinds = {f"sampled {way}": {"subsampling": way} for way in ("4:4:4", "4:2:2", "4:2:0")}
    kinds |= {"progressive": {"progressive": True}, "optimised": {"optimize": True}}
    kinds |= {"restarts": {"restart_marker_rows": 1}, "comment": {"comment": b"\xff\xd8\xff"}}
    kinds |= {f"orientation {number}": turned(number) for number in range(1, 9)}
    gray = {"gray": encode(image.convert("L")), "gray progressive": encode(image.convert("L"), progressive=True)}
    return {name: encode(image, **options) for name, options in kinds.items()} | gray


def odd() -> dict[str, bytes]:
    """Files that Pillow reads, and not every other decoder, or not alike."""
    image = photo(120, 90)
    components = encode(image)
    frame, scan = components.index(b"\xff\xc0"), components.index(b"\xff\xda")
    ids = bytearray(components)
    ids[frame + 10 : frame + 19 : 3] = ids[scan + 5 : scan + 11 : 2] = b"RGB"
    return {
        "inks": encode(image.convert("CMYK")),
        "stored as RGB": encode(image, keep_rgb=True),
        "components called RGB": bytes(ids),
        "several pictures": encode(image, "MPO", save_all=True, append_images=[image]),
        "another kind": encode(image, "PNG"),
    }


def damaged(n: int) -> list[bytes]:
    """Truncated files, and files of which some bytes are others, more often of the headers."""
    rng, files = random.Random(0), [*plain().values()]
    found = []
    for number in range(n):
        data = bytearray(files[number % len(files)])
        if number % 4 == 0:
            found.append(bytes(data[: rng.randrange(2, len(data))]))
            continue
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(2, len(data) if number % 4 == 1 else 700)] = rng.randrange(256)
        found.append(bytes(data))
    return found


def difference(one, other) -> float:
    """Mean difference of two pictures, of 255."""
    return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean())
