"""Compressed files: not read, since images are read in any order; the command that unpacks one is said instead."""

import os
import shlex

from stages.errors import InputError
from stages.inputs.images.opening import open_file

_HEAD_BYTES = 8
_TO_OUTPUT = {  # first bytes -> what writes the unpacked file to its output
    b"\x1f\x8b": "gzip -dc",
    b"\x1f\x9d": "gzip -dc",  # of compress
    b"BZh": "bzip2 -dc",
    b"\xfd7zXZ\0": "xz -dc",
    b"\x5d\0\0": "xz --format=lzma -dc",
    b"\x28\xb5\x2f\xfd": "zstd -dc",
    b"\x04\x22\x4d\x18": "lz4 -dc",
}
_TO_FOLDER = {  # first bytes -> what unpacks an archive into a folder
    b"PK\x03\x04": "python -m zipfile -e {file} {folder}",
    b"7z\xbc\xaf\x27\x1c": "7z x {file} -o{folder}",
    b"Rar!\x1a\x07": "unrar x {file} {folder}/",
}
_TARS = (".tgz", ".taz", ".tbz", ".tbz2", ".txz", ".tlz", ".tzst")
_FILES = (".gz", ".z", ".bz2", ".xz", ".lzma", ".zst", ".lz4")
_ARCHIVES = (".zip", ".7z", ".rar")
_OF_ARRAYS = (".npz", ".pt", ".pth")  # zip archives inside, which nobody unpacks


def is_packed(name: str) -> bool:
    """Whether a file is compressed by its name: a tar, any other file, or an archive."""
    return name.lower().endswith((*_TARS, *_FILES, *_ARCHIVES))


def is_packed_tar(name: str) -> bool:
    """Whether a file is a compressed tar by its name.

    >>> is_packed_tar("train.tar.GZ"), is_packed_tar("train.tgz"), is_packed_tar("urls.csv.gz")
    (True, True, False)
    """
    return is_packed(name) and unpacked_name(name).lower().endswith(".tar")


def unpacked_name(name: str) -> str:
    """Name of a compressed file when it is unpacked; another than that of the packed one in any case.

    >>> unpacked_name("a/1.tgz"), unpacked_name("a/1.tar.xz"), unpacked_name("a/1.zip"), unpacked_name("a/1.tar")
    ('a/1.tar', 'a/1.tar', 'a/1', 'a/1-unpacked.tar')
    """
    stem, suffix = os.path.splitext(name)
    if suffix.lower() in _TARS:
        return f"{stem}.tar"
    return stem if is_packed(name) else f"{stem}-unpacked{suffix}"


def refuse_packed(path: str, where: str = "") -> None:
    """Refuse a compressed file, by its first bytes.

    Args:
        path: The file.
        where: Begins the message; the path where nothing is given.

    Raises:
        InputError: It is compressed; the message has the command that unpacks it.
    """
    if (command := _unpacking(path)) is not None:
        raise InputError(
            f"{where or path}: compressed, but images are read in any order: `{command}` unpacks it, give that"
        )


def _unpacking(path: str) -> str | None:
    """The command that unpacks a file; None where it is not compressed."""
    if path.lower().endswith(_OF_ARRAYS):
        return None
    try:
        with open_file(path) as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    packed, unpacked = shlex.quote(path), shlex.quote(unpacked_name(path))
    for start, command in _TO_OUTPUT.items():
        if head.startswith(start):
            return f"{command} {packed} > {unpacked}"
    for start, command in _TO_FOLDER.items():
        if head.startswith(start):
            return command.format(file=packed, folder=unpacked)
    return None
