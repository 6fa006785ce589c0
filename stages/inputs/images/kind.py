"""What counts as an image, and what is left out: by a file's name or its first bytes, the same for folders and tars.

    seen          what it is
    hidden        a name that begins with a dot, or that lies in a folder which a system made: not looked at at all
    an image      its name says so (`is_image_name`); only where it does not, its first bytes (`is_image_head`)
    left out      any other regular file, counted by `extension`; pipes, sockets and devices count as `SPECIAL`, and
                  where each image lies in the folder of its class, such a folder without one as `EMPTY`

A file whose name says image and whose bytes do not is an image here: decoding it fails, and is then recorded.
"""

import os
import re
from collections.abc import Callable, Mapping

# Pillow's format (HEIF: pillow-heif's) -> extensions. Formats that Pillow hands to other programs (EPS to Ghostscript)
# are not among them.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".hif", ".heics", ".heifs"),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
HEAD_BYTES = 512  # what `is_image_head` needs of a file: netpbm may have a remark before its size
_MOST_NAMED = 8  # extensions in one line
SPECIAL = "special file"  # stands for an extension where something is no regular file
EMPTY = "folder without an image"  # likewise where it is no file at all

_SIGNATURES = (
    b"\xff\xd8\xff",  # JPEG, MPO
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"\xff\x4f\xff\x51",  # JPEG 2000, bare
    b"\0\0\0\x0cjP  \r\n\x87\n",  # JP2, JPX
    *(order + mark for order in (b"II", b"MM") for mark in (b"*\0", b"\0*")),  # TIFF; two of them wrong, and in use
    b"II+\0",  # BigTIFF
    b"MM\0+",
)
_HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))
_AVIF_BRANDS = frozenset((b"avif", b"avis"))
_ANY_BRANDS = frozenset((b"mif1", b"mif2", b"msf1"))  # pictures, in whatever coding
_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_SIZE = _GAP + rb"[1-9]\d{0,8}" + _GAP + rb"[1-9]\d{0,8}"
_NETPBM = re.compile(
    rb"P(?:1%(s)s%(g)s[01]|4%(s)s\s|[23]%(s)s%(g)s\d{1,5}%(g)s\d|[56]%(s)s%(g)s\d{1,5}\s|f%(s)s%(g)s-?\d[\d.eE+-]*\s)"
    % {b"s": _SIZE, b"g": _GAP}
)
_DIB_HEADERS = frozenset((12, 40, 52, 56, 64, 108, 124))  # bytes
_DIB_BITS = frozenset((1, 2, 4, 8, 16, 24, 32))
# Synology, QNAP, NetApp, Windows, macOS's zip, ext4's fsck, and what old tars of pax headers unpack to.
_SYSTEM_FOLDERS = re.compile(
    r"@eadir|@tmp|#recycle|#snapshot|@recycle|@recently-snapshot|@__thumb|~snapshot"
    r"|\$recycle\.bin|system volume information|__macosx|lost\+found|paxheaders?(\.\d+)?|gnusparsefile\.\d+"
)


def is_image_name(name: str) -> bool:
    """Whether the extension of a file's name is that of an image.

    >>> is_image_name("a/1.MPO"), is_image_name("a/1.jpg.1")
    (True, False)
    """
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_image_head(head: bytes) -> bool:
    r"""Whether a file that begins with these bytes (`HEAD_BYTES`, or all that it has) is an image.

    Two letters are never enough: what follows them must make sense.

    >>> is_image_head(b"\xff\xd8\xff\xe0\x00\x10JFIF"), is_image_head(b"P5 is a protein"), is_image_head(b"")
    (True, False, False)
    """
    return (
        head.startswith(_SIGNATURES)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[:2] == b"BM" and _is_dib(head[14:]))
        or _is_dib(head)
        or bool(_NETPBM.match(head))
        or bool(_brands(head) & (_HEIF_BRANDS | _AVIF_BRANDS | _ANY_BRANDS))
    )


def is_image(name: str, head: Callable[[], bytes]) -> bool:
    """Whether a file is an image: by its name, or else by its first bytes, which only then are asked for."""
    return is_image_name(name) or is_image_head(head())


def coding(head: bytes) -> str | None:
    """Which of two codings share one kind of file: "HEIF" or "AVIF", by its first bytes; None for any other file."""
    brands = _brands(head)
    if brands & _AVIF_BRANDS:
        return "HEIF" if head[8:12] in _HEIF_BRANDS else "AVIF"
    return "HEIF" if brands & (_HEIF_BRANDS | _ANY_BRANDS) else None


def is_hidden(name: str) -> bool:
    """Whether a file is not looked at: a part of its name begins with a dot, or a folder is one that a system made.

    Args:
        name: Relative to the source, parts separated by `/`; `.` and `..` are no names. A folder's own ends in `/`.

    >>> is_hidden("./cat/.1.jpg"), is_hidden("__MACOSX/cat/1.jpg"), is_hidden("@eaDir/"), is_hidden("../cat/1.jpg")
    (True, True, True, False)
    """
    *folders, file = name.split("/")
    parts = (part for part in (*folders, file) if part not in (".", ".."))
    return any(part.startswith(".") for part in parts) or any(
        _SYSTEM_FOLDERS.fullmatch(part.lower()) for part in folders
    )


def extension(name: str) -> str:
    """Under what a file that is left out is counted: its extension, lower case, or "" where there is none.

    What is only the end of a number, as in the dotted names of DICOM files, is none: there may be a million of them.

    >>> extension("a/Notes.TXT"), extension("a.b/README"), extension("1.2.840.113619")
    ('.txt', '', '')
    """
    suffix = os.path.splitext(name)[1].lower()
    short = 1 < len(suffix) <= 12 and suffix.isprintable() and " " not in suffix
    return suffix if short and not (suffix[1:].isdigit() and len(suffix) > 3) else ""


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """What was left out, in one line, the most frequent extensions first; "" where nothing was.

    >>> describe_left_out({".json": 2, ".txt": 25, EMPTY: 1})
    'left out: 27 files: 25 .txt, 2 .json; 1 folder without an image'
    """
    files = {suffix: n for suffix, n in left_out.items() if suffix != EMPTY}
    empty = left_out.get(EMPTY, 0)
    folders = f"{empty:,} {EMPTY if empty == 1 else EMPTY.replace('folder', 'folders')}"
    parts = [*([_described(files)] if files else []), *([folders] if empty else [])]
    return f"left out: {'; '.join(parts)}" if parts else ""


def _described(left_out: Mapping[str, int]) -> str:
    counts = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{n:,} {suffix or 'without extension'}" for suffix, n in counts[:_MOST_NAMED]]
    if others := counts[_MOST_NAMED:]:
        parts.append(f"{sum(n for _, n in others):,} of {len(others)} other kinds")
    total = sum(left_out.values())
    return f"{total:,} {'file' if total == 1 else 'files'}: {', '.join(parts)}"


def _is_dib(head: bytes) -> bool:
    """Whether bytes are a header that Windows bitmaps have: its length, one plane, a known number of bits."""
    size = int.from_bytes(head[:4], "little")
    at = 8 if size == 12 else 12  # sizes of 16 bits in the oldest
    planes, bits = (int.from_bytes(head[i : i + 2], "little") for i in (at, at + 2))
    return size in _DIB_HEADERS and planes == 1 and bits in _DIB_BITS


def _brands(head: bytes) -> frozenset[bytes]:
    """Brands of a file of the ISO base media format, the major one and those that it is compatible with."""
    if head[4:8] != b"ftyp":
        return frozenset()
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return frozenset((head[8:12], *(head[i : i + 4] for i in range(16, end - 3, 4))))
