"""Files of weights: every tensor by a dotted name, however deep it lies; code in a file is never run."""

import argparse
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from stages.errors import InputError

# First bytes of what is sometimes given in place of weights of PyTorch.
_OTHERS = {
    b"\x89HDF\r\n\x1a\n": "weights of TensorFlow (HDF5)",
    b"GGUF": "weights of llama.cpp (GGUF)",
    b"version https://git-lfs": "a pointer of Git LFS in place of the file: run git lfs pull",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file or of one that ``torch.save`` wrote, on the CPU.

    Args:
        path: what it is is seen in its bytes, not in its name.

    Returns:
        Tensors by name; the keys of nested dictionaries are joined by dots: ``{"model": {"fc.bias": …}}`` gives
        ``model.fc.bias``. What is no tensor is left out.

    Raises:
        InputError: a file of another program, one without tensors, or one with more than plain tensors.
        Exception: damaged; the errors of safetensors and torch have no common base.
    """
    with path.open("rb") as file:
        start = file.read(32)
    for magic, what in _OTHERS.items():
        if start.startswith(magic):
            raise InputError(f"it is {what}; give .safetensors or .pth")
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if zipfile.is_zipfile(path) and any(name.endswith(".npy") for name in zipfile.ZipFile(path).namelist()):
        raise InputError("it is an archive of NumPy arrays, weights of JAX; give .safetensors or .pth")
    if not start.startswith((b"PK", b"\x80")):
        raise InputError("it is neither of safetensors nor of torch.save")
    try:
        # timm's training script stores its arguments; torch warns of pickle's newer protocols.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            "it is more than plain tensors, and code in it is never run: convert it to .safetensors"
        ) from error
    tensors = dict(_leaves(content))
    if not tensors:
        raise InputError("it holds no tensors")
    return tensors


def _leaves(content: Any, at: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield at, content
        return
    children: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(content, Mapping):
        children = iter(content.items())
    elif isinstance(content, list | tuple):
        children = enumerate(content)
    for key, child in children:
        yield from _leaves(child, f"{at}.{key}" if at else str(key))
