"""One file that holds a detector, and proves that it scores here as it did where it was made.

============================  =======================================================================================
``about.json``                where it came from: study, data, metrics, what was never measured, versions
``detector.json``             `stages.detection.parts.DetectorParts`, by `stages.files.packing`
``detector.safetensors``      its arrays: experts, router, heads, what scores learnt, calibration scores, ID examples
``golden.json``               `stages.detection.parts.GoldenRows`
``golden.safetensors``        their pixels, what came of them on the way, their scores
``backbone.safetensors``      weights of the network; absent with ``--no-backbone``, and where there is none
``model.onnx``                the network and its experts as a graph of `stages.detection.graph`; with ``--onnx``
============================  =======================================================================================

Nothing in it is code. Arrays that stand in several places are stored once.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from cache.errors import CacheError
from cache.fingerprint import arrays_sha256, canonical_json
from stages.detection.parts import DetectorParts, GoldenRows
from stages.errors import InputError
from stages.files.archive import SealedArchive, write_archive
from stages.files.bundle_file import BUNDLE_KIND, BUNDLE_VERSION
from stages.files.packing import pack, unpack

GRAPH = "model.onnx"

_ABOUT, _BACKBONE = "about.json", "backbone.safetensors"
_PARTS, _GOLDEN = "detector", "golden"
_SHARED_BYTES = 1 << 10  # smaller arrays are not looked for elsewhere
# What numpy and torch make of parts that are each well-formed and do not go together.
_DISAGREEMENT = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, ArithmeticError, AssertionError,
    MemoryError, CacheError,
)  # fmt: skip

_Part = TypeVar("_Part")


@dataclass(frozen=True, eq=False)
class Bundle:
    """What a file holds.

    Attributes:
        about: where it came from, JSON.
        parts: the detector.
        golden: rows whose scores are known.
        weights: of the network; None where they are not in the file.
        graph: the network as ONNX; None where it is not in the file.
    """

    about: dict[str, Any]
    parts: DetectorParts
    golden: GoldenRows
    weights: Mapping[str, NDArray[Any]] | None
    graph: bytes | None = None


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Write it; the same detector gives the same bytes."""
    entries = {_ABOUT: canonical_json(bundle.about) + b"\n"}
    for name, value in ((_PARTS, bundle.parts), (_GOLDEN, bundle.golden)):
        entries |= _entries(name, value)
    if bundle.weights is not None:
        entries[_BACKBONE] = save({name: np.asarray(array, order="C") for name, array in bundle.weights.items()})
    if bundle.graph is not None:
        entries[GRAPH] = bundle.graph
    write_archive(path, BUNDLE_KIND, BUNDLE_VERSION, entries)


def _entries(name: str, value: Any) -> dict[str, bytes]:
    arrays: dict[str, NDArray[Any]] = {}
    packed = pack(value, arrays)
    first: dict[str, str] = {}
    same: dict[str, str] = {}
    for own, array in arrays.items():
        if array.nbytes >= _SHARED_BYTES:
            found = first.setdefault(arrays_sha256({"": array}), own)
            if found != own:
                same[own] = found
    kept = {own: array for own, array in arrays.items() if own not in same}
    return {f"{name}.json": canonical_json({"value": packed, "same": same}) + b"\n", f"{name}.safetensors": save(kept)}


def read_about(path: str | os.PathLike[str]) -> tuple[SealedArchive, dict[str, Any]]:
    """Where a bundle came from, and the archive that it is; no array is read and no library loaded.

    Raises:
        InputError: no such file, another, or damaged.
    """
    archive = SealedArchive(path, BUNDLE_KIND, BUNDLE_VERSION)
    about = archive.read_json(_ABOUT)
    if not isinstance(about, dict):
        raise InputError(f"{path}: {_ABOUT} is no object")
    return archive, about


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """What a file holds; nothing of it is run.

    Raises:
        InputError: no such file, another, or damaged; or what is in it is not a detector.
    """
    archive, about = read_about(path)
    parts: DetectorParts = _read(archive, _PARTS, DetectorParts)
    golden: GoldenRows = _read(archive, _GOLDEN, GoldenRows)
    known = {f"{name}.{kind}" for name in (_PARTS, _GOLDEN) for kind in ("json", "safetensors")}
    known |= {_ABOUT, _BACKBONE} | ({GRAPH} if parts.network is not None else set())
    if others := sorted(set(archive.names) - known):
        raise InputError(f"{path}: holds {others[0]}, which is no part of a detector")
    weights = archive.read_tensors(_BACKBONE) if _BACKBONE in archive else None
    return Bundle(about, parts, golden, weights, archive.read(GRAPH) if GRAPH in archive else None)


def _read(archive: SealedArchive, name: str, kind: type[_Part]) -> _Part:
    body, arrays = archive.read_json(f"{name}.json"), archive.read_tensors(f"{name}.safetensors")
    if not isinstance(body, dict) or body.keys() != {"value", "same"} or not isinstance(body["same"], dict):
        raise InputError(f"{archive.path}: {name}.json is not as it is written")
    for own, first in body["same"].items():
        if own in arrays or not isinstance(first, str) or first not in arrays or first in body["same"]:
            raise InputError(f"{archive.path}: {name}.json: {own[:60]!a} is no array of another name")
        arrays[own] = arrays[first]
    try:
        found: _Part = unpack(kind, body["value"], arrays)
    except InputError as error:
        raise InputError(f"{archive.path}: {name}.json: {error}") from error
    return found


@contextmanager
def going_together(path: str | os.PathLike[str]) -> Iterator[None]:
    """What is wrong with parts that are each well-formed is one line about the file.

    Raises:
        InputError: anything was.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except _DISAGREEMENT as error:
        said = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: what is in it does not go together: {said}") from error
