"""write_shard() and ShardReader: one HDF5 file. The only door to h5py.

Layout (n rows; every dataset contiguous, little-endian, at a multiple of 64 bytes; any HDF5 tool can read it)::

    shard-00000.h5
    ├── cls         [n, D]      float16 or float32    the backbone's final class embedding
    ├── tap_cls     [n, D']     float16 or float32    class token that enters the expert blocks, if known
    ├── registers   [n, R, D']  float16 or float32    absent where R = 0
    ├── patches     [n, P, D']  float16 or float32    row-major over the grid; absent where patches = "none"
    ├── taps        [n, L, D"]  float16 or float32    after L blocks or stages, see ``FeatureSpec``; else absent
    ├── logits      [n, C]      float32               only where they came with features made elsewhere
    ├── label       [n]         int32                 -1: unknown
    ├── id          [n]         fixed-length UTF-8
    └── image_hash  [n, 32]     uint8                 SHA-256 of the image file

HDF5's own structures stand before all of them, in one page. Contiguous, because a reader then needs nothing but an
offset: it maps the file and never touches what it does not use. Checksums stand in the manifest, since HDF5's own
need chunks and cost most of the reading speed.
"""

import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cache.errors import CacheDamagedError, CacheError
from cache.files import arriving, check, write_all
from cache.fingerprint import pieces_sha256
from cache.lock import NO_LOCKS
from cache.remote import Place, RemotePath
from cache.spec import FeatureSpec

if TYPE_CHECKING:  # it takes a moment, and who only names what a cache holds needs none of it
    import h5py

_ALIGNMENT = 64  # bytes: a cache line, and a multiple of every item size
_CHUNK_CACHE = 64 << 20  # bytes: so that a chunk larger than HDF5's own 1 MiB is unpacked once, not at every row
_MOST_DATASETS = 10_000  # of a file of other people
_BLOCK = 1 << 20  # bytes that are cast or checked together: they stay in the cache of a core


@dataclass(frozen=True)
class ShardFile:
    """A shard as it was written.

    Attributes:
        rows: of every dataset.
        nbytes: of the file.
        sha256: of the file.
        offsets: where each dataset lies in it: first byte, number of bytes.
    """

    rows: int
    nbytes: int
    sha256: str
    offsets: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def write_shard(
    path: Path,
    spec: FeatureSpec,
    arrays: Mapping[str, npt.NDArray[np.floating[Any]]],
    labels: npt.NDArray[np.int32],
    ids: Sequence[str],
    image_hashes: npt.NDArray[np.uint8],
) -> ShardFile:
    """Write one shard; it arrives whole or not at all. The same arguments give the same bytes.

    Its bytes are on the disk when this returns, its name when the folder is synced next, as for its record.

    Args:
        path: where the shard will stand.
        spec: what the features are; its dtype is the one stored.
        arrays: one float array [n, ...] for each of ``spec.datasets()``: of the stored dtype, which is taken as it
            is, or of a wider one.
        labels: [n] int32.
        ids: n sample ids.
        image_hashes: [n, 32] uint8.

    Raises:
        CacheInvalidError: arrays that do not fit the spec or one another.
        CacheError: a feature is not finite, or too large for float16 (naming dataset and id); the disk refuses.
    """
    n, datasets = len(ids), spec.datasets()
    check(arrays.keys() == datasets.keys(), f"{path.name}: has {sorted(arrays)}, the spec says {sorted(datasets)}")
    for name, (shape, _) in datasets.items():
        fits = arrays[name].shape == (n, *shape)
        check(fits, f"{path.name}: {name} is {arrays[name].shape}, must be {(n, *shape)}")
    check(labels.shape == (n,), f"{path.name}: {labels.shape} labels for {n} rows")
    check(image_hashes.shape == (n, 32), f"{path.name}: image hashes are {image_hashes.shape}, must be {(n, 32)}")
    encoded = [id_.encode("utf-8") for id_ in ids]
    columns = [_Column(name, arrays[name], dtype) for name, (_, dtype) in datasets.items()]
    columns.append(_Column("label", labels, np.dtype("<i4")))
    import h5py

    id_type = h5py.string_dtype("utf-8", max(map(len, encoded), default=0) or 1)
    columns.append(_Column("id", np.array(encoded, id_type), id_type))
    columns.append(_Column("image_hash", image_hashes, np.dtype(np.uint8)))
    header, offsets = _lay_out(columns)

    def pieces() -> Iterator[bytes | memoryview]:
        yield header
        at = len(header)
        for column in columns:
            if offset := offsets[column.name]:  # none where there are no rows
                yield bytes(offset - at)
                yield from column.blocks()
                at = offset + column.nbytes

    # Writing, flushing and the digest each take as long as the disk or a core lets them: side by side, over the same
    # arrays, so that nothing is held in memory twice.
    with ThreadPoolExecutor(2) as beside, arriving(path) as file:
        digest = beside.submit(pieces_sha256, pieces())
        for piece in pieces():
            write_all(file, piece)
        flushed = beside.submit(os.fsync, file.fileno())
        for column in columns[: len(datasets)]:
            column.check_finite(ids)
        flushed.result()
        where = {column.name: (offsets[column.name] or 0, column.nbytes) for column in columns}
        return ShardFile(n, file.tell(), digest.result(), where)


@dataclass(frozen=True)
class _Column:
    """One dataset: an array, and the dtype in which it is stored."""

    name: str
    array: npt.NDArray[Any]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return self.array.size * self.dtype.itemsize

    def blocks(self) -> Iterator[memoryview]:
        """The bytes as they are stored: at once where dtype and order are right, else cast a block at a time."""
        as_stored = self.array.dtype == self.dtype and self.array.flags.c_contiguous
        for _, stored in self._stored(len(self.array) if as_stored else self._block_rows):
            yield stored.reshape(-1).view(np.uint8).data

    def check_finite(self, ids: Sequence[str]) -> None:
        """Refuse what is no number or became none, since an inf in a cache poisons every later score."""
        for start, stored in self._stored(self._block_rows):
            if _is_finite(stored):
                continue
            row, *index = np.argwhere(~np.isfinite(stored))[0]
            value, where = self.array[(start + row, *index)], f"{self.name} of {ids[start + row]!r}"
            wider = 'set cache.dtype = "float32"'
            if np.isfinite(value):
                raise CacheError(f"{where}: {value:g} does not fit {self.dtype.name}; {wider}")
            if self.array.dtype == np.float16:
                raise CacheError(
                    f"{where}: {value}: too large for float16, or no finite number: {wider}; "
                    "if it stays, look at the weights and at this image"
                )
            raise CacheError(f"{where}: {value} is not a feature; look at the weights and at this image")

    @property
    def _block_rows(self) -> int:
        return max(_BLOCK // (prod(self.array.shape[1:]) * self.dtype.itemsize), 1)

    def _stored(self, rows: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Some rows at a time in the stored dtype, and where they start."""
        for start in range(0, len(self.array), rows):
            with np.errstate(over="ignore", invalid="ignore"):
                stored = np.ascontiguousarray(self.array[start : start + rows], self.dtype)
            yield start, stored


def _is_finite(array: npt.NDArray[Any]) -> bool:
    """Whether all values are finite; five times as fast as ``numpy.isfinite``, which makes an array of the answers.

    Seen as integers, inf and NaN are the numbers from inf's bits on: of positive sign at the top of the signed
    ones, of negative sign at the top of the unsigned ones.
    """
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    signed, unsigned = (native.view(f"{kind}{native.itemsize}") for kind in "iu")
    above, below = np.array([np.inf, -np.inf], native.dtype)
    return bool(signed.max() < above.view(signed.dtype) and unsigned.max() < below.view(unsigned.dtype))


def _lay_out(columns: Iterable[_Column]) -> tuple[bytes, dict[str, int | None]]:
    """All that HDF5 itself writes of a file with these datasets, and where each dataset's bytes are to stand.

    HDF5 sees one element of each dataset, which makes it give out the room; the rest of the file goes past it. So no
    copy of the arrays is made, and a full disk is an error of ``write_all`` and not something that HDF5 meets
    while it closes. Without times and in the oldest format the bytes depend on shapes and dtypes alone.
    """
    import h5py

    file = _Skeleton()
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(
        file, "w", libver=("earliest", "v110"), alignment_threshold=1, alignment_interval=_ALIGNMENT
    ) as hdf5:
        datasets = [
            hdf5.create_dataset(
                column.name, column.array.shape, column.dtype, dcpl=properties.copy(), track_times=False
            )
            for column in columns
        ]
        for dataset in datasets:  # when all are created, so that HDF5's own structures lie together, before the data
            if dataset.size:
                dataset[(0,) * dataset.ndim] = dataset.dtype.type()
        offsets = {dataset.name[1:]: dataset.id.get_offset() for dataset in datasets}
    data_start = min((offset for offset in offsets.values() if offset), default=file.size)
    header = bytearray(data_start)
    for address, data in file.writes:
        if address < data_start:
            header[address : address + len(data)] = data
    return bytes(header), offsets


class _Skeleton(io.RawIOBase):
    """A file that remembers what is written to it, and where."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[tuple[int, bytes]] = []
        self.size = self._at = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + (self.size if whence == io.SEEK_END else 0)
        return self._at

    def write(self, data: Any, /) -> int:
        self.writes.append((self._at, bytes(data)))
        self.size = max(self.size, self._at + len(data))
        return len(data)

    def truncate(self, size: int | None = None, /) -> int:
        self.size = self.size if size is None else size
        return self.size


def shard_layout(path: Place) -> dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]]:
    """Where the datasets of a shard lie, as HDF5 says it: first byte, shape, dtype; those that are contiguous.

    Raises:
        CacheDamagedError: the shard is missing, or is not HDF5.
    """
    import h5py

    try:
        with path.open() if isinstance(path, RemotePath) else nullcontext(path) as source, _open(source) as file:
            # An empty dataset has no offset; a chunked or compressed one neither, and cannot be mapped.
            return {
                name: (dataset.id.get_offset() or 0, dataset.shape, dataset.dtype)
                for name, dataset in file.items()
                if isinstance(dataset, h5py.Dataset)
                and not dataset.dtype.hasobject  # of variable length: addresses, not bytes
                and (dataset.size == 0 or dataset.id.get_offset() is not None)
            }
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # all that HDF5 makes of bad bytes
        raise CacheDamagedError(f"{path}: cannot be opened as HDF5: {error}; run verify") from error


class ShardReader:
    """Memory-maps the datasets of one shard.

    Nothing is opened before the first ``array``: a reader may be pickled or forked and opens its file in the process
    that reads. HDF5 itself is used only to find out where the datasets lie, and closed again.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._layout: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] | None = None  # offset, shape, dtype
        self._bytes: npt.NDArray[np.uint8] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None}

    def array(self, name: str) -> npt.NDArray[Any]:
        """A dataset [n, ...], mapped read-only; only what is indexed is read from the disk.

        Raises:
            CacheDamagedError: the shard is missing, is not HDF5, or has no such contiguous dataset.
        """
        if self._layout is None:
            self._layout = shard_layout(self.path)
        if name not in self._layout:
            raise CacheDamagedError(f"{self.path}: has no dataset {name!r}; run verify")
        offset, shape, dtype = self._layout[name]
        nbytes = prod(shape) * dtype.itemsize
        if self._bytes is None:
            try:
                # As a plain array: a numpy.memmap makes a new one of itself, slowly, at every index.
                self._bytes = np.asarray(np.memmap(self.path, np.uint8, "r"))
            except (OSError, ValueError) as error:
                raise CacheDamagedError(f"{self.path}: cannot be mapped: {error}; run verify") from error
        if offset + nbytes > len(self._bytes):
            raise CacheDamagedError(f"{self.path}: ends inside {name!r}; run verify")
        return self._bytes[offset : offset + nbytes].view(dtype).reshape(shape)

    def close(self) -> None:
        """Let go of the mapping and its file descriptor; the next ``array`` maps again."""
        self._bytes = None


def _open(path: "Path | io.BufferedIOBase", **options: Any) -> "h5py.File":
    """A shard to read. HDF5 locks what it opens; where there are no locks it need not, for shards arrive by rename."""
    import h5py

    try:
        return h5py.File(path, "r", **options)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return h5py.File(path, "r", locking=False, **options)


# ------------------------------------------------------------------------------------------ files of other people


def list_datasets(path: str | Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of the datasets of any HDF5 file, by their path in it, such as ``cls`` or ``group/cls``.

    Links to other files, external storage and virtual datasets are left out: what a file says of others is not read. So
    are datasets of which not all values were ever written: their shape says nothing of how many there are.

    Raises:
        OSError, RuntimeError, KeyError, ValueError, TypeError: what HDF5 makes of bad bytes.
    """
    with _open(Path(path)) as file:
        found = dict(islice(_datasets_below(file, "", ()), _MOST_DATASETS + 1))
    if len(found) > _MOST_DATASETS:  # or groups that are linked to one another many times over
        raise ValueError(f"it has more than {_MOST_DATASETS:,} datasets")
    return found


def _is_whole(dataset: "h5py.Dataset") -> bool:
    """Whether all values of a dataset stand in its file."""
    if dataset.shape is None or dataset.is_virtual or dataset.external:
        return False
    if dataset.chunks is None:
        return bool(dataset.id.get_storage_size()) or 0 in dataset.shape
    return bool(dataset.id.get_num_chunks() * math.prod(dataset.chunks) >= math.prod(dataset.shape))


def _datasets_below(
    group: "h5py.Group", at: str, above: tuple[int, ...]
) -> Iterator[tuple[str, tuple[tuple[int, ...], np.dtype[Any]]]]:
    import h5py

    here = h5py.h5o.get_info(group.id).addr
    if here in above:  # a link back
        return
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue
        item = group[name]
        if isinstance(item, h5py.Group):
            yield from _datasets_below(item, f"{at}{name}/", (*above, here))
        elif isinstance(item, h5py.Dataset) and _is_whole(item):
            yield f"{at}{name}", (item.shape, item.dtype)


def read_dataset(path: str | Path, name: str, start: int, stop: int) -> npt.NDArray[Any]:
    """Rows ``start`` to ``stop`` (exclusive) of a dataset that `list_datasets` found; text as bytes.

    Raises:
        OSError, RuntimeError, KeyError, ValueError, TypeError: what HDF5 makes of bad bytes.
    """
    with _open(Path(path), rdcc_nbytes=_CHUNK_CACHE) as file:
        return np.asarray(file[name][start:stop])
