"""Some classes of a source alone, as ImageNet-100 is of ImageNet."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stages.errors import InputError
from stages.files.regular import check_regular
from stages.inputs.images.names import match_classes, trimmed, unlike
from stages.inputs.images.table import SampleTable


def only_classes(table: SampleTable, classes: str | Sequence[str]) -> SampleTable:
    """The images of some classes.

    Args:
        table: any images.
        classes: their names, or a text file that names them, see `read_classes`.

    Raises:
        InputError: The file cannot be read or names no class, or one that no image has.
    """
    names, file = (read_classes(classes), classes) if isinstance(classes, str) else (tuple(classes), "classes")
    places = match_classes(names, table.class_names)
    if absent := [name for name, place in zip(names, places, strict=True) if place < 0]:
        raise InputError(
            f"{file}: {len(absent)} of its {len(names)} classes have no image in {table.source}: "
            f"{unlike(absent, table.class_names, 'the set')}"
        )
    kept = sorted(set(places))
    rows = np.flatnonzero(np.isin(table.labels, kept))
    return replace(
        table,
        ids=tuple(table.ids[row] for row in rows),
        labels=np.searchsorted(kept, table.labels[rows]).astype(np.int32),
        class_names=tuple(table.class_names[label] for label in kept),
        sizes=table.sizes[rows],
        mtimes_ns=table.mtimes_ns[rows],
        contents=tuple(table.contents[row] for row in rows.tolist()),
    )


def read_classes(path: str) -> tuple[str, ...]:
    """The classes that a text file names, a class a line; lines that begin with ``#`` are remarks.

    Raises:
        InputError: The file cannot be read or names no class.
    """
    try:
        check_regular(path)
        with open(path, encoding="utf-8-sig") as file:
            lines = [trimmed(line) for line in file]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; give a text file, a class a line") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); give a text file, a class a line") from error
    if not (names := tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))):
        raise InputError(f"{path}: names no class; give a text file, a class a line")
    return names
