"""Features that were computed elsewhere: arrays in a file, read some rows at a time and never held whole.

    source               what it holds
    mine.npz             an array for each key; not compressed, it is read in place, else from front to back
    mine.npy             ``cls``; the other keys stand beside it, in ``mine.label.npy``, ``mine.logits.npy``, …
    mine.parquet         a column for each key; arrays as lists of one length, nested for tokens

The keys, of n rows: ``cls`` [n, D]; where they are known ``label`` [n] (class names, or class numbers from 0; −1:
unknown), ``id`` [n] text (the row's number where there is none), ``logits`` [n, C] (column c is class number c), and
the tokens that enter the last blocks of the network, as `stages.backbone.Tokens` has them: ``tap_cls`` [n, D'],
``registers`` [n, R, D'], ``patches`` [n, P, D'] or [n, h, w, D']. Nothing in a file is ever run: no pickled objects.
"""

import difflib
import os
import weakref
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Protocol, cast, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from cache import FeatureSpec, sha256
from stages.backbone import END_TOLERANCE, Backbone, Tokens, weights_sha
from stages.errors import InputError
from stages.images.names import class_texts, number_classes, storable
from stages.images.table import SampleTable

ARRAY_SEMANTICS = 1  # raise it when the same file would give another cache
FEATURES = ("cls", "tap_cls", "registers", "patches", "logits")
KEYS = (*FEATURES, "label", "id")
ARRAY_SUFFIXES = (".npz", ".npy", ".parquet")
_AXES = {"cls": (2,), "tap_cls": (2,), "registers": (3,), "patches": (3, 4), "logits": (2,)}
_BLOCK_BYTES = 4 << 20  # of a column that can only be read from front to back
Blocks = Generator[NDArray[Any], None, None]  # rows of an array, one block after another
_CHECKED_ROWS = 16  # run through the backbone's end, to see that tokens and network belong together


class Column(Protocol):
    """One array of a file, ``[n, ...]``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all rows."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """As the file has it."""
        ...

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start`` to ``stop`` (exclusive)."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayTable:
    """The rows of one file, in its order.

    Attributes:
        path: of the file.
        columns: its features by key.
        samples: its ids, labels and classes; the "file" of a sample is the bytes of its row.
    """

    path: str
    columns: Mapping[str, Column]
    samples: SampleTable

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def dtype(self) -> str:
        """``"float16"`` where all of its features have no more precision, else ``"float32"``."""
        half = all(column.dtype.itemsize == 2 for name, column in self.columns.items() if name != "logits")
        return "float16" if half else "float32"

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the patches: as the array has it, or a square, or one row."""
        if "patches" not in self.columns:
            return (0, 0)
        shape = self.columns["patches"].shape
        if len(shape) == 4:
            return (shape[1], shape[2])
        side = isqrt(shape[1])
        return (side, side) if side * side == shape[1] else (1, shape[1])

    @property
    def has_tokens(self) -> bool:
        """Whether it holds what a copy of a backbone's end reads."""
        return "patches" in self.columns

    def spec(self, origin: str, dtype: str, end: tuple[str, str, int, int] | None = None) -> FeatureSpec:
        """What a cache of these rows holds.

        Args:
            origin: where they come from.
            dtype: how they are stored; logits always as float32.
            end: name, digest of the weights, expert blocks and image size of the network whose end reads the tokens.
        """
        name, sha, blocks, size = end or ("", "", 0, 0)
        tap, registers, logits = (self.columns.get(key) for key in ("tap_cls", "registers", "logits"))
        return FeatureSpec(
            backbone=name,
            weights_sha=sha,
            transform={},
            image_size=size,
            expert_blocks=blocks,
            patches="full" if self.has_tokens else "none",
            dtype=dtype,
            cls_dim=self.columns["cls"].shape[1],
            tap_dim=tap.shape[1] if tap else 0,
            n_registers=registers.shape[1] if registers else 0,
            grid=self.grid,
            compute={},
            semantics=ARRAY_SEMANTICS,
            origin=origin,
            n_logits=logits.shape[1] if logits else 0,
        )

    def read(self, start: int, stop: int, spec: FeatureSpec) -> tuple[dict[str, NDArray[Any]], NDArray[np.uint8]]:
        """Some rows as a cache stores them.

        Returns:
            An array for each of ``spec.datasets()``; and [n, 32], the digest of each row's bytes in the file.

        Raises:
            InputError: a value that is no finite number of the stored dtype, naming its row; the file was cut short.
        """
        raw = {name: column.read(start, stop) for name, column in self.columns.items()}
        digests = [bytes.fromhex(sha256(row_bytes(raw, index))) for index in range(stop - start)]
        arrays = {}
        for name, (shape, dtype) in spec.datasets().items():
            with np.errstate(over="ignore"):
                values = raw[name].reshape(stop - start, *shape).astype(dtype)
            bad = np.argwhere(~np.isfinite(values).reshape(stop - start, -1).all(1))
            if len(bad):
                row = int(bad[0, 0])
                given = raw[name][row].ravel()[~np.isfinite(values[row]).ravel()][0]
                raise InputError(
                    f"{self.path}: {name} of row {start + row} ({self.samples.ids[start + row]!r}) holds {given:g}, "
                    f"which is no finite {dtype.name}: leave the row out"
                )
            arrays[name] = values
        return arrays, np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def row_bytes(arrays: Mapping[str, NDArray[Any]], index: int) -> bytes:
    """What a row is known by: its features in the order of `FEATURES`, little-endian."""
    rows = (arrays[name][index] for name in FEATURES if name in arrays)
    return b"".join(row.astype(row.dtype.newbyteorder("<"), copy=False).tobytes() for row in rows)


def list_arrays(path: str) -> ArrayTable:
    """Look at a file of features: shapes, labels and ids; features themselves are not read yet.

    Args:
        path: ends in ``.npz``, ``.npy`` or ``.parquet``.

    Raises:
        InputError: the file or ``cls`` is missing, a key is unknown or of another shape, number of rows or type, holds
            Python objects, or a label or an id is none.
    """
    if "\0" in path or not os.path.exists(path):
        raise InputError(f"{path!r}: no such file")
    suffix = Path(path).suffix.lower()
    if suffix not in ARRAY_SUFFIXES or os.path.isdir(path):
        raise InputError(f"{path}: not a file of features; give one that ends in {', '.join(ARRAY_SUFFIXES)}")
    readers = (_npz_columns, _npy_columns, _parquet_columns)
    columns, files = readers[ARRAY_SUFFIXES.index(suffix)](path)
    if "cls" not in columns:
        raise InputError(f"{path}: 'cls' is missing: the features of n rows, [n, D] (it has {', '.join(columns)})")
    features = {name: columns[name] for name in FEATURES if name in columns}
    _check_features(path, features)
    n = features["cls"].shape[0]
    for name in ("label", "id"):
        if name in columns and columns[name].shape != (n,):
            raise InputError(f"{path}: {name} has shape {columns[name].shape}, must be ({n},) as cls has {n} rows")
    classes = class_texts(path, columns["label"].read(0, n)) if "label" in columns else [None] * n
    numbered = number_classes(path, classes)
    stats = [os.stat(file) for file in files]
    samples = SampleTable(
        source=path,
        ids=_ids(path, columns["id"].read(0, n)) if "id" in columns else tuple(map(str, range(n))),
        labels=numbered.labels,
        class_names=numbered.names,
        sizes=np.full(n, sum(prod(column.shape[1:]) * column.dtype.itemsize for column in features.values()), np.int64),
        mtimes_ns=np.full(n, max(stat.st_mtime_ns for stat in stats), np.int64),
        left_out={},
        contents=_Rows(features, range(n)),
        notes=numbered.notes,
    )
    return ArrayTable(path, features, samples)


def check_end(table: ArrayTable, backbone: Backbone) -> None:
    """Refuse tokens that do not lead to ``cls`` through the backbone's end: experts would start from a wrong place.

    Raises:
        InputError: other shapes than the backbone's, or other features.
    """
    raw = {name: column.read(0, min(_CHECKED_ROWS, len(table))) for name, column in table.columns.items()}
    read = {name: torch.from_numpy(array.astype(np.float32)) for name, array in raw.items()}
    patches = read["patches"].flatten(1, -2)
    tokens = Tokens(read["cls"], read["tap_cls"], read.get("registers", patches[:, :0]), patches)
    given = {
        "D": (tokens.cls.shape[1], backbone.dim),
        "D'": (tokens.tap_cls.shape[1], backbone.tap_dim),
        "R": (tokens.registers.shape[1], backbone.n_registers),
        "h, w": (table.grid, backbone.grid),
    }
    name = f"{backbone.config.name} at {backbone.config.image_size} px"
    for what, (ours, theirs) in given.items():
        if ours != theirs:
            raise InputError(f"{table.path}: {what} of its tokens is {ours}, that of {name} {theirs}")
    if not backbone.cut:
        return
    with torch.inference_mode():
        error = (backbone.end()(tokens) - tokens.cls).abs().max() / tokens.cls.abs().max()
    # What float16 rounds off, a block carries on to the features.
    if not error <= (END_TOLERANCE if table.dtype == "float32" else 50 * END_TOLERANCE):
        raise InputError(
            f"{table.path}: its tokens do not lead to its cls through the last {backbone.expert_blocks} block(s) of "
            f"{name} (off by {100 * float(error):.2g} % of the largest value): give the un-normalised tokens that "
            "enter them, registers included, and the same weights; or leave [backbone] out"
        )


def network_of(backbone: Backbone) -> tuple[str, str, int, int]:
    """What `ArrayTable.spec` says of the network whose end reads the tokens."""
    config = backbone.config
    return config.name, weights_sha(backbone.model), backbone.expert_blocks, config.image_size


def _check_features(path: str, columns: Mapping[str, Column]) -> None:
    n = columns["cls"].shape[0] if columns["cls"].shape else 0
    for name, column in columns.items():
        if len(column.shape) not in _AXES[name] or not all(column.shape[1:]):
            axes = " or ".join(str(axes) for axes in _AXES[name])
            raise InputError(f"{path}: {name} has shape {column.shape}, must have {axes} axes, none of length 0")
        if column.shape[0] != n:
            raise InputError(f"{path}: {name} has {column.shape[0]} rows, cls has {n}")
        if column.dtype.kind != "f" or column.dtype.itemsize > 8:
            raise InputError(f"{path}: {name} is {column.dtype}, must be float16, float32 or float64")
    if not n:
        raise InputError(f"{path}: cls has no rows")
    tokens = [name for name in ("tap_cls", "registers", "patches") if name in columns]
    if tokens and "tap_cls" not in tokens:
        raise InputError(f"{path}: has {tokens[0]}, but no tap_cls: give the class token that stands before them")
    if len({columns[name].shape[-1] for name in tokens}) > 1:
        shapes = ", ".join(f"{name} {columns[name].shape}" for name in tokens)
        raise InputError(f"{path}: tokens of one network have one length: {shapes}")


def _ids(path: str, ids: NDArray[Any]) -> tuple[str, ...]:
    if ids.dtype.kind not in "USiu":
        raise InputError(f"{path}: id is {ids.dtype}, must be text")
    texts = tuple(map(storable, _texts(path, "id", ids)))
    seen: dict[str, int] = {}
    for row, text in enumerate(texts):
        if not text:
            raise InputError(f"{path}: id of row {row} is empty")
        if text in seen:
            raise InputError(f"{path}: id {text!r} stands in rows {seen[text]} and {row}: name every row once")
        seen[text] = row
    return texts


def _texts(path: str, name: str, values: NDArray[Any]) -> list[str]:
    try:
        return [text.decode() if isinstance(text, bytes) else str(text) for text in values.tolist()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: {name} is not text in UTF-8") from error


def _known(path: str, keys: Sequence[str]) -> None:
    for key in keys:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{path}: {key!r} is not a known key{hint} (known: {', '.join(KEYS)})")


class _Rows(Sequence[bytes]):
    """Bytes of each row, made from columns when they are asked for; in ascending order at the speed of the disk."""

    def __init__(self, columns: Mapping[str, Column], rows: range) -> None:
        self._columns = columns
        self._rows = rows
        self._lock = Lock()
        row = sum(prod(column.shape[1:]) * column.dtype.itemsize for column in columns.values())
        self._step = max(_BLOCK_BYTES // row, 1)
        self._blocks: deque[tuple[int, dict[str, NDArray[Any]]]] = deque(maxlen=2)  # threads are a few rows apart

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> "_Rows": ...
    def __getitem__(self, index: int | slice) -> "bytes | _Rows":
        if isinstance(index, slice):
            return _Rows(self._columns, self._rows[index])
        row = self._rows[index]
        first = row - row % self._step
        with self._lock:
            block = next((arrays for start, arrays in self._blocks if start == first), None)
            if block is None:
                stop = min(first + self._step, self._columns["cls"].shape[0])
                block = {name: column.read(first, stop) for name, column in self._columns.items()}
                self._blocks.append((first, block))
        return row_bytes(block, row - first)


# ------------------------------------------------------------------------------------------------------- numpy


@dataclass(frozen=True)
class _InPlace:
    """An array whose bytes stand in a file as they are."""

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    column_major: bool

    def read(self, start: int, stop: int) -> NDArray[Any]:
        with _reading(self.path):
            if self.column_major:
                mapped = np.memmap(self.path, self.dtype, "r", self.offset, self.shape, "F")
                return np.array(mapped[start:stop], order="C")
            row, n = prod(self.shape[1:]), stop - start  # read, not mapped: mapped pages would count as memory
            offset = self.offset + start * row * self.dtype.itemsize
            values = np.fromfile(self.path, self.dtype, n * row, offset=offset)
            if len(values) != n * row:
                raise ValueError("it ends before its last row")
            return values.reshape(n, *self.shape[1:])


class _Held:
    """An array in memory: labels, ids."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values
        self.shape, self.dtype = values.shape, values.dtype

    def read(self, start: int, stop: int) -> NDArray[Any]:
        return self._values[start:stop]


class _Onwards:
    """An array that can only be read from front to back; going back begins anew.

    Args:
        shape, dtype: of all of it.
        begin: gives its rows from the first on, in blocks.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], begin: Callable[[], Blocks]) -> None:
        self.shape = shape
        self.dtype = dtype
        self._begin = begin
        self._blocks: Blocks | None = None
        self._close: Callable[[], object] = lambda: None
        self._at = 0  # row after the last that was read
        self._block = np.empty((0, *shape[1:]), dtype)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        if self._blocks is None or start < self._at - len(self._block):
            self._close()
            self._blocks, self._at, self._block = self._begin(), 0, self._block[:0]
            self._close = weakref.finalize(self, self._blocks.close)  # and its file, also where nobody reads to the end
        parts = [self._block[:0]]
        while start < stop:
            if start >= self._at:
                self._block = next(self._blocks)
                self._at += len(self._block)
                continue
            first = self._at - len(self._block)
            parts.append(self._block[start - first : stop - first])
            start += len(parts[-1])
        return np.concatenate(parts)


def _npz_columns(path: str) -> tuple[dict[str, Column], list[str]]:
    columns: dict[str, Column] = {}
    with _reading(path), zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise InputError(f"{path}: a key stands in it twice")
        _known(path, list(members))
        for name, info in members.items():
            with archive.open(info) as file:
                shape, column_major, dtype = _npy_header(path, name, cast(BinaryIO, file))
                header = file.tell()
            if info.compress_type == zipfile.ZIP_STORED:
                columns[name] = _InPlace(path, _data_offset(path, info) + header, shape, dtype, column_major)
            elif column_major and len(shape) > 1:
                raise InputError(f"{path}: {name} is compressed and stored by columns: save it with numpy.savez")
            else:
                columns[name] = _Onwards(shape, dtype, _unpacking(path, info.filename, header, shape, dtype))
    return columns, [path]


def _npy_columns(path: str) -> tuple[dict[str, Column], list[str]]:
    stem = Path(path).with_suffix("")
    files = {name: f"{stem}.{name}.npy" for name in KEYS if name != "cls"}
    files = {"cls": path} | {name: file for name, file in files.items() if os.path.exists(file)}
    columns: dict[str, Column] = {}
    for name, file_path in files.items():
        with _reading(file_path), open(file_path, "rb") as file:
            shape, column_major, dtype = _npy_header(file_path, name, file)
            columns[name] = _InPlace(file_path, file.tell(), shape, dtype, column_major)
    return columns, list(files.values())


def _npy_header(path: str, name: str, file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, column_major, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, column_major, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise InputError(f"{path}: {name} holds pickled Python objects, which may run code and are never loaded")
    return shape, column_major, dtype


def _data_offset(path: str, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin that is not compressed: after its local header, which has its own length."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")  # of the name and of what stands after it
    return info.header_offset + 30 + int(lengths.sum())


def _unpacking(
    path: str, member: str, header: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Callable[[], Blocks]:
    row = max(prod(shape[1:]) * dtype.itemsize, 1)

    def begin() -> Blocks:
        with _reading(path), zipfile.ZipFile(path) as archive, archive.open(member) as file:
            file.read(header)
            left, step = shape[0], max(_BLOCK_BYTES // row, 1)
            while left:
                n = min(step, left)
                data = file.read(n * row)
                if len(data) != n * row:
                    raise ValueError("it ends before its last row")
                yield np.frombuffer(data, dtype).reshape(n, *shape[1:])
                left -= n

    return begin


# ----------------------------------------------------------------------------------------------------- Parquet


def _parquet_columns(path: str) -> tuple[dict[str, Column], list[str]]:
    columns: dict[str, Column] = {}
    with _reading(path), pq.ParquetFile(path) as file:
        schema, n = file.schema_arrow, file.metadata.num_rows
        _known(path, schema.names)
        for name in schema.names:
            if name in ("label", "id"):
                values = _scalars(path, name, file.read(columns=[name])[name])
                columns[name] = _Held(values)
                continue
            first = next(file.iter_batches(1, columns=[name])).column(0) if n else None
            shape, dtype = _list_shape(path, name, schema.field(name).type, first)
            columns[name] = _Onwards((n, *shape), dtype, _scanning(path, name, shape, dtype))
    return columns, [path]


def _list_shape(path: str, name: str, kind: Any, first: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape of a row, from the type, or else from the first row; and dtype."""
    shape = []
    while pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if pa.types.is_fixed_size_list(kind):
            shape.append(kind.list_size)
        else:
            shape.append(len(first[0]) if first is not None and len(first) and first[0].is_valid else 0)
        first, kind = None if first is None else first.flatten(), kind.value_type
    if not pa.types.is_floating(kind):
        raise InputError(f"{path}: {name} is {kind}, must be a list of float16, float32 or float64")
    return tuple(shape), np.dtype(kind.to_pandas_dtype())


def _scanning(path: str, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Callable[[], Blocks]:
    rows = max(_BLOCK_BYTES // max(prod(shape) * dtype.itemsize, 1), 1)

    def begin() -> Blocks:
        start = 0
        # Without a buffer size a whole row group is read at once.
        with _reading(path), pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            for batch in file.iter_batches(rows, columns=[name]):
                array = batch.column(0)
                for size in shape:
                    wrong = pc.list_value_length(array).fill_null(-1).to_numpy() != size
                    if wrong.any():
                        row = start + int(wrong.argmax()) * len(batch) // len(array)
                        raise InputError(f"{path}: {name} of row {row} is no list of {size} values, as row 0 is")
                    array = array.flatten()
                if array.null_count:
                    raise InputError(f"{path}: {name} has empty values in rows {start} to {start + len(batch) - 1}")
                yield array.to_numpy(zero_copy_only=False).reshape(len(batch), *shape)
                start += len(batch)

    return begin


def _scalars(path: str, name: str, column: Any) -> NDArray[Any]:
    if pa.types.is_integer(column.type):
        return np.asarray(column.fill_null(-1).to_numpy())
    if pa.types.is_dictionary(column.type) or pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return np.array([text or "" for text in column.to_pylist()], np.str_)
    raise InputError(f"{path}: {name} is {column.type}, must be whole numbers or text")


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn what numpy, zip and Parquet make of a bad file into one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, pa.ArrowException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: cannot be read: {reason}") from error
