"""From an image's file to its pixels as the network takes them: the part of stage one that every core does."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from cache import sha256
from stages.inputs.images import ImageError, ImageReader, UndecodedJpeg, decode_image, undecoded_jpeg
from stages.networks.preprocessing import Preprocessing


class ReadImage(NamedTuple):
    """One image as it was read.

    Attributes:
        digest: SHA-256 of its bytes; zeros where it could not be opened.
        content: ``[3, H, W]`` uint8, resized and cropped; what a GPU is to decode; or why it cannot be used.
    """

    digest: bytes
    content: Tensor | UndecodedJpeg | str


class Reader:
    """Opens, decodes and resizes images; any number of threads may. Picklable.

    Args:
        files: bytes of the images.
        preprocessing: the network's.
    """

    def __init__(self, files: ImageReader, preprocessing: Preprocessing) -> None:
        self._files = files
        self._preprocessing = preprocessing

    def files(self, rows: Sequence[int]) -> ImageReader:
        """Bytes of some of its images alone: a worker is sent no more."""
        return ImageReader([self._files.contents[row] for row in rows])

    def read(self, index: int) -> ReadImage:
        """One image, whatever is wrong with it."""
        digest, how = bytes(32), self._preprocessing
        try:
            data = self._files.read(index)
            digest = bytes.fromhex(sha256(data))
            if how.decode == "cuda" and (left := undecoded_jpeg(data)) is not None:
                return ReadImage(digest, left)
            return ReadImage(digest, how.pixels(decode_image(data, how.least_side)))
        except ImageError as error:
            return ReadImage(digest, str(error))
