"""The rows of a file of features: what they are, as a cache stores them, and whether they go together."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from threading import Lock
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from cache import FeatureSpec, sha256
from cache.spec import square_grid
from stages.config import ARRAY_FEATURES, ARRAY_KEYS
from stages.errors import InputError
from stages.inputs.arrays.columns import Chosen, Column, block_rows
from stages.inputs.images.names import beyond_classes, listed, match_classes, shown, unlike
from stages.inputs.images.table import SampleTable

ARRAY_SEMANTICS = 1  # raise it when the same file would give another cache
FEATURES, KEYS = ARRAY_FEATURES, ARRAY_KEYS


@dataclass(frozen=True, eq=False)
class ArrayTable:
    """The rows of one file, in its order.

    Attributes:
        path: of the file, or of what its parts are in.
        columns: its features by key.
        samples: its ids, labels and classes; the "file" of a sample is the bytes of its row.
        named: classes of the columns of ``logits``, in their order, where these are named; () where they are numbered.
        files: that it is read from.
    """

    path: str
    columns: Mapping[str, Column]
    samples: SampleTable
    named: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

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
        return square_grid(shape[1])

    @property
    def has_tokens(self) -> bool:
        """Whether it holds what a copy of a backbone's end reads."""
        return "patches" in self.columns

    def of_classes(self, class_names: Sequence[str]) -> "ArrayTable":
        """The same rows with those of the named columns of ``logits`` that are the classes of a study, in its order.

        Raises:
            InputError: there is none for a class.
        """
        if not self.named:
            return self
        places = match_classes(class_names, self.named)
        if absent := [name for name, place in zip(class_names, places, strict=True) if place < 0]:
            raise InputError(
                f"{self.path}: no column of logits is {unlike(absent, self.named, 'classes')}: classes names them"
            )
        left = len(self.named) - len(places)
        note = f"{self.path}: {left} of {len(self.named)} columns of logits are of no ID class and left out"
        logits: Column = Chosen(self.columns["logits"], places)
        columns = {**self.columns, "logits": logits}
        notes = (*self.samples.notes, note) if left else self.samples.notes
        samples = replace(self.samples, contents=RowsOf(columns, range(len(self))), notes=notes)
        return replace(self, columns=columns, samples=samples, named=tuple(class_names))

    def check_logits(self) -> None:
        """Refuse logits whose columns are not the classes, column c class number c.

        Raises:
            InputError: saying what is between them.
        """
        if self.named or "logits" not in self.columns:
            return
        n, classes = self.columns["logits"].shape[1], self.samples.class_names
        if classes == tuple(map(str, range(n))):
            return
        where = f"{self.path}: logits have {n} columns, label names {len(classes)} classes"
        if not all(name.isdigit() for name in classes):
            raise InputError(
                f"{where}: which column is {listed(list(map(shown, classes)))}? Give classes, a list or a text file of "
                "the columns' names in their order"
            )
        numbers = np.array([*map(int, classes), -1])[self.samples.labels]  # label -1, unknown, takes the last
        if (numbers >= n).any():
            raise beyond_classes(where, numbers, n, "columns", "the columns are")
        raise InputError(
            f"{where}: with logits, label is the number of a column, and each column has rows: give classes, a list or "
            "a text file of the columns' names in their order, and those that are ID classes are taken"
        )

    def spec(self, origin: str, dtype: str, end: tuple[str, str, int, int] | None = None) -> FeatureSpec:
        """What a cache of these rows holds.

        Args:
            origin: where they come from.
            dtype: how they are stored; logits always as float32.
            end: name, digest of the weights, expert blocks and image size of the network whose end reads the tokens.
        """
        name, sha, blocks, size = end or ("", "", 0, 0)
        tap, registers, logits, taps = (self.columns.get(key) for key in ("tap_cls", "registers", "logits", "taps"))
        n_taps = taps.shape[1] if taps else 0
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
            taps=tuple(range(1, n_taps + 1)),
            tap_widths=(taps.shape[-1] if taps else 0,) * n_taps,
            tap_tokens=len(taps.shape) - 2 if taps else 0,
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


class RowsOf(Sequence[bytes]):
    """Bytes of each row, made from columns when they are asked for; in ascending order at the speed of the disk."""

    def __init__(self, columns: Mapping[str, Column], rows: range) -> None:
        self._columns = columns
        self._rows = rows
        self._lock = Lock()
        row = sum(prod(column.shape[1:]) * column.dtype.itemsize for column in columns.values())
        self._step = block_rows(row)
        self._blocks: deque[tuple[int, dict[str, NDArray[Any]]]] = deque(maxlen=2)  # threads are a few rows apart

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> "RowsOf": ...
    def __getitem__(self, index: int | slice) -> "bytes | RowsOf":
        if isinstance(index, slice):
            return RowsOf(self._columns, self._rows[index])
        row = self._rows[index]
        first = row - row % self._step
        with self._lock:
            block = next((arrays for start, arrays in self._blocks if start == first), None)
            if block is None:
                stop = min(first + self._step, self._columns["cls"].shape[0])
                block = {name: column.read(first, stop) for name, column in self._columns.items()}
                self._blocks.append((first, block))
        return row_bytes(block, row - first)
