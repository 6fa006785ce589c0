"""From a decoded image to what a network takes; apart from the network, so that any process may do it.

What makes pixels of a JPEG file is a choice, `BackboneConfig.decode`; of every other file Pillow does:

    "pil"    Pillow, in full
    "draft"  Pillow, at 1/2, 1/4 or 1/8 of the size, which skips a part of the inverse DCT, where the short side stays
             at least `DRAFT_GAP` times what the transform resizes it to (`stages.networks.pillow_transform`):
             interpolation still makes it smaller
    "cuda"   nvJPEG on a GPU, which resizes there as well; what it may read otherwise than Pillow, Pillow decodes
"""

from collections.abc import Mapping, Sequence
from typing import Any

import timm.data
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import Resize

from stages.config import BackboneConfig
from stages.errors import InputError
from stages.networks.pillow_transform import check_shape, least_side
from stages.networks.transfer import to_device

_ON_GPU = ("bilinear", "bicubic")  # interpolations of tensors


class Preprocessing:
    """The transform of a backbone, in two steps; picklable, and safe in threads.

    Args:
        data_config: of timm's `create_transform`.
        decode: see `BackboneConfig.decode`.

    Attributes:
        decode: the same.
        shape: ``(3, H, W)`` of pixels.
    """

    def __init__(self, data_config: Mapping[str, Any], decode: str) -> None:
        self.decode = decode
        self.shape: tuple[int, int, int] = tuple(data_config["input_size"])
        self._side: float = data_config["input_size"][-1] / data_config["crop_pct"]
        self._pixels: Any = timm.data.create_transform(**data_config, normalize=False)
        self._mean, self._std = (torch.tensor(data_config[name]).view(-1, 1, 1) for name in ("mean", "std"))

    @property
    def least_side(self) -> int:
        """What the short side of an image must keep when it is decoded, in pixels; 0: all of it."""
        return least_side(self._side, self.decode)

    def pixels(self, image: Image.Image | Tensor) -> Tensor:
        """Resize and crop.

        Args:
            image: RGB, upright; or ``[3, h, w]`` uint8 on any device.

        Returns:
            ``[3, H, W]`` uint8, on the device of a tensor.

        Raises:
            ImageError: so elongated that resizing its short side would make it larger than any image may be.
        """
        width, height = image.size if isinstance(image, Image.Image) else (image.shape[2], image.shape[1])
        self.check_shape(width, height)
        return self._pixels(image)

    def pixels_together(self, images: Sequence[Tensor]) -> list[Tensor]:
        """`pixels` of several tensors of one device; what needs no look at the single one is done for all at once.

        Args:
            images: each ``[3, h, w]`` uint8, of a shape that `check_shape` allows.
        """
        resize, crop, *_ = self._pixels.transforms
        if type(resize) is not Resize or type(resize.size) is not int or not images:
            return [self._pixels(image) for image in images]
        mode, least = resize.interpolation.value, resize.size
        resized = []
        for image in images:
            h, w = image.shape[1:]
            size = (least, int(least * w / h)) if h <= w else (int(least * h / w), least)
            if size != (h, w):
                image = functional.interpolate(image[None].float(), size, mode=mode, antialias=True)[0]
            resized.append(crop(image).float())
        return [*torch.stack(resized).clamp_(0, 255).round_().to(torch.uint8)]

    def check_shape(self, width: int, height: int) -> None:
        """Refuse an image that its resizing would make larger than any may be.

        Raises:
            ImageError: it is so elongated.
        """
        check_shape(self._side, width, height)

    def normalise(self, pixels: Tensor) -> Tensor:
        """What the network takes.

        Args:
            pixels: ``[…, 3, H, W]`` uint8.

        Returns:
            The same shape in float32 on the same device, contiguous.
        """
        scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return scaled.sub_(to_device(self._mean, pixels.device)).div_(to_device(self._std, pixels.device))


def check_decode(config: BackboneConfig, device: str, data_config: Mapping[str, Any] | None = None) -> None:
    """Refuse a way to decode that there is not, before any image is.

    Args:
        config: of the backbone.
        device: kind of the one that it runs on.
        data_config: of its transform, where that is known.

    Raises:
        InputError: there is no GPU to decode on, or images cannot be resized like this there.
    """
    if config.decode != "cuda":
        return
    if device != "cuda":
        raise InputError(
            'backbone.decode: "cuda" decodes new images on a GPU, and there is none here: give "pil" or "draft", '
            "which are other features, or run on a machine that has one"
        )
    if data_config is not None and data_config.get("crop_mode") == "border":
        raise InputError(
            f'backbone.decode: "cuda" resizes on the GPU, which cannot fill borders as {config.name} has them: '
            'give "pil"'
        )
    if data_config is not None and data_config["interpolation"] not in _ON_GPU:
        raise InputError(
            f'backbone.decode: "cuda" resizes on the GPU, which cannot interpolate {data_config["interpolation"]!r}: '
            'give "pil", or backbone.interpolation = "bicubic"'
        )
