"""JPEG files that a GPU decodes, turns upright and resizes: ``decode = "cuda"``."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stages.extraction.reader import ReadImage
from stages.inputs.images import ImageError, UndecodedJpeg, decode_image
from stages.networks.preprocessing import Preprocessing

_MOST_BYTES = 1 << 25  # of files that are decoded together: their pixels are some twenty times as many
# Of torchvision's errors those that are not of a file; nvJPEG's numbers 1, 5 and 7: no handle, no memory, no such GPU.
_OF_THE_DEVICE = re.compile(r"CUDA (error|stream)|out of memory|not compiled|Failed to [a-z ]+: *[157]\b")
# EXIF orientation -> whether rows and columns are exchanged first, and which axes are then turned round
_UPRIGHT: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (2,)),
    3: (False, (1, 2)),
    4: (False, (1,)),
    5: (True, ()),
    6: (True, (2,)),
    7: (True, (1, 2)),
    8: (True, (1,)),
}


class DecodedImage(NamedTuple):
    """One image as the network is given it.

    Attributes:
        digest: see `ReadImage`.
        content: ``[3, H, W]`` uint8, or why it cannot be used.
    """

    digest: bytes
    content: Tensor | str


def decode_left(read: Sequence[ReadImage], preprocessing: Preprocessing, device: torch.device) -> list[DecodedImage]:
    """Decode what a `Reader` left to the GPU, and bring there what it did not; nothing is done where it leaves nothing.

    Args:
        read: images.
        preprocessing: of the network.
        device: where it runs.

    Returns:
        The same images; where ``decode = "cuda"`` all pixels are on the device.
    """
    left = {at: image.content for at, image in enumerate(read) if isinstance(image.content, UndecodedJpeg)}
    found: dict[int, Tensor | str] = {}
    for places in _together(left):
        found |= zip(places, _contents([left[at] for at in places], preprocessing, device), strict=True)
    done: list[DecodedImage] = []
    for at, image in enumerate(read):
        content = found[at] if isinstance(image.content, UndecodedJpeg) else image.content
        if isinstance(content, Tensor) and preprocessing.decode == "cuda":
            content = content.to(device, non_blocking=True)
        done.append(DecodedImage(image.digest, content))
    return done


def _together(left: dict[int, UndecodedJpeg]) -> Iterator[list[int]]:
    """Places of files that are decoded in one call."""
    places: list[int] = []
    n_bytes = 0
    for at, file in left.items():
        if places and n_bytes + len(file.data) > _MOST_BYTES:
            yield places
            places, n_bytes = [], 0
        places.append(at)
        n_bytes += len(file.data)
    if places:
        yield places


def _contents(files: Sequence[UndecodedJpeg], preprocessing: Preprocessing, device: torch.device) -> list[Tensor | str]:
    """Pixels of every file, or why it cannot be used."""
    contents: list[Tensor | str] = [""] * len(files)
    upright: dict[int, Tensor] = {}
    for at, (file, image) in enumerate(zip(files, decode_jpegs([file.data for file in files], device), strict=True)):
        try:
            if image is None:
                contents[at] = preprocessing.pixels(decode_image(file.data))
            else:
                preprocessing.check_shape(image.shape[2], image.shape[1])
                upright[at] = _upright(image, file.orientation)
        except ImageError as error:
            contents[at] = str(error)
    for at, pixels in zip(upright, preprocessing.pixels_together([*upright.values()]), strict=True):
        contents[at] = pixels
    return contents


def decode_jpegs(files: Sequence[bytes], device: torch.device) -> list[Tensor | None]:
    """Decode JPEG files on a device.

    Args:
        files: their bytes.
        device: a GPU; a CPU is for tests.

    Returns:
        ``[3, h, w]`` uint8 RGB on the device, as stored, and None for files that it does not decode.

    Raises:
        RuntimeError: the device failed, and not the file.
    """
    from torchvision.io import ImageReadMode, decode_jpeg  # which Pillow alone does without

    if device.type == "cuda":
        # The decoder writes from a stream of its own into memory that work of this one may still read.
        torch.cuda.current_stream(device).synchronize()
    # A copy, since tensors are to be writable.
    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
    try:
        decoded: list[Tensor | None] = list(decode_jpeg(encoded, ImageReadMode.RGB, device=device))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _OF_THE_DEVICE.search(str(error)):
            raise
        if len(files) == 1:
            return [None]
        half = len(files) // 2  # it says that one of them fails, and not which
        return [*decode_jpegs(files[:half], device), *decode_jpegs(files[half:], device)]
    return decoded


def _upright(image: Tensor, orientation: int) -> Tensor:
    exchanged, turned = _UPRIGHT.get(orientation, (False, ()))
    image = image.transpose(1, 2) if exchanged else image
    return image.flip(turned) if turned else image
