"""Real images that come with scikit-learn: its handwritten digits and crops of its two photographs.

They are served as netpbm bytes: these depend on no compressor, so neither do the hashes of the images.
"""

import re
from collections import defaultdict
from functools import cache

import numpy as np

from cache.fingerprint import fingerprint
from stages.errors import InputError
from stages.inputs.images.netpbm import to_netpbm
from stages.inputs.images.table import Sample, SampleTable, make_table

TRAIN_SHARE = 0.6
CROP, STRIDE = 112, 50  # pixels; 77 crops of each photograph of 427 x 640
_DIGITS = re.compile(r"sklearn:digits(?:\[(\d(?:-\d)?(?:,\d(?:-\d)?)*)\])?(?:/(train|test|all))?", re.ASCII)


def list_embedded(source: str) -> SampleTable:
    """List an embedded set: `sklearn:digits`, of some classes `[0-6]` and a `/train` or `/test` part, `sklearn:photos`.

    Raises:
        InputError: No such set; the message says which there are.
    """
    if source == "sklearn:photos":
        return make_table(source, _crops())
    match = _DIGITS.fullmatch(source)
    spans = [span.split("-") for span in (match[1] or "0-9").split(",")] if match else []
    classes = {digit for span in spans for digit in range(int(span[0]), int(span[-1]) + 1)}
    if match is None or any(span[0] > span[-1] for span in spans):
        raise InputError(
            f"{source}: no such embedded set; there are sklearn:digits, sklearn:digits[0-6], sklearn:digits[3,5], "
            "each with /train, /test or /all, and sklearn:photos"
        )
    return make_table(source, _digits(classes, match[2] or "all"))


def _digits(classes: set[int], part: str) -> list[Sample]:
    return [
        _sample(f"{label}/{row:04d}.pgm", str(label), image)
        for row, (image, label, in_train) in enumerate(_all_digits())
        if label in classes and part in ("all", "train" if in_train else "test")
    ]


@cache
def _all_digits() -> list[tuple[np.ndarray, int, bool]]:
    """Pixels [8, 8] uint8, label and whether it is for training, of each image; a study lists several sets of them."""
    from sklearn.datasets import load_digits  # here, since it takes a second

    digits = load_digits()
    pixels = ((digits.images.astype(np.int32) * 255 + 8) // 16).astype(np.uint8)  # [n, 8, 8], 0 … 16 to 0 … 255
    return list(zip(pixels, digits.target.tolist(), _train_part(pixels, digits.target), strict=True))


def _train_part(pixels: np.ndarray, labels: np.ndarray) -> list[bool]:
    """Whether each image [n, 8, 8] is for training: per class the 60 % lowest hashes, so equal images stay together.

    The hash is of the pixels and a word, not of the file: a later split by the hash of the file is then independent.
    """
    hashes = [fingerprint(["train or test", image.tolist()]) for image in pixels]
    of_class: dict[int, set[str]] = defaultdict(set)
    for label, digest in zip(labels.tolist(), hashes, strict=True):
        of_class[label].add(digest)
    train = {digest for group in of_class.values() for digest in sorted(group)[: round(TRAIN_SHARE * len(group))]}
    return [digest in train for digest in hashes]


def _crops() -> list[Sample]:
    from sklearn.datasets import load_sample_images

    photos = load_sample_images()
    samples = []
    for path, photo in zip(photos.filenames, photos.images, strict=True):  # [h, w, 3] uint8
        name = re.split(r"[/\\.]", path)[-2]
        for top in range(0, photo.shape[0] - CROP + 1, STRIDE):
            for left in range(0, photo.shape[1] - CROP + 1, STRIDE):
                crop = photo[top : top + CROP, left : left + CROP]
                samples.append(_sample(f"{name}/{top:03d}-{left:03d}.ppm", name, crop))
    return samples


def _sample(sample_id: str, class_name: str, pixels: np.ndarray) -> Sample:
    """Sample of pixels [h, w] or [h, w, 3] uint8."""
    data = to_netpbm(pixels)
    return Sample(sample_id, class_name, len(data), 0, data)
