"""From an image's file to what the network takes: the part of stage one that threads do."""

from collections.abc import Callable
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from cache import sha256
from stages.inputs.images import ImageError, ImageReader, decode_image


class ReadImage(NamedTuple):
    """One image as it was read.

    Attributes:
        digest: SHA-256 of its bytes; zeros where it could not be opened.
        content: ``[3, H, W]`` float32, transformed; or why it cannot be used.
    """

    digest: bytes
    content: Tensor | str


class Reader:
    """Opens, decodes and transforms images; any number of threads may.

    Args:
        files: bytes of the images.
        transform: the network's.
    """

    def __init__(self, files: ImageReader, transform: Callable[[Image.Image], Tensor]) -> None:
        self._files = files
        self._transform = transform

    def read(self, index: int) -> ReadImage:
        """One image, whatever is wrong with it."""
        digest = bytes(32)
        try:
            data = self._files.read(index)
            digest = bytes.fromhex(sha256(data))
            return ReadImage(digest, self._transform(decode_image(data)))
        except ImageError as error:
            return ReadImage(digest, str(error))
