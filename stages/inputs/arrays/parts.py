"""Which files a set of features is: one, or several that are its parts, in the order of their names.

Parts are the files of a folder or of a pattern; numbers in their names count as numbers, so that ``part-10`` stands
after ``part-9``. clip-retrieval's output is known by its folders, ``img_emb`` beside ``metadata``.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from stages.errors import InputError
from stages.files.regular import check_regular
from stages.inputs.arrays.columns import ArrayFile, reading_arrays
from stages.inputs.arrays.hdf5 import open_hdf5
from stages.inputs.arrays.numpy_files import is_beside, open_npy, open_npz
from stages.inputs.arrays.parquet import open_parquet
from stages.inputs.images.kind import describe_left_out


def _open_torch(path: str) -> ArrayFile:
    from stages.inputs.arrays.torch_files import open_torch  # torch is loaded where there is such a file

    return open_torch(path)


def _open_safetensors(path: str) -> ArrayFile:
    from stages.inputs.arrays.torch_files import open_safetensors

    return open_safetensors(path)


_OPENERS: dict[str, Callable[[str], ArrayFile]] = {
    ".npz": open_npz,
    ".npy": open_npy,
    ".parquet": open_parquet,
    ".h5": open_hdf5,
    ".hdf5": open_hdf5,
    ".pt": _open_torch,
    ".pth": _open_torch,
    ".safetensors": _open_safetensors,
}
ARRAY_SUFFIXES = tuple(_OPENERS)
_EMBEDDINGS, _METADATA = "img_emb", "metadata"  # folders that clip-retrieval makes
_EMBEDDING_FILE = re.compile(r"img_emb_(\d+)\.npy")


def open_parts(path: str) -> tuple[list[ArrayFile], tuple[str, ...]]:
    """Open the parts of a set of features, and say which files beside them are left out.

    Args:
        path: a file, a folder, or a pattern with ``*``, ``?`` or ``[]``.

    Raises:
        InputError: there is none, they are of several kinds, or one cannot be read.
    """
    paths, notes = _find(path)
    suffixes = Counter(Path(part).suffix.lower() for part in paths)
    if len(suffixes) > 1:
        kinds = ", ".join(f"{n} {suffix}" for suffix, n in sorted(suffixes.items()))
        raise InputError(
            f"{path}: holds files of several kinds ({kinds}): give a pattern, such as '*{next(iter(suffixes))}'"
        )
    return [_open(part) for part in paths], notes


def is_glob(path: str) -> bool:
    """Whether a path stands for the files that it matches."""
    return glob.has_magic(path) and not os.path.exists(path)


def _find(path: str) -> tuple[list[str], tuple[str, ...]]:
    if "\0" not in path and is_glob(path):
        found = [file for file in glob.glob(path) if os.path.isfile(file)]
    elif "\0" in path or not os.path.exists(path):
        raise InputError(f"{path!r}: no such file")
    elif os.path.isdir(path):
        inside = os.path.join(path, _EMBEDDINGS)
        folder = inside if os.path.isdir(inside) else path
        found = [entry.path for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith(".")]
    elif Path(path).suffix.lower() in _OPENERS:
        return [path], ()
    else:
        raise InputError(f"{path}: not a file of features; give one that ends in {', '.join(_OPENERS)}")
    arrays = {file for file in found if Path(file).suffix.lower() in _OPENERS}
    parts = [file for file in arrays if not (file.lower().endswith(".npy") and is_beside(file, arrays))]
    if not parts:
        raise InputError(f"{path}: no file of features there; they end in {', '.join(_OPENERS)}")
    left_out = describe_left_out(Counter(Path(file).suffix.lower() for file in found if file not in arrays))
    return sorted(parts, key=_in_order), (f"{path}: {left_out}",) if left_out else ()


def _in_order(path: str) -> list[tuple[int, int, str]]:
    """Key to sort by: digits as the number that they are."""
    parts = re.split(r"([0-9]{1,18})", path)
    return [(1, int(text), text) if index % 2 else (0, 0, text) for index, text in enumerate(parts)]


def _open(path: str) -> ArrayFile:
    with reading_arrays(path):
        check_regular(path)
    opened = _OPENERS[Path(path).suffix.lower()](path)
    folder, name = os.path.split(os.path.abspath(path))
    match = _EMBEDDING_FILE.fullmatch(name)
    metadata = os.path.join(os.path.dirname(folder), _METADATA)
    if match is None or os.path.basename(folder) != _EMBEDDINGS or not os.path.isdir(metadata):
        return opened
    beside = os.path.join(metadata, f"{_METADATA}_{match[1]}.parquet")
    if not os.path.exists(beside):
        raise InputError(f"{path}: {beside} is missing, which clip-retrieval writes beside it")
    table = open_parquet(beside)
    arrays = {**table.arrays, **opened.arrays}
    return ArrayFile([*opened.paths, beside], arrays, {"id": "image_path"} if "image_path" in arrays else {})
