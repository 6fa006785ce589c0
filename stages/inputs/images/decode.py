"""From the bytes of an image file to RGB pixels as a person would see them."""

import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError, features

from stages.errors import InputError
from stages.inputs.images.jpeg import is_plain_jpeg
from stages.inputs.images.kind import FORMATS, HEAD_BYTES, coding
from stages.inputs.images.metadata import without_large_metadata

_NEEDS_HEIF = "HEIC or AVIF, which nothing here decodes: pip install 'mofe-feature-cache[heif]'"
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs; 0.7 GB as it holds RGB
_MOST_ELSEWHERE = 1 << 25  # pixels of an image that is decoded on a GPU, beside others

_UPRIGHT = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Without any handler, Python prints what Pillow logs about odd files; a handler of the caller still gets it.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class ImageError(InputError):
    """One image cannot be used; the message is a short reason that does not depend on place or time."""


class UndecodedJpeg(NamedTuple):
    """A JPEG file that something else than Pillow may decode.

    Attributes:
        data: its bytes.
        orientation: EXIF's, which says how it is turned upright.
    """

    data: bytes
    orientation: int


def decode_image(data: bytes, least_side: int = 0) -> Image.Image:
    """Decode an image file.

    EXIF orientation is applied, transparency laid over white, 16-bit gray scaled (not clipped), the first frame of an
    animation taken; integers and floats without a fixed range are stretched from their least to their greatest value.
    Colour profiles are not applied. Safe in threads; Pillow's warnings about odd files are kept quiet (libtiff's own
    lines about damaged compressed TIFFs are not: they come from C, and Pillow has no switch for them).

    Args:
        data: The bytes of the file; its name plays no part.
        least_side: A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as small as leaves its short side that many
            pixels; 0 decodes it in full.

    Returns:
        The image in mode RGB, as large as it is shown, but for `least_side`.

    Raises:
        ImageError: Not an image, truncated, damaged, too large or without any pixel.
    """
    if not data:
        raise ImageError("empty file")
    try:
        return _decode(data, least_side)
    except ImageError:
        if least_side:  # what is wrong is that of the whole image
            return decode_image(data)
        if (lighter := without_large_metadata(data)) is None:
            raise
        return _decode(lighter, 0)


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image file as it is stored, of which nothing is decoded: known before memory is spent.

    Args:
        data: The bytes of the file.

    Raises:
        ImageError: Not an image, or damaged before its size is known.
    """
    if not data:
        raise ImageError("empty file")
    try:
        with _reasons(), _opened(data) as image:
            return image.size
    except ImageError:
        if (lighter := without_large_metadata(data)) is None:
            raise
        with _reasons(), _opened(lighter) as image:
            return image.size


def undecoded_jpeg(data: bytes) -> UndecodedJpeg | None:
    """A file that every JPEG decoder reads as Pillow does, to rounding; None for all others.

    Args:
        data: The bytes of the file; damaged ones too.
    """
    if not is_plain_jpeg(data):
        return None
    try:
        with _reasons(), _opened(data) as image:
            plain = image.format == "JPEG" and image.width * image.height <= _MOST_ELSEWHERE
            return UndecodedJpeg(data, _orientation(image)) if plain else None
    except ImageError:
        return None


def _decode(data: bytes, least_side: int) -> Image.Image:
    with _reasons(), _opened(data) as image:
        return _seen(image, least_side)


def _opened(data: bytes) -> Image.Image:
    """The image, its size known and nothing decoded yet."""
    kind = coding(data[:HEAD_BYTES])
    if kind == "HEIF" or (kind == "AVIF" and not features.check("avif")):
        opener = _heif_opener()
        if opener is None:
            raise ImageError(_NEEDS_HEIF)
        return opener(io.BytesIO(data))
    return Image.open(io.BytesIO(data), formats=_available_formats())


def is_overcome(reason: str) -> bool:
    """Whether an image that failed for a reason may be decoded now: what it named as missing is installed."""
    return reason == _NEEDS_HEIF and _heif_opener() is not None


def _heif_opener() -> Callable[[io.BytesIO], Image.Image] | None:
    try:
        from pillow_heif import HeifImageFile  # here, since it need not be installed
    except ImportError:
        return None
    return HeifImageFile


def as_seen(image: Image.Image) -> Image.Image:
    """An image that somebody else opened, as `decode_image` gives it; it is left as it is.

    Raises:
        ImageError: As `decode_image` does.
    """
    with _reasons():
        return _seen(image)


def _seen(image: Image.Image, least_side: int = 0) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:  # before anything is decoded
        raise Image.DecompressionBombError
    if least_side:
        image.draft(None, (least_side, least_side))  # does nothing but for JPEG
    image.load()
    rgb = _to_rgb(image)
    turn = _UPRIGHT.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


@contextmanager
def _reasons() -> Iterator[None]:
    """Quiet, and whatever goes wrong is an `ImageError`."""
    try:
        with _QUIET:
            yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not an image, or of a kind that is not supported") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large: more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # decoders fail on damaged bytes in more ways than can be listed
        reason = short(error)
        raise ImageError(f"{'truncated' if 'truncated' in reason.lower() else 'damaged'}: {reason}") from error


def short(error: Exception) -> str:
    """What an error says, in one line of at most 120 characters."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def _available_formats() -> list[str]:
    Image.init()  # does nothing the second time
    return [name for name in FORMATS if name in Image.OPEN]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":
        return _stretch(image).convert("RGB")
    if _tiff_tag(image, _SAMPLE_FORMAT) == _SIGNED:  # of 8 bits here: Pillow takes them for unsigned ones
        image = image.point(lambda value: value ^ 128)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    return image.convert("RGB")


def _stretch(image: Image.Image) -> Image.Image:
    """Gray of more than 8 bits (modes I;16*, I, F) to 8 bits, white where it is transparent."""
    # Pillow scales netpbm of more than 8 bits to 16 bits, in mode I.
    sixteen_bits = image.mode.startswith("I;16") or (image.format == "PPM" and image.mode == "I")
    stored = np.asarray(image)
    if image.mode == "I" and _tiff_tag(image, _SAMPLE_FORMAT) == _UNSIGNED and _tiff_tag(image, _BITS) == 32:
        stored = stored.view(np.uint32)  # Pillow knows signed ones alone
    clear = image.info.get("transparency")
    # [h, w]; in place from here, since it may be large
    values: npt.NDArray[np.floating] = stored.astype(np.float32 if sixteen_bits else np.float64)
    low, high = (0.0, 65535.0) if sixteen_bits else (float(values.min()), float(values.max()))
    if not np.isfinite(high - low):
        raise ImageError("holds values that are not finite")
    values -= low
    values *= 255 / max(high - low, 1e-30)
    if _tiff_tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow turns it over where there are 8 bits
        np.subtract(255, values, out=values)
    if isinstance(clear, int):
        values[stored == clear] = 255
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))


# Of TIFF: tags, and values of them.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2
_UNSAID = {_SAMPLE_FORMAT: _UNSIGNED}  # what a file means that does not say it


def _tiff_tag(image: Image.Image, tag: int) -> int | None:
    """What a TIFF says of its pixels, of the first channel; None of other files."""
    value = getattr(image, "tag_v2", {}).get(tag, _UNSAID.get(tag)) if image.format == "TIFF" else None
    first = value[0] if isinstance(value, tuple) and value else value
    return first if isinstance(first, int) else None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))  # a TIFF is upright after load(), and says so
    except Exception:  # metadata may be damaged in an image that is not
        return 1


class _Quiet:
    """Silence of Pillow's warnings while any thread decodes.

    `warnings.catch_warnings` alone is not safe in threads: the one that ends last restores what another had set.
    """

    def __init__(self) -> None:
        self._lock, self._depth, self._saved = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._saved.__exit__(kind, error, at)


_QUIET = _Quiet()
