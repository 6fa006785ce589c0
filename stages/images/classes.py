"""Some classes of a source alone, as ImageNet-100 is of ImageNet."""

from dataclasses import replace

import numpy as np

from stages.errors import InputError
from stages.images.table import SampleTable


def only_classes(table: SampleTable, path: str) -> SampleTable:
    """The images whose class a text file names, a class a line; lines that begin with ``#`` are remarks.

    Raises:
        InputError: The file cannot be read, names no class, or one that no image has.
    """
    wanted = _read_classes(path)
    if absent := sorted(wanted - set(table.class_names)):
        more = ", …" if len(absent) > 3 else ""
        raise InputError(
            f"{path}: {len(absent)} of its {len(wanted)} classes have no image in {table.source} "
            f"({', '.join(absent[:3])}{more})"
        )
    kept = [label for label, name in enumerate(table.class_names) if name in wanted]
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


def _read_classes(path: str) -> set[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; give a text file, a class a line") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); give a text file, a class a line") from error
    if not (names := {line for line in lines if line and not line.startswith("#")}):
        raise InputError(f"{path}: names no class; give a text file, a class a line")
    return names
