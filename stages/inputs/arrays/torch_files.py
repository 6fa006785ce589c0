"""``.pt``, ``.pth``: tensors of torch, mapped and not loaded; ``.safetensors``, read in place."""

import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from stages.errors import InputError
from stages.inputs.arrays.columns import ArrayFile, Column, FromBFloat16, Held, InPlace, reading_arrays
from stages.inputs.images.decode import short

# Types of safetensors that numpy has.
_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "i1", "U8": "u1"} | {
    f"{kind}{bits}": f"<{kind.lower()}{bits // 8}" for kind in "IU" for bits in (16, 32, 64)
}


def open_torch(path: str) -> ArrayFile:
    """What ``torch.save`` wrote: a dictionary of tensors, or one tensor, which is ``cls``; lists are labels or ids.

    Raises:
        InputError: it holds anything that only code of its own could make again, or nothing of these.
    """
    with reading_arrays(path):
        stored = _load(path)
    if isinstance(stored, torch.Tensor):
        stored = {"cls": stored}
    if not isinstance(stored, Mapping) or not all(isinstance(name, str) for name in stored):
        raise InputError(
            f"{path}: holds a {type(stored).__name__}, must be a tensor or a dictionary of tensors by name"
        )
    return ArrayFile([path], {name: partial(_column, path, value) for name, value in stored.items()})


def open_safetensors(path: str) -> ArrayFile:
    """The tensors of a file by name."""
    with reading_arrays(path):
        try:
            with safe_open(path, framework="pt"):  # checks the whole header
                pass
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return ArrayFile([path], {name: partial(_in_place, path, 8 + length, about) for name, about in header.items()})


def _load(path: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sparse tensors, which are refused
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # saved before torch 1.6: such a file cannot be mapped, and is loaded
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds pickled Python objects, which may run code and are never loaded: save named tensors"
        ) from error
    except Exception as error:  # its reader of pickles raises whatever bad bytes make of it
        raise ValueError(f"{type(error).__name__}: {short(error)}") from error


@dataclass(frozen=True, eq=False)
class _Mapped:
    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        bits = torch.empty(0, dtype=self.tensor.dtype)
        return (bits.view(torch.uint16) if bits.dtype == torch.bfloat16 else bits).numpy().dtype

    def read(self, start: int, stop: int) -> NDArray[Any]:
        rows = self.tensor[start:stop].contiguous()
        return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy().copy()

    def release(self) -> None:
        """The system keeps in memory what it likes of the mapping."""


def _column(path: str, value: Any, key: str) -> Column:
    if isinstance(value, list | tuple) and key in ("label", "id"):
        return Held(np.array([int(v) if isinstance(v, torch.Tensor) and v.ndim == 0 else v for v in value], object))
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{path}: {key} is a {type(value).__name__}, must be a tensor")
    value = value.detach()
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise InputError(f"{path}: {key} is a tensor of another layout than numpy's: save it dense")
    if value.untyped_storage().nbytes() < value.nbytes:
        raise InputError(f"{path}: {key} is a view of fewer values, repeated: save its own, by clone()")
    if value.dtype == torch.bfloat16:
        return FromBFloat16(_Mapped(value))
    column = _Mapped(value)
    try:
        _ = column.dtype
    except TypeError as error:
        raise _of_another_type(path, key, str(value.dtype)) from error
    return column


def _in_place(path: str, data_start: int, about: Mapping[str, Any], key: str) -> Column:
    shape, offset = tuple(about["shape"]), data_start + about["data_offsets"][0]
    if about["dtype"] == "BF16":
        return FromBFloat16(InPlace(path, offset, shape, np.dtype("<u2")))
    if about["dtype"] not in _DTYPES:
        raise _of_another_type(path, key, about["dtype"])
    return InPlace(path, offset, shape, np.dtype(_DTYPES[about["dtype"]]))


def _of_another_type(path: str, key: str, dtype: str) -> InputError:
    return InputError(f"{path}: {key} is {dtype}, must be float16, bfloat16, float32 or float64")
