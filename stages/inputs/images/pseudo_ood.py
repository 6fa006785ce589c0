"""Images that play OOD, made of ID images: what ``score = "auto"`` judges scores by, beside classes that it leaves out.

Each kind keeps something of the ID images and breaks the rest: their parts without their order, their colours without
what they show, their outlines alone, two of them at once. An image depends on the bytes that it is made of and on its
kind, and on nothing else; its id says both: ``tiles/<id>``.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from stages.inputs.images.decode import decode_image
from stages.inputs.images.netpbm import to_netpbm
from stages.inputs.images.table import Content, SampleTable

PSEUDO_SEMANTICS = 1  # raise it when the same images would make others
_SIDES = 64, 256  # pixels of the shorter side of what is made, least and most: enough to be cut up, cheap to make
_RNG = np.random.Generator
_Made = Callable[[Image.Image, Image.Image, _RNG], Image.Image]  # of an image, another one of its size, and dice


def _tiles(n: int) -> _Made:
    """Cut into n x n tiles that are put together in another order."""

    def made(image: Image.Image, other: Image.Image, rng: _RNG) -> Image.Image:
        width, height = image.width // n, image.height // n
        corners = [(x * width, y * height) for y in range(n) for x in range(n)]
        out = Image.new("RGB", (width * n, height * n))
        for number, corner in zip(rng.permutation(len(corners)).tolist(), corners, strict=True):
            left, top = corners[number]
            out.paste(image.crop((left, top, left + width, top + height)), corner)
        return out

    return made


def _texture(image: Image.Image, other: Image.Image, rng: _RNG) -> Image.Image:
    """A sixteenth from its middle, mirrored so that it goes on, all over the image."""
    width, height = image.width // 4, image.height // 4
    left, top = int(rng.integers(width, 2 * width + 1)), int(rng.integers(height, 2 * height + 1))
    tile = image.crop((left, top, left + width, top + height))
    out = Image.new("RGB", (width * 4, height * 4))
    for y in range(4):
        for x in range(4):
            turned = ImageOps.mirror(tile) if x % 2 else tile
            out.paste(ImageOps.flip(turned) if y % 2 else turned, (x * width, y * height))
    return out


def _phases(image: Image.Image, other: Image.Image, rng: _RNG) -> Image.Image:
    """The amplitudes of its waves, at random places: its texture and colours without any outline."""
    pixels = _floats(image)
    angles = np.angle(np.fft.rfft2(rng.standard_normal(pixels.shape[:2])))
    waves = np.fft.rfft2(pixels, axes=(0, 1))
    moved = waves * np.exp(1j * angles)[..., None]
    moved[0, 0] = waves[0, 0]  # the mean colour
    return _image(np.fft.irfft2(moved, s=pixels.shape[:2], axes=(0, 1)))


def _noise(image: Image.Image, other: Image.Image, rng: _RNG) -> Image.Image:
    pixels = _floats(image)
    return _image(pixels + rng.normal(scale=90, size=pixels.shape))


def _blurred(image: Image.Image, other: Image.Image, rng: _RNG) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(min(image.size) / 20))


def _coarse(image: Image.Image, other: Image.Image, rng: _RNG) -> Image.Image:
    """Some 20 pixels by side, each a square."""
    width, height = (round(20 * side / min(image.size)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def _outlines(image: Image.Image, other: Image.Image, rng: _RNG) -> Image.Image:
    """Dark lines on white, as drawn with a pencil."""
    gray = image.convert("L").filter(ImageFilter.GaussianBlur(min(image.size) / 200))
    edges = gray.filter(ImageFilter.FIND_EDGES)
    lines = ImageOps.invert(ImageOps.autocontrast(edges.crop((1, 1, edges.width - 1, edges.height - 1)), cutoff=1))
    return lines.convert("RGB")


def _colours(image: Image.Image, other: Image.Image, rng: _RNG) -> Image.Image:
    """Few flat colours in large spots, which are other ones: channels change places."""
    half = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    flat = half.filter(ImageFilter.MedianFilter(3)).quantize(6).convert("RGB").resize(image.size)
    first, second, third = flat.split()
    return Image.merge("RGB", (second, third, first) if rng.random() < 0.5 else (third, first, second))


def _blended(image: Image.Image, other: Image.Image, rng: _RNG) -> Image.Image:
    """Two at once, each half transparent."""
    return Image.blend(image, other, 0.5)


def _pasted(image: Image.Image, other: Image.Image, rng: _RNG) -> Image.Image:
    """One half of each, left and right or one above the other."""
    out = image.copy()
    if rng.random() < 0.5:
        out.paste(other.crop((0, 0, image.width // 2, image.height)), (0, 0))
    else:
        out.paste(other.crop((0, 0, image.width, image.height // 2)), (0, 0))
    return out


PSEUDO_IMAGES: Mapping[str, _Made] = MappingProxyType(
    {
        "tiles": _tiles(4),
        "texture": _texture,
        "noise": _noise,
        "colours": _colours,
        "blended": _blended,
        "small-tiles": _tiles(10),
        "phases": _phases,
        "blurred": _blurred,
        "outlines": _outlines,
        "pasted": _pasted,
        "coarse": _coarse,
    }
)


class PseudoImage(NamedTuple):
    """An image that is made when it is read.

    Attributes:
        kind: a key of `PSEUDO_IMAGES`.
        of: what it is made of, and another image, which some kinds take something of.
    """

    kind: str
    of: tuple[Content | bytes, Content | bytes]

    def read(self) -> bytes:
        """Its pixels as netpbm.

        Raises:
            ImageError: one of the two cannot be used.
        """
        first, second = (own if isinstance(own, bytes) else own.read() for own in self.of)
        seed = hashlib.sha256(b"\0".join([self.kind.encode(), first])).digest()
        image = _sized(decode_image(first, _SIDES[1]))
        other = ImageOps.fit(decode_image(second, _SIDES[1]), image.size)
        made = PSEUDO_IMAGES[self.kind](image, other, np.random.default_rng(list(seed)))
        return to_netpbm(np.asarray(made))


def _sized(image: Image.Image) -> Image.Image:
    side = min(image.size)
    scale = min(max(side, _SIDES[0]), _SIDES[1]) / side
    return image if scale == 1 else image.resize((round(image.width * scale), round(image.height * scale)))


def _floats(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image, np.float64)


def _image(pixels: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8))


def list_pseudo_ood(samples: SampleTable, rows: Sequence[int], others: Sequence[int]) -> SampleTable:
    """Images of every kind.

    Args:
        samples: ID images.
        rows: numbers of those to be made of.
        others: as many, of which some kinds take something: images of another class.
    """
    made = [
        (f"{kind}/{samples.ids[row]}", kind, row, other)
        for kind in PSEUDO_IMAGES
        for row, other in zip(rows, others, strict=True)
    ]
    made.sort()
    pairs = np.array([[row, other] for *_, row, other in made], np.int64).reshape(-1, 2)
    sizes = samples.sizes[pairs]
    return SampleTable(
        source=f"pseudo-OOD of {samples.source}",
        ids=tuple(name for name, *_ in made),
        labels=np.full(len(made), -1, np.int32),
        class_names=(),
        sizes=np.where((sizes < 0).any(1), -1, sizes.sum(1)),
        mtimes_ns=samples.mtimes_ns[pairs].max(1, initial=0),
        left_out={},
        contents=tuple(
            PseudoImage(kind, (samples.contents[row], samples.contents[other])) for _, kind, row, other in made
        ),
    )
