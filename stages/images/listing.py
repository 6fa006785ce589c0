"""Lists of images: text as OpenOOD has it, and CSV."""

import csv
import io
import os
import posixpath
import re
from collections.abc import Iterable, Sequence

from stages.errors import InputError
from stages.images.columns import PATH_NAMES, USUAL, Columns
from stages.images.folder import file_sample
from stages.images.names import given_class
from stages.images.table import Sample, SampleTable, make_table

_LINE = re.compile(r"(\S.*?)\s+(-1|\d{1,9})")


def list_text(source: str, root: str | None = None) -> SampleTable:
    """List the images of a text file with a line `path label` each; the label is a whole number, -1 for unknown.

    Raises:
        InputError: A line is not of this form (its number is named), or none of the files exists.
    """
    rows = []
    for number, line in enumerate(_text(source).split("\n"), 1):
        if line := line.strip():
            match = _LINE.fullmatch(line)
            if match is None:
                raise InputError(f"{source}, line {number}: {line!r}; `path label` is expected, label a number")
            rows.append((number, match[1], str(int(match[2]))))
    return _table(source, rows, root)


def list_csv(source: str, root: str | None = None, columns: Columns = USUAL) -> SampleTable:
    """List the images of a CSV file: a column has the paths, and another, where they are known, the classes.

    Raises:
        InputError: There is no such column, a row has no path or too many fields, or none of the files exists.
    """
    table = csv.DictReader(io.StringIO(_text(source), newline=""), strict=True)
    rows = []
    try:
        names = table.fieldnames or ()
        path_name, label_name = columns.find_path(source, names), columns.find_label(source, names)
        if path_name is None:
            raise InputError(
                f"{source}: no column of paths ({', '.join(PATH_NAMES)}); the first line must name the columns, "
                "`path,label`, or path_column the one that counts"
            )
        for row in table:
            if not row[path_name] or None in row:
                raise InputError(f"{source}, line {table.line_num}: no path, or more fields than the header names")
            rows.append((table.line_num, row[path_name], (label_name and row[label_name]) or ""))
    except csv.Error as error:
        raise InputError(f"{source}, line {table.line_num}: not CSV: {error}") from error
    return _table(source, rows, root, columns.notes(source, paths=names, labels=names))


def _text(source: str) -> str:
    try:
        with open(source, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise InputError(f"{source}: holds zero bytes, so it is no list of paths")
    return text


def _table(
    source: str, rows: Iterable[tuple[int, str, str]], root: str | None, notes: Sequence[str] = ()
) -> SampleTable:
    """Table of (line number, path, label); paths are relative to the root, or to the folder of the list."""
    root, samples = os.path.abspath(root or os.path.dirname(os.path.abspath(source))), list[Sample]()
    for number, path, label in rows:
        sample = file_sample(posixpath.normpath(path), os.path.join(root, path), given_class(label))
        if sample is None:
            raise InputError(f"{source}, line {number}: {path!r} is no file")
        samples.append(sample)
    if not samples:
        raise InputError(f"{source}: the list is empty")
    # One missing file is a failed image; if all are missing, the paths are meant relative to another folder.
    if not any(sample.mtime_ns or sample.size for sample in samples):
        raise InputError(f"{source}: none of its {len(samples)} images is there; paths are relative to {root}")
    return make_table(source, samples, notes=notes)
