"""InputTable, InputSet and Failure: what a cache is made from, and what could not be used.

``inputs.parquet`` has a row per input, in the order of the listing::

    id string | label int32 | size int64 | mtime_ns int64 | sha256 fixed 32 bytes | status "row" or "failed"

The rows with status "row" are, in this order, the rows of the cache.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from cache.arrow import column_of_numbers, column_of_text, column_values
from cache.errors import CacheDamagedError, CacheInvalidError
from cache.files import check, check_fields
from cache.fingerprint import arrays_sha256, canonical_json

if TYPE_CHECKING:  # it takes a moment, and who only names what a cache holds needs none of it
    import pyarrow as pa


@dataclass(frozen=True, eq=False)
class InputTable:
    """The inputs of a cache, in the order of their listing.

    Attributes:
        ids: sample ids, each at least one character of valid UTF-8 without NUL.
        labels: [n] int32, -1 where unknown.
        sizes: [n] int64, bytes of the file.
        mtimes_ns: [n] int64, modification time of the file.
        sha256: [n, 32] uint8, digest of the file's bytes; zeros where not read (yet).
        failed: [n] bool, whether the input could not be used; the others are rows.

    Raises:
        CacheInvalidError: for ids that cannot be stored and columns that do not fit together.
    """

    ids: tuple[str, ...]
    labels: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int64]
    mtimes_ns: npt.NDArray[np.int64]
    sha256: npt.NDArray[np.uint8]
    failed: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        n = len(self.ids)
        for name, dtype, shape in (
            ("labels", np.int32, (n,)),
            ("sizes", np.int64, (n,)),
            ("mtimes_ns", np.int64, (n,)),
            ("sha256", np.uint8, (n, 32)),
            ("failed", np.bool_, (n,)),
        ):
            column = getattr(self, name)
            fits = isinstance(column, np.ndarray) and column.shape == shape and column.dtype == dtype
            check(fits, f"inputs: {name} must be {shape} {np.dtype(dtype)} for {n} ids")
        for id_ in self.ids:
            check(isinstance(id_, str) and id_ != "" and "\0" not in id_, f"inputs: {id_!r} cannot be a sample id")
        try:
            "".join(self.ids).encode("utf-8")
        except UnicodeEncodeError as error:
            name = next(id_ for id_ in self.ids if not _is_utf8(id_))
            raise CacheInvalidError(f"inputs: {name!a} is not valid UTF-8; rename the file") from error

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def listing(cls, ids: Iterable[str], labels: npt.ArrayLike, sizes: npt.ArrayLike, mtimes_ns: npt.ArrayLike) -> Self:
        """A table of inputs that nobody has read yet: digests are zero, nothing has failed."""
        ids = tuple(ids)
        return cls(
            ids,
            np.asarray(labels, np.int32),
            np.asarray(sizes, np.int64),
            np.asarray(mtimes_ns, np.int64),
            np.zeros((len(ids), 32), np.uint8),
            np.zeros(len(ids), np.bool_),
        )

    def __getitem__(self, rows: slice) -> Self:
        columns = (self.labels, self.sizes, self.mtimes_ns, self.sha256, self.failed)
        return type(self)(self.ids[rows], *(column[rows] for column in columns))  # type: ignore[arg-type]

    def with_results(self, sha256: npt.NDArray[np.uint8], failed: npt.NDArray[np.bool_]) -> Self:
        """The same listing with what reading the inputs gave."""
        return replace(self, sha256=sha256, failed=failed)

    def columns_sha256(self) -> dict[str, str]:
        """A digest per column of the listing: what must be the same for an unfinished cache to go on."""
        columns: dict[str, npt.NDArray[Any]] = {
            "ids": _id_bytes(self.ids),
            "labels": self.labels,
            "sizes": self.sizes,
            "mtimes": self.mtimes_ns,
        }
        return {name: arrays_sha256({name: column}) for name, column in columns.items()}

    def content_sha256(self) -> str:
        """Digest over (id, label, sha256, status): what was read, wherever and whenever it was read."""
        return arrays_sha256(
            {"id": _id_bytes(self.ids), "label": self.labels, "sha256": self.sha256, "failed": self.failed}
        )

    def to_parquet(self) -> bytes:
        """The bytes of ``inputs.parquet``; the same table gives the same bytes with the same pyarrow."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [
            column_of_text(self.ids),
            column_of_numbers(self.labels),
            column_of_numbers(self.sizes),
            column_of_numbers(self.mtimes_ns),
            pa.Array.from_buffers(pa.binary(32), len(self), [None, pa.py_buffer(self.sha256.tobytes())]),
            column_of_text(["failed" if failed else "row" for failed in self.failed]),
        ]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=_schema()), sink, compression="zstd", version="2.6")
        return bytes(sink.getvalue())

    @classmethod
    def from_parquet(cls, data: bytes) -> Self:
        """Parse ``to_parquet``'s bytes.

        Raises:
            CacheDamagedError: not Parquet.
            CacheInvalidError: Parquet with other columns or impossible values.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # Not read_table, which imports pyarrow.dataset, and pandas with it.
            table = pq.ParquetFile(pa.BufferReader(data)).read().combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise CacheDamagedError(f"inputs.parquet cannot be read: {error}") from error
        check(table.schema.equals(_schema()), f"inputs.parquet has the columns {table.schema.names} or other types")
        check(all(column.null_count == 0 for column in table.columns), "inputs.parquet has empty cells")
        status = table["status"].to_pylist()
        check(set(status) <= {"row", "failed"}, 'inputs.parquet: status must be "row" or "failed"')
        digests = b"".join(table["sha256"].to_pylist())
        return cls(
            tuple(table["id"].to_pylist()),
            column_values(table["label"]),
            column_values(table["size"]),
            column_values(table["mtime_ns"]),
            np.frombuffer(digests, np.uint8).reshape(-1, 32),
            np.array([own == "failed" for own in status], np.bool_),
        )


@dataclass(frozen=True, eq=False)
class InputSet:
    """A set that becomes a cache.

    Attributes:
        name: of the set; a part of the folder's name.
        listing: its inputs.
        class_names: what their labels stand for.
    """

    name: str
    listing: InputTable
    class_names: Sequence[str]


@dataclass(frozen=True)
class Failure:
    """One input that could not be used: a line of ``failures.jsonl``."""

    id: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        """JSON-able fields."""
        return {"id": self.id, "reason": self.reason}

    @classmethod
    def from_dict(cls, body: Any) -> Self:
        """Parse and check what ``to_dict`` gave."""
        return cls(**check_fields(body, {"id": str, "reason": str}, "failure"))


def failures_to_jsonl(failures: Iterable[Failure]) -> bytes:
    """The bytes of ``failures.jsonl``."""
    return b"".join(canonical_json(failure.to_dict()) + b"\n" for failure in failures)


def failures_from_jsonl(data: bytes) -> list[Failure]:
    """Parse ``failures.jsonl``.

    Raises:
        CacheInvalidError: for a line that is no failure.
    """
    try:
        return [Failure.from_dict(json.loads(line)) for line in data.splitlines()]
    except (ValueError, RecursionError) as error:
        raise CacheInvalidError(f"failures.jsonl: not JSON: {error}") from error


def _schema() -> "pa.Schema":
    """Of ``inputs.parquet``."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("label", pa.int32(), nullable=False),
            pa.field("size", pa.int64(), nullable=False),
            pa.field("mtime_ns", pa.int64(), nullable=False),
            pa.field("sha256", pa.binary(32), nullable=False),
            pa.field("status", pa.string(), nullable=False),
        ]
    )


def _id_bytes(ids: Iterable[str]) -> npt.NDArray[np.uint8]:
    return np.frombuffer("".join(f"{id_}\0" for id_ in ids).encode("utf-8"), np.uint8)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
