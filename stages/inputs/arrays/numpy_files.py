"""``.npz`` and ``.npy``: arrays of numpy, read in place where they are not compressed."""

import glob
import os
import zipfile
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from stages.errors import InputError
from stages.inputs.arrays.columns import ArrayFile, Blocks, Column, InPlace, Onwards, block_rows, reading_arrays


def open_npz(path: str) -> ArrayFile:
    """The arrays of an archive by their keys; a compressed one is read from front to back."""
    with reading_arrays(path), zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise InputError(f"{path}: a key stands in it twice")
    return ArrayFile([path], {name: partial(_member, path, info) for name, info in members.items()})


def open_npy(path: str) -> ArrayFile:
    """``mine.npy``, which is ``cls``, and what stands beside it: ``mine.label.npy`` is ``label``."""
    stem = str(Path(path).with_suffix(""))
    beside = {file[len(stem) + 1 : -len(".npy")]: file for file in sorted(glob.glob(f"{glob.escape(stem)}.?*.npy"))}
    files = {"cls": path} | {name: file for name, file in beside.items() if name != "cls"}
    return ArrayFile([path, *beside.values()], {name: partial(_whole_file, file) for name, file in files.items()})


def is_beside(path: str, others: set[str]) -> bool:
    """Whether a ``.npy`` file is a column beside one of the others."""
    folder, name = os.path.split(path)
    parts = name.removesuffix(".npy").split(".")
    return any(os.path.join(folder, ".".join(parts[:n]) + ".npy") in others for n in range(1, len(parts)))


def _whole_file(path: str, key: str) -> Column:
    with reading_arrays(path), open(path, "rb") as file:
        shape, column_major, dtype = _header(path, key, file)
        _check_length(os.path.getsize(path) - file.tell(), shape, dtype)
        return InPlace(path, file.tell(), shape, dtype, column_major)


def _member(path: str, info: zipfile.ZipInfo, key: str) -> Column:
    with reading_arrays(path), zipfile.ZipFile(path) as archive:
        with archive.open(info) as file:
            shape, column_major, dtype = _header(path, key, cast(BinaryIO, file))
            header = file.tell()
        _check_length(info.file_size - header, shape, dtype)
        if info.compress_type == zipfile.ZIP_STORED:
            return InPlace(path, _data_offset(path, info) + header, shape, dtype, column_major)
        if column_major and len(shape) > 1:
            raise InputError(f"{path}: {key} is compressed and stored by columns: save it with numpy.savez")
        return Onwards(shape, dtype, _unpacking(path, info.filename, header, shape, dtype))


def _header(path: str, key: str, file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, column_major, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, column_major, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise InputError(f"{path}: {key} holds pickled Python objects, which may run code and are never loaded")
    return shape, column_major, dtype


def _check_length(nbytes: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Refuse rows that a header promises and the file cannot hold, before anything is made for each of them."""
    if min(shape, default=0) < 0:
        raise ValueError(f"its shape is {shape}")
    if nbytes < prod(shape) * dtype.itemsize:
        raise ValueError("it ends before its last row")


def _data_offset(path: str, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin that is not compressed: after its local header, which has its own length."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")  # of the name and of what stands after it
    return info.header_offset + 30 + int(lengths.sum())


def _unpacking(
    path: str, member: str, header: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Callable[[], Blocks]:
    row = prod(shape[1:]) * dtype.itemsize

    def begin() -> Blocks:
        with reading_arrays(path), zipfile.ZipFile(path) as archive, archive.open(member) as file:
            file.read(header)
            left, step = shape[0], block_rows(row)
            while left:
                n = min(step, left)
                data = file.read(n * row)
                if len(data) != n * row:
                    raise ValueError("it ends before its last row")
                yield np.frombuffer(data, dtype).reshape(n, *shape[1:])
                left -= n

    return begin
