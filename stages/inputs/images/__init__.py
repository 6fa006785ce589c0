"""Where images come from and how they become pixels: one file per kind of source, one for decoding.

    source                                         file            class of an image
    folder, one image file                         folder.py       its first folder, if any
    .tar of a tree, or WebDataset                  tar.py          its first folder, or a file beside it
    folder of tars, "t-{00..14}.tar", "t-*.tar"    shards.py       the same
    .txt (OpenOOD: `path label`), .csv, .parquet   listing.py      as listed
    folder that Hugging Face `datasets` saved      huggingface.py  its ClassLabel
    "sklearn:digits[0-6]/train", "sklearn:photos"  embedded.py     the digit, the photograph
    `torch.utils.data.Dataset`, from Python        dataset.py      its target

Every source ends in one `SampleTable`: what there is, in an order that depends on the names alone. What counts as an
image is decided in kind.py; other files are counted. Nothing is decoded while listing; an image that turns out to be
none fails later, by `ImageError`, and is never left out silently.
"""

from pathlib import Path

from cache import CacheInvalidError, CacheUnreachableError
from stages.errors import InputError
from stages.inputs.images.classes import only_classes
from stages.inputs.images.columns import USUAL, Columns
from stages.inputs.images.dataset import image_bytes, list_dataset
from stages.inputs.images.decode import (
    MAX_PIXELS,
    ImageError,
    UndecodedJpeg,
    decode_image,
    image_size,
    is_overcome,
    undecoded_jpeg,
)
from stages.inputs.images.embedded import list_embedded
from stages.inputs.images.folder import find_files, is_image_file, list_file
from stages.inputs.images.huggingface import is_huggingface, list_huggingface
from stages.inputs.images.kind import IMAGE_SUFFIXES, describe_left_out
from stages.inputs.images.listing import list_csv, list_parquet, list_text
from stages.inputs.images.opening import is_folder, is_there
from stages.inputs.images.packed import refuse_packed
from stages.inputs.images.shards import is_pattern, list_pattern, list_tars_below
from stages.inputs.images.table import ImageReader, SampleTable
from stages.inputs.images.tar import list_tar

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "Columns",
    "ImageError",
    "ImageReader",
    "SampleTable",
    "UndecodedJpeg",
    "decode_image",
    "describe_left_out",
    "image_bytes",
    "image_size",
    "is_overcome",
    "list_dataset",
    "list_images",
    "only_classes",
    "undecoded_jpeg",
]

_TABLES = {".csv": list_csv, ".tsv": list_csv, ".parquet": list_parquet}


def list_images(source: str, root: str | None = None, columns: Columns = USUAL) -> SampleTable:
    """List the images of a source without decoding any.

    Args:
        source: A folder of images, of tars or of Hugging Face `datasets`, an image file, a `.tar`, a pattern of several
            (`train-{0000..0146}.tar`, `train-*.tar`), a list (`.txt`, `.csv`, `.tsv`, `.parquet`), or an embedded set,
            `"sklearn:…"`. A folder is one of tars where these lie in it and no image does, see `list_tars_below`. All
            but Hugging Face's may be in an object store: `s3://bucket/…`.
        root: The folder that the paths of a list are relative to; its own by default.
        columns: Which column of a table (`.csv`, `.tsv`, `.parquet`) or of Hugging Face `datasets` is the image and
            which its class, and which field of a WebDataset sample is its class; the usual names by default.

    Returns:
        The samples, sorted by the UTF-8 bytes of their ids.

    Raises:
        InputError: The source is missing, empty, unreadable or of no known kind, or `root` or `columns` are given where
            there is no list and there are no columns; or its store does not answer.

    >>> digits = list_images("sklearn:digits[0-6]/test")
    >>> digits.class_names
    ('0', '1', '2', '3', '4', '5', '6')
    >>> decode_image(digits.reader().read(0)).size
    (8, 8)
    """
    try:
        return _list_images(source, root, columns)
    except (CacheInvalidError, CacheUnreachableError) as error:
        raise InputError(str(error)) from error


def _list_images(source: str, root: str | None, columns: Columns) -> SampleTable:
    suffix = Path(source).suffix.lower()
    if root is not None:
        if (suffix != ".txt" and suffix not in _TABLES) or is_folder(source):
            lists = ", ".join((".txt", *_TABLES))
            raise InputError(f"{source}: a root is for the paths of a list ({lists}), this is none: leave it out")
        if not is_folder(root):
            raise InputError(f"{source}: its root {root} is no folder; give the one that its paths are relative to")
    embedded = source.startswith("sklearn:")
    is_several = not embedded and not is_there(source) and is_pattern(source)
    if not embedded and ("\0" in source or not (is_several or is_there(source))):
        raise InputError(f"{source!r}: no such file or folder")
    folder = not embedded and not is_several and is_folder(source)
    if folder and is_huggingface(source):
        return list_huggingface(source, columns)
    if not folder and not is_several and suffix in _TABLES:
        return _TABLES[suffix](source, root, columns)
    if columns.path is not None:
        raise InputError(
            f"{source}: path_column is for tables ({', '.join(_TABLES)}) and Hugging Face datasets, this is none: "
            "leave it out"
        )
    if is_several:
        return list_pattern(source, columns)
    files = find_files(source) if folder else None
    if files is not None and (table := list_tars_below(source, files, columns)) is not None:
        return table
    if not folder and suffix == ".tar":
        return list_tar(source, columns)
    if columns.label is not None:
        raise InputError(
            f"{source}: label_column is for tables ({', '.join(_TABLES)}), Hugging Face datasets and tars, this is "
            "none: leave it out"
        )
    if embedded:
        return list_embedded(source)
    if files is not None:
        return files.table(source)
    if suffix == ".txt":
        return list_text(source, root)
    if is_image_file(source):
        return list_file(source)
    refuse_packed(source)
    raise InputError(f"{source}: not a source of images; give a folder, .tar, .txt, {', '.join(_TABLES)}")
