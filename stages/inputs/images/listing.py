"""Lists of images: text as OpenOOD has it, CSV and Parquet."""

import csv
import io
import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cache import is_remote
from stages.errors import InputError, reading
from stages.inputs.arrow import is_text, scalars
from stages.inputs.images.columns import PATH_NAMES, USUAL, Columns
from stages.inputs.images.folder import file_sample
from stages.inputs.images.names import class_texts, given_class, trimmed
from stages.inputs.images.opening import FileStat, absolute, files_below, open_file
from stages.inputs.images.table import FileRange, Sample, SampleTable, make_table

_SEPARATORS = ",;\t|"
_LINE = re.compile(r"(\S.*?)\s+(-1|\d{1,9})")


def list_text(source: str, root: str | None = None) -> SampleTable:
    """List the images of a text file with a line `path label` each; the label is a whole number, -1 for unknown.

    Raises:
        InputError: A line is not of this form (its number is named) or names a file that another names, or none of the
            files exists.
    """
    rows = []
    for number, line in enumerate(_text(source).split("\n"), 1):
        if line := line.strip():
            match = _LINE.fullmatch(line)
            if match is None:
                raise InputError(f"{source}, line {number}: {line!r}; `path label` is expected, label a number")
            rows.append((number, match[1], given_class(match[2])))
    return _table(source, "line", rows, root)


def list_csv(source: str, root: str | None = None, columns: Columns = USUAL) -> SampleTable:
    """List the images of a CSV file: a column has the paths, and another, where they are known, the classes.

    Fields are separated by what makes a column of paths of the first line: commas, semicolons, tabs or bars.

    Raises:
        InputError: There is no such column, a row has no path or too many fields, names a file that another row names,
            or none of the files exists.
    """
    text = _text(source)
    names, separator, path_name = _header(source, text, columns)
    label_name = columns.find_label(source, names)
    table = _csv(text, separator)
    rows = []
    try:
        for row in table:
            if not row[path_name] or None in row:
                raise InputError(f"{source}, line {table.line_num}: no path, or more fields than the header names")
            if None in row.values():
                raise InputError(f"{source}, line {table.line_num}: {len(names)} fields are named, this line has fewer")
            rows.append((table.line_num, row[path_name], given_class((label_name and row[label_name]) or "")))
    except csv.Error as error:
        raise InputError(f"{source}, line {table.line_num}: not CSV: {error}") from error
    return _table(source, "line", rows, root, columns.notes(source, paths=names, labels=names))


def list_parquet(source: str, root: str | None = None, columns: Columns = USUAL) -> SampleTable:
    """List the images of a Parquet file: a column has the paths, and another, where they are known, the classes.

    Raises:
        InputError: There is no such column, one is no text (labels: or whole numbers), a row has no path or names a
            file that another row names, or none of the files exists.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(source, OSError, pa.ArrowException), open_file(source) as opened, pq.ParquetFile(opened) as file:
        names = file.schema_arrow.names
        path_name, label_name = columns.find_path(source, names), columns.find_label(source, names)
        if path_name is None:
            raise _no_paths(source, names)
        kind = file.schema_arrow.field(path_name).type
        if not is_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
            raise InputError(f"{source}: {trimmed(path_name)} is {kind}, must be text: the paths of image files")
        table = file.read(columns=[name for name in (path_name, label_name) if name is not None])
        paths = scalars(source, path_name, table[path_name]).tolist()
        labels = scalars(source, label_name, table[label_name]) if label_name else np.full(len(paths), None)
    if without := [row for row, path in enumerate(paths) if not path]:
        raise InputError(f"{source}, row {without[0]}: no path")
    rows = zip(range(len(paths)), paths, class_texts(source, labels), strict=True)
    return _table(source, "row", rows, root, columns.notes(source, paths=names, labels=names))


def _header(source: str, text: str, columns: Columns) -> tuple[Sequence[str], str, str]:
    """Names of the columns, what separates fields, and the column of the paths."""
    read: list[list[str]] = []
    for separator in _SEPARATORS:
        try:
            read.append(list(_csv(text, separator).fieldnames or ()))
            if (found := columns.find_path(source, read[-1])) is not None:
                return read[-1], separator, found
        except csv.Error as error:
            raise InputError(f"{source}, line 1: not CSV: {error}") from error
        except InputError:
            if separator == _SEPARATORS[-1] or len(read[-1]) > 1:
                raise
    most = max(read, key=len)
    raise _no_paths(source, most)


def _csv(text: str, separator: str) -> "csv.DictReader[str]":
    lines = io.StringIO(text, newline="")
    return csv.DictReader(lines, strict=True, delimiter=separator, skipinitialspace=separator != "\t")


def _no_paths(source: str, names: Iterable[str]) -> InputError:
    return InputError(
        f"{source}: no column of paths ({', '.join(PATH_NAMES)}) among {', '.join(map(trimmed, names)) or 'none'}: "
        "name the columns in the first line, `path,label`, or give path_column"
    )


def _text(source: str) -> str:
    try:
        with open_file(source) as file:
            text = io.TextIOWrapper(io.BytesIO(file.read()), encoding="utf-8-sig").read()
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise InputError(f"{source}: holds zero bytes, so it is no list of paths")
    return text


def _table(
    source: str, unit: str, rows: Iterable[tuple[int, str, str | None]], root: str | None, notes: Sequence[str] = ()
) -> SampleTable:
    """Table of (number of the line or row, path, class); paths are relative to the root, or to the list's folder."""
    root, samples = absolute(root or os.path.dirname(absolute(source))), list[Sample]()
    listed = files_below(root) if is_remote(root) else {}  # in one question, not one for each
    named: dict[str, int] = {}
    for number, path, class_name in rows:
        sample = _listed_sample(path, root, class_name, listed)
        if sample is None:
            raise InputError(f"{source}, {unit} {number}: {path!r} is no file")
        if (first := named.setdefault(sample.id, number)) != number:
            raise InputError(f"{source}: {unit}s {first} and {number} both name {sample.id!r}: leave one of them out")
        samples.append(sample)
    if not samples:
        raise InputError(f"{source}: the list is empty")
    # One missing file is a failed image; if all are missing, the paths are meant relative to another folder.
    if not any(sample.mtime_ns or sample.size for sample in samples):
        raise InputError(
            f"{source}: none of its {len(samples)} images is there (the first: {unit} {next(iter(named.values()))}, "
            f"{samples[0].id!r}); paths are relative to {root}"
        )
    return make_table(source, samples, notes=notes)


def _listed_sample(path: str, root: str, class_name: str | None, listed: Mapping[str, FileStat]) -> Sample | None:
    """Sample of a path in a list; of one below the root in a store by what was listed there."""
    sample_id, url = posixpath.normpath(path), os.path.join(root, path)
    if is_remote(path) or not is_remote(root):
        return file_sample(path if is_remote(path) else sample_id, path if is_remote(path) else url, class_name)
    now = listed.get(sample_id)
    if now is None:  # as a broken link: reading it fails, and is then recorded
        return Sample(sample_id, class_name, 0, 0, FileRange(f"{root}/{sample_id}"))
    return Sample(sample_id, class_name, now.size, now.mtime_ns, FileRange(f"{root}/{sample_id}", 0, now.size))
