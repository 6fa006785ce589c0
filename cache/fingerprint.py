"""Canonical JSON and SHA-256: the only place that hashes, so that one thing has one identity."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.errors import CacheInvalidError
from cache.remote import Place, RemotePath

# Sorted keys, no spaces, no NaN: equal values give equal bytes, in any process and on any machine.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: Any) -> bytes:
    """The one UTF-8 JSON text of a value.

    Raises:
        CacheInvalidError: for what JSON cannot hold (NaN, objects, lone surrogates, cycles).

    >>> canonical_json({"b": (1, 2.0), "a": "é"}).decode()
    '{"a":"é","b":[1,2.0]}'
    """
    try:
        return _CANONICAL.encode(value).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise CacheInvalidError(f"not a JSON value: {error}") from error


def sha256(data: bytes | memoryview) -> str:
    """SHA-256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def pieces_sha256(pieces: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of bytes that come in pieces, in hex."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, in hex."""
    return sha256(canonical_json(value))


def file_sha256(path: str | Place) -> str:
    """SHA-256 of a file's bytes, in hex; memory stays flat."""
    if isinstance(path, RemotePath):
        return pieces_sha256(path.pieces())
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def arrays_sha256(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 over named arrays in order of name: name, dtype, shape and row-major little-endian bytes of each.

    Raises:
        CacheInvalidError: for arrays of Python objects, which have no bytes of their own.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if array.dtype.hasobject:
            raise CacheInvalidError(f"array {name!r} holds Python objects and cannot be hashed")
        little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
        digest.update(canonical_json([name, little.dtype.str, little.shape]))
        digest.update(little.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
