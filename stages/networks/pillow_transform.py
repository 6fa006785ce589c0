"""The transform of a backbone by Pillow and numpy alone, for where there is no torch: the same pixels to the bit."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.errors import InputError
from stages.inputs.images import MAX_PIXELS, ImageError

DRAFT_GAP = 2  # as Pillow's own thumbnails have it

_FILTERS = {each.name.lower(): each for each in Image.Resampling}


def least_side(side: float, decode: str) -> int:
    """What the short side of an image must keep when it is decoded, in pixels; 0: all of it.

    Args:
        side: that it is resized to.
        decode: as of `stages.config.BackboneConfig`.
    """
    return DRAFT_GAP * math.floor(side) if decode == "draft" else 0


def check_shape(side: float, width: int, height: int) -> None:
    """Refuse an image that resizing its short side to so many pixels would make larger than any may be.

    Raises:
        ImageError: it is so elongated.
    """
    short, long = sorted((width, height))
    if side * side * long / short > MAX_PIXELS:
        raise ImageError(f"too elongated: {width} x {height} pixels")


class PillowTransform:
    """What timm's `create_transform` makes of a Pillow image in evaluation, but the normalisation; safe in threads.

    Args:
        transform: as of `cache.FeatureSpec`.

    Attributes:
        size: side of the pixels.

    Raises:
        InputError: it is one that only torch does.
    """

    def __init__(self, transform: Mapping[str, Any]) -> None:
        _, height, width = transform["input_size"]
        self.size = int(width)
        self.decode = transform.get("decode", "pil")
        self._squash = transform.get("crop_mode") == "squash"
        self._side = width / transform["crop_pct"]
        filtered = _FILTERS.get(transform["interpolation"])
        reasons = {
            'decode = "cuda"': self.decode == "cuda",
            f"crop_mode = {transform.get('crop_mode')!r}": transform.get("crop_mode") not in ("center", "squash", None),
            f"crop_pct = {transform['crop_pct']}": transform["crop_pct"] > 1,
            f"interpolation = {transform['interpolation']!r}": filtered is None,
            f"a size of {height} x {width}": height != width,
        }
        if filtered is None or any(reasons.values()):
            why = next(reason for reason, holds in reasons.items() if holds)
            raise InputError(f"images cannot be prepared without torch, for the transform has {why}")
        self._filter = filtered

    @property
    def least_side(self) -> int:
        """What the short side of an image must keep when it is decoded, in pixels; 0: all of it."""
        return least_side(self._side, self.decode)

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize and crop.

        Args:
            image: RGB, upright.

        Returns:
            ``[3, size, size]``.

        Raises:
            ImageError: so elongated that resizing its short side would make it larger than any image may be.
        """
        check_shape(self._side, *image.size)
        wanted = self._resized(*image.size)
        if wanted != image.size:
            image = image.resize(wanted, self._filter)
        left, top = (round((side - self.size) / 2) for side in image.size)  # halves to the even one, as torchvision
        cropped = image.crop((left, top, left + self.size, top + self.size))
        return np.ascontiguousarray(np.asarray(cropped).transpose(2, 0, 1))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        side = math.floor(self._side)
        if self._squash:
            return side, side
        long = int(side * max(width, height) / min(width, height))
        return (side, long) if width <= height else (long, side)
