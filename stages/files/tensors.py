"""Named arrays as safetensors, and pairs: arrays with a document beside them that says what they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, load_file, save

from cache.files import write_file
from cache.fingerprint import sha256
from stages.errors import StageError
from stages.files.documents import read_document, write_document


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> str:
    """Write named arrays as safetensors, making their folder; returns the SHA-256 of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = save({name: np.asarray(array, order="C") for name, array in tensors.items()})
    write_file(path, data)
    return sha256(data)


def read_tensors(path: Path) -> dict[str, NDArray[Any]] | None:
    """Read named arrays; None where there is no such file or it is damaged."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, TypeError, AttributeError):  # the last two: of a type that numpy does not have
        return None
    # Packages add types to numpy when something imports them (ml_dtypes: bfloat16). What a file holds, and whether it
    # is damaged, must not depend on that: none of ours has such an array.
    return tensors if all(array.dtype.isbuiltin == 1 for array in tensors.values()) else None


def read_handed(path: Path) -> dict[str, NDArray[Any]]:
    """Read named arrays that another process has written for this one.

    Raises:
        StageError: they are damaged; the file is removed, so that they are made again.
    """
    tensors = read_tensors(path)
    if tensors is None:
        path.unlink(missing_ok=True)
        raise StageError(f"{path} is damaged and was removed: run the same again")
    return tensors


def write_described(path: Path, tensors: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
    """Write named arrays and, last, the document beside them that says what they are.

    The document of an older pair goes first: killed in between, the new arrays must not stand without one of theirs.
    """
    described = path.with_suffix(".json")
    described.unlink(missing_ok=True)
    digest = write_tensors(path, tensors)
    write_document(described, {**about, "files": {path.name: digest}})


def read_described(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
    """What `write_described` wrote: what the document says, and the arrays; None where either is not whole."""
    about = read_document(path.with_suffix(".json"))
    try:
        data = path.read_bytes()
        if about is None or about["files"][path.name] != sha256(data):
            return None
        return about, load(data)
    except (OSError, SafetensorError, TypeError, KeyError):
        return None
