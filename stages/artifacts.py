"""Files that stages leave for each other: JSON and safetensors, arriving whole or not at all, holding no code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from cache.files import write_file


def write_json(path: Path, value: Any) -> None:
    """Write indented UTF-8 JSON, making its folder."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode("utf-8"))


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where there is no such file or it is no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write named arrays as safetensors, making their folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, save({name: np.asarray(array, order="C") for name, array in tensors.items()}))


def write_described(path: Path, tensors: Mapping[str, NDArray[Any]], about: Any) -> None:
    """Write named arrays and, last, the JSON file beside them that says what they are.

    The JSON of an older pair goes first: killed in between, the new arrays must not stand under the old description.
    """
    described = path.with_suffix(".json")
    described.unlink(missing_ok=True)
    write_tensors(path, tensors)
    write_json(described, about)


def read_tensors(path: Path) -> dict[str, NDArray[Any]] | None:
    """Read named arrays; None where there is no such file or it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, TypeError):  # TypeError: of a type that numpy does not have
        return None


def map_tensors(path: Path) -> dict[str, NDArray[Any]] | None:
    """Named arrays of a file, memory-mapped and read-only: rows are read when they are looked at.

    Returns:
        None where there is no such file, it is damaged, or it holds other than float32 and int64.
    """
    try:
        with safe_open(path, "numpy") as file:  # checks that the header fits the file
            names = list(file.keys())
        content = np.memmap(path, np.uint8, "r")
        begin = 8 + int(content[:8].view("<u8")[0])
        header = json.loads(content[8:begin].tobytes())
        return {name: _mapped(content[begin:], **header[name]) for name in names}
    except (OSError, SafetensorError, KeyError):
        return None


_MAPPED_TYPES = {"F32": "<f4", "I64": "<i8"}


def _mapped(content: NDArray[np.uint8], dtype: str, shape: list[int], data_offsets: list[int]) -> NDArray[Any]:
    return content[slice(*data_offsets)].view(_MAPPED_TYPES[dtype]).reshape(shape)
