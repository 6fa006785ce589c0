"""Image files without metadata that is too large for the decoder, though the picture is sound.

Pillow refuses a PNG whose text or colour profile unpacks to more than it likes, and OpenJPEG a JP2 with a box of more
than a megabyte. Neither has a part in the pixels here, so it is taken out; nothing is unpacked further than the limit.
"""

import struct
import zlib
from collections.abc import Iterator

from PIL import PngImagePlugin

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = frozenset((b"tEXt", b"zTXt", b"iTXt", b"iCCP"))  # EXIF is in eXIf
_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
_JP2_PICTURE = frozenset((b"jP  ", b"ftyp", b"jp2h", b"jp2c"))  # signature, kind, size and colours, pixels


def without_large_metadata(data: bytes) -> bytes | None:
    """The same picture without such metadata, or None where there is nothing of it.

    Args:
        data: The bytes of an image file of any kind, damaged ones too.
    """
    if data.startswith(_PNG):
        parts = list(_small_chunks(data))
    elif data.startswith(_JP2):
        parts = list(_picture_boxes(data))
    else:
        return None
    return b"".join(parts) if sum(map(len, parts)) < len(data) else None


def _small_chunks(data: bytes) -> Iterator[memoryview]:
    """Chunks of a PNG, those left out whose metadata goes beyond Pillow's limits, each by itself or all together."""
    view, at, room = memoryview(data), len(_PNG), PngImagePlugin.MAX_TEXT_MEMORY
    yield view[:at]
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind in _PNG_METADATA:
            size = _unpacked_size(kind, data[at + 8 : end - 4])
            room -= size or 0
            if size is not None and room >= 0:
                yield view[at:end]
        else:
            yield view[at:end]
        at = end
    yield view[at:]


def _unpacked_size(kind: bytes, body: bytes) -> int | None:
    """Bytes that a chunk of metadata unpacks to; None where they are more than Pillow's limit for one."""
    rest = body.partition(b"\0")[2]  # behind the keyword
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] != b"\1"):
        return len(body)
    packed = rest[1:] if kind != b"iTXt" else rest[2:].split(b"\0", 2)[-1]  # behind language and translated keyword
    unpacking = zlib.decompressobj()
    try:
        size = len(unpacking.decompress(packed, PngImagePlugin.MAX_TEXT_CHUNK))
    except zlib.error:  # Pillow leaves it out by itself
        return 0
    return None if unpacking.unconsumed_tail else size


def _picture_boxes(data: bytes) -> Iterator[memoryview]:
    """Those boxes of a JP2 that hold the picture."""
    view, at = memoryview(data), 0
    while at + 16 <= len(data):
        length, kind, long = struct.unpack_from(">I4sQ", data, at)
        length = long if length == 1 else length or len(data) - at  # 0: to the end
        if kind in _JP2_PICTURE:
            yield view[at : at + length]
        if length < 8:  # damaged: it would be walked in circles
            break
        at += length
