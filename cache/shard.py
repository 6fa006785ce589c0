"""write_shard() and ShardReader: one HDF5 file. The only door to h5py.

Layout (n rows; every dataset contiguous, little-endian, at a multiple of 64 bytes; any HDF5 tool can read it)::

    shard-00000.h5
    ├── cls         [n, D]      float16 or float32    the backbone's final class embedding
    ├── tap_cls     [n, D']     float16 or float32    class token that enters the expert blocks
    ├── registers   [n, R, D']  float16 or float32    absent where R = 0
    ├── patches     [n, P, D']  float16 or float32    row-major over the grid; absent where patches = "none"
    ├── label       [n]         int32                 -1: unknown
    ├── id          [n]         fixed-length UTF-8
    └── image_hash  [n, 32]     uint8                 SHA-256 of the image file

Contiguous, because a reader then needs nothing but an offset: it maps the file and never touches what it does not
use. Checksums stand in the manifest, since HDF5's own need chunks and cost most of the reading speed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from cache.errors import CacheDamagedError, CacheError
from cache.files import check, write_file
from cache.fingerprint import sha256
from cache.spec import FeatureSpec

_ALIGNMENT = 64  # bytes: a cache line, and a multiple of every item size


@dataclass(frozen=True)
class ShardFile:
    """A shard as it was written: rows, bytes of the file, SHA-256 of the file."""

    rows: int
    nbytes: int
    sha256: str


def write_shard(
    path: Path,
    spec: FeatureSpec,
    arrays: Mapping[str, npt.NDArray[np.floating[Any]]],
    labels: npt.NDArray[np.int32],
    ids: Sequence[str],
    image_hashes: npt.NDArray[np.uint8],
) -> ShardFile:
    """Write one shard; it arrives whole or not at all. The same arguments give the same bytes.

    Args:
        path: where the shard will stand.
        spec: what the features are; its dtype is the one stored.
        arrays: one float array [n, ...] for each of ``spec.datasets()``, in a dtype no narrower than the stored one.
        labels: [n] int32.
        ids: n sample ids.
        image_hashes: [n, 32] uint8.

    Raises:
        CacheInvalidError: arrays that do not fit the spec or one another.
        CacheError: a feature is not finite, or too large for float16 (naming dataset and id); the disk refuses.
    """
    n, datasets = len(ids), spec.datasets()
    check(arrays.keys() == datasets.keys(), f"{path.name}: has {sorted(arrays)}, the spec says {sorted(datasets)}")
    columns: dict[str, npt.NDArray[Any]] = {}
    for name, (shape, dtype) in datasets.items():
        fits = arrays[name].shape == (n, *shape)
        check(fits, f"{path.name}: {name} is {arrays[name].shape}, must be {(n, *shape)}")
        columns[name] = _store(arrays[name], dtype, name, ids)
    check(labels.shape == (n,), f"{path.name}: {labels.shape} labels for {n} rows")
    check(image_hashes.shape == (n, 32), f"{path.name}: image hashes are {image_hashes.shape}, must be {(n, 32)}")
    encoded = [id_.encode("utf-8") for id_ in ids]
    columns["label"] = labels.astype("<i4")
    columns["id"] = np.array(encoded, h5py.string_dtype("utf-8", max(map(len, encoded), default=0) or 1))
    columns["image_hash"] = image_hashes.astype(np.uint8)
    image = _file_image(columns)
    write_file(path, image)
    return ShardFile(n, len(image), sha256(image))


def _store(
    array: npt.NDArray[np.floating[Any]], dtype: np.dtype[Any], name: str, ids: Sequence[str]
) -> npt.NDArray[Any]:
    """Cast to the stored dtype; refuse what it cannot hold, since an inf in a cache poisons every later score."""
    with np.errstate(over="ignore"):
        stored = array.astype(dtype)
    if np.isfinite(stored).all():
        return stored
    row, *index = np.argwhere(~np.isfinite(stored))[0]
    value = array[(row, *index)]
    if np.isfinite(value):
        raise CacheError(f'{name} of {ids[row]!r}: {value:g} does not fit {dtype.name}; set cache.dtype = "float32"')
    raise CacheError(f"{name} of {ids[row]!r}: {value} is not a feature; look at the weights and at this image")


def _file_image(columns: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The bytes of an HDF5 file with these datasets.

    Made in memory: all that reaches the disk then goes through ``write_file``, where a full disk is an error with a
    name, and not something that HDF5 meets while it closes. Without times and in the oldest format the bytes depend
    on the arrays alone.
    """
    size = sum(column.nbytes + _ALIGNMENT for column in columns.values()) + (1 << 14)
    with h5py.File(
        "shard.h5",
        "w",
        driver="core",
        backing_store=False,
        block_size=size,
        libver=("earliest", "v110"),
        alignment_threshold=1,
        alignment_interval=_ALIGNMENT,
    ) as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column, dtype=column.dtype, track_times=False)
        file.flush()
        return bytes(file.id.get_file_image())


class ShardReader:
    """Memory-maps the datasets of one shard.

    Nothing is opened before the first ``array``: a reader may be pickled or forked and opens its file in the process
    that reads. HDF5 itself is used only to find out where the datasets lie, and closed again.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._layout: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] | None = None  # offset, shape, dtype
        self._bytes: np.memmap[Any, np.dtype[np.uint8]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None}

    def array(self, name: str) -> npt.NDArray[Any]:
        """A dataset as a read-only ``numpy.memmap`` [n, ...]; only what is indexed is read from the disk.

        Raises:
            CacheDamagedError: the shard is missing, is not HDF5, or has no such contiguous dataset.
        """
        if self._layout is None:
            self._layout = self._read_layout()
        if name not in self._layout:
            raise CacheDamagedError(f"{self.path}: has no dataset {name!r}; run verify")
        offset, shape, dtype = self._layout[name]
        nbytes = prod(shape) * dtype.itemsize
        if self._bytes is None:
            try:
                self._bytes = np.memmap(self.path, np.uint8, "r")
            except (OSError, ValueError) as error:
                raise CacheDamagedError(f"{self.path}: cannot be mapped: {error}; run verify") from error
        if offset + nbytes > len(self._bytes):
            raise CacheDamagedError(f"{self.path}: ends inside {name!r}; run verify")
        return self._bytes[offset : offset + nbytes].view(dtype).reshape(shape)

    def close(self) -> None:
        """Let go of the mapping and its file descriptor; the next ``array`` maps again."""
        self._bytes = None

    def _read_layout(self) -> dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]]:
        try:
            with h5py.File(self.path, "r") as file:
                # An empty dataset has no offset; a chunked or compressed one neither, and cannot be mapped.
                return {
                    name: (dataset.id.get_offset() or 0, dataset.shape, dataset.dtype)
                    for name, dataset in file.items()
                    if isinstance(dataset, h5py.Dataset) and (dataset.size == 0 or dataset.id.get_offset() is not None)
                }
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # all that HDF5 makes of bad bytes
            raise CacheDamagedError(f"{self.path}: cannot be opened as HDF5: {error}; run verify") from error
