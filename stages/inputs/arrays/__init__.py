"""Features that were computed elsewhere: arrays in a file, read some rows at a time and never held whole.

    source               what it holds                                                               file
    mine.npz             an array for each key; not compressed, it is read in place, else from       numpy_files.py
                         front to back
    mine.npy             ``cls``; the other keys stand beside it, in ``mine.label.npy``, …           numpy_files.py
    mine.parquet         a column for each key; arrays as lists of one length, nested for tokens     parquet.py
    mine.h5, .hdf5       a dataset for each key, those of groups as ``group/key``                    hdf5.py
    mine.pt, .pth        a dictionary of tensors, or one tensor, which is ``cls``                    torch_files.py
    mine.safetensors     a tensor for each key                                                       torch_files.py
    a folder, a pattern  several of them, which are the parts of one set; clip-retrieval's output    parts.py

The keys, of n rows: ``cls`` [n, D]; where they are known ``label`` [n] (class names, or class numbers from 0; −1:
unknown), ``id`` [n] text (the row's number where there is none), ``logits`` [n, C] (column c is class number c, or the
class that is named), and the tokens that enter the last blocks of the network, as `stages.networks.tokens.Tokens` has
them: ``tap_cls`` [n, D'], ``registers`` [n, R, D'], ``patches`` [n, P, D'] or [n, h, w, D']. ``taps`` are vectors
after L blocks or stages, [n, L, D], or class token and mean patch of each, [n, L, 2, D]. What is called otherwise is
left out, unless it is named. bfloat16 is read as float32. Nothing in a file is ever run: no pickled objects.
"""

import difflib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.errors import InputError
from stages.inputs.arrays.columns import ArrayFile, Column, FromBFloat16, InParts
from stages.inputs.arrays.parts import ARRAY_SUFFIXES, is_glob, open_parts
from stages.inputs.arrays.table import (
    ARRAY_SEMANTICS,
    FEATURES,
    KEYS,
    ArrayTable,
    RowsOf,
    row_bytes,
)
from stages.inputs.images.classes import read_classes
from stages.inputs.images.names import beyond_classes, class_texts, listed, number_classes, shown, storable, tidy
from stages.inputs.images.table import SampleTable

__all__ = [
    "ARRAY_SEMANTICS",
    "ARRAY_SUFFIXES",
    "FEATURES",
    "KEYS",
    "ArrayTable",
    "is_glob",
    "list_arrays",
    "row_bytes",
]

_AXES = {"cls": (2,), "tap_cls": (2,), "registers": (3,), "patches": (3, 4), "logits": (2,), "taps": (3, 4)}
_MOST_NAMES = 12  # that a message shows of those that are there
_NEAR = 0.9  # names that are more alike than this are one word, misspelt or in another number


def list_arrays(
    path: str, columns: Mapping[str, str] | None = None, classes: str | Sequence[str] | None = None
) -> ArrayTable:
    """Look at features in a file or in several: shapes, labels and ids; features themselves are not read yet.

    Args:
        path: of a file that ends in one of `ARRAY_SUFFIXES`, of a folder of such files, or a pattern of their names.
        columns: what keys are called in the file, where it is not as they are.
        classes: names of the columns of ``logits``, and of the numbers in ``label``, or a text file of them.

    Raises:
        InputError: the file or ``cls`` is missing, a key of another shape, number of rows or type, or holds Python
            objects, a label or an id is none, or parts do not go together.
    """
    parts, notes = open_parts(path)
    names, left_out = _choose(path, parts[0], columns)
    read = [_columns(part, names, parts[0].paths[0]) for part in parts]
    _check_parts(read, parts)
    found = read[0] if len(read) == 1 else {key: InParts([part[key] for part in read]) for key in names}
    features = {name: found[name] for name in FEATURES if name in found}
    n = features["cls"].shape[0]
    named = _class_list(path, classes, features.get("logits"))
    labels = found["label"].read(0, n) if "label" in found else np.full(n, None)
    numbered = number_classes(path, _named_labels(path, labels, named))
    ids, more = _ids(path, found, n, soft=bool(parts[0].soft) and names.get("id") == parts[0].soft.get("id"))
    notes += tuple(_left_out_note(path, left_out) + _widened_note(path, read[0]) + more)
    times = [np.full(part["cls"].shape[0], _mtime_ns(file)) for part, file in zip(read, parts, strict=True)]
    samples = SampleTable(
        source=path,
        ids=ids,
        labels=numbered.labels,
        class_names=numbered.names,
        sizes=np.full(n, sum(prod(column.shape[1:]) * column.dtype.itemsize for column in features.values()), np.int64),
        mtimes_ns=np.concatenate(times),
        left_out={},
        contents=RowsOf(features, range(n)),
        notes=(*notes, *numbered.notes),
    )
    files = tuple(str(file) for part in parts for file in part.paths)
    return ArrayTable(path, features, samples, named if "logits" in features else (), files)


def _left_out_note(path: str, names: Sequence[str]) -> list[str]:
    return [f"{path}: left out: {listed(list(map(shown, names)))}: columns that no key names"] if names else []


def _widened_note(path: str, columns: Mapping[str, Column]) -> list[str]:
    keys = [key for key, column in columns.items() if isinstance(column, FromBFloat16)]
    return [f"{path}: {', '.join(keys)}: bfloat16 is stored as float32"] if keys else []


def _choose(path: str, file: ArrayFile, columns: Mapping[str, str] | None) -> tuple[dict[str, str], list[str]]:
    """What each key is called in a file, and the columns that are none."""
    given, there = columns or {}, file.arrays
    known = listed(list(there), most=_MOST_NAMES)
    for key, name in given.items():
        if key not in KEYS:
            raise InputError(f"{path}: columns: {key!r} is not a key (known: {', '.join(KEYS)})")
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{path}: columns.{key}: {name!r} is not there{hint} (it has {known})")
    rest = [name for name in there if name not in given.values()]
    names = {key: key for key in KEYS if key in rest and key not in given}
    names |= {key: name for key, name in file.soft.items() if name in rest and key not in names | dict(given)}
    names = {key: (names | dict(given))[key] for key in KEYS if key in names | dict(given)}
    if "cls" not in names:
        raise InputError(
            f"{path}: 'cls' is missing: the features of n rows, [n, D] (it has {known}); "
            'columns = { cls = "…" } says what they are called'
        )
    left_out = [name for name in there if name not in names.values()]
    for name in left_out if columns is None else []:
        word = name.strip().casefold()
        if near := difflib.get_close_matches(word, [key for key in KEYS if key not in names], n=1, cutoff=_NEAR):
            raise InputError(
                f"{path}: {name!r} is not a known key; did you mean {near[0]!r}? Say so by columns = "
                f'{{ {near[0]} = "{name}" }}, or leave it out by columns = {{ cls = "{names["cls"]}" }}'
            )
    return names, left_out


def _columns(part: ArrayFile, names: Mapping[str, str], first: str) -> dict[str, Column]:
    """The columns of one part, as long as one another and, but for their rows, of the shape of the first part's."""
    path = part.paths[0]
    if absent := [name for name in names.values() if name not in part.arrays]:
        raise InputError(f"{path}: has no {absent[0]!r}, which {first} has: parts of one set have the same columns")
    found = {key: part.arrays[name](key) for key, name in names.items()}
    _check_features(path, {name: found[name] for name in FEATURES if name in found})
    n = found["cls"].shape[0]
    for key in ("label", "id"):
        if key in found and found[key].shape != (n,):
            raise InputError(f"{path}: {key} has shape {found[key].shape}, must be ({n},) as cls has {n} rows")
    return found


def _check_parts(parts: Sequence[Mapping[str, Column]], files: Sequence[ArrayFile]) -> None:
    first = {key: column.shape[1:] for key, column in parts[0].items()}
    for part, file in zip(parts, files, strict=True):
        for key, column in part.items():
            if column.shape[1:] != first[key]:
                raise InputError(
                    f"{file.paths[0]}: {key} has rows of shape {column.shape[1:]}, in {files[0].paths[0]} "
                    f"{first[key]}: parts of one set have rows of one shape"
                )


def _check_features(path: str, columns: Mapping[str, Column]) -> None:
    n = columns["cls"].shape[0] if columns["cls"].shape else 0
    for name, column in columns.items():
        if len(column.shape) not in _AXES[name] or not all(column.shape[1:]):
            axes = " or ".join(str(axes) for axes in _AXES[name])
            raise InputError(f"{path}: {name} has shape {column.shape}, must have {axes} axes, none of length 0")
        if column.shape[0] != n:
            raise InputError(f"{path}: {name} has {column.shape[0]} rows, cls has {n}")
        if column.dtype.kind != "f" or column.dtype.itemsize > 8:
            hint = ": numpy knows no bfloat16, save float32" if column.dtype.str.endswith("V2") else ""
            raise InputError(f"{path}: {name} is {column.dtype}, must be float16, float32 or float64{hint}")
    if not n:
        raise InputError(f"{path}: cls has no rows")
    if "taps" in columns and len(shape := columns["taps"].shape) == 4 and shape[2] != 2:
        raise InputError(f"{path}: taps has shape {shape}, must be [n, L, D] or [n, L, 2, D] (class token, mean patch)")
    tokens = [name for name in ("tap_cls", "registers", "patches") if name in columns]
    if tokens and "tap_cls" not in tokens:
        raise InputError(f"{path}: has {tokens[0]}, but no tap_cls: give the class token that stands before them")
    if len({columns[name].shape[-1] for name in tokens}) > 1:
        shapes = ", ".join(f"{name} {columns[name].shape}" for name in tokens)
        raise InputError(f"{path}: tokens of one network have one length: {shapes}")


def _class_list(path: str, classes: str | Sequence[str] | None, logits: Column | None) -> tuple[str, ...]:
    names = read_classes(classes) if isinstance(classes, str) else tuple(classes or ())
    if twice := [name for name, n in Counter(map(tidy, names)).items() if n > 1]:
        raise InputError(f"{path}: classes names {shown(twice[0])} twice: each column of logits has a class of its own")
    if names and logits is not None and len(names) != logits.shape[1]:
        raise InputError(
            f"{path}: logits have {logits.shape[1]} columns, classes names {len(names)}: name each, in their order"
        )
    return names


def _named_labels(path: str, labels: NDArray[Any], named: Sequence[str]) -> list[str | None]:
    """Class of each row; numbers are those of the named classes, where there are any."""
    texts = class_texts(path, labels)
    if not named or any(isinstance(label, str | bytes) for label in labels.tolist()):
        return texts
    numbers = np.array([-1 if text is None else int(text) for text in texts], np.int64)
    if (numbers >= len(named)).any():
        raise beyond_classes(path, numbers, len(named), "classes", "classes names")
    return [None if number < 0 else named[number] for number in numbers.tolist()]


def _ids(path: str, found: Mapping[str, Column], n: int, soft: bool) -> tuple[tuple[str, ...], list[str]]:
    """Names of the rows; their numbers where there are none, or where a tool's are not unique."""
    plain = tuple(map(str, range(n)))
    if "id" not in found:
        return plain, []
    texts = _texts(path, found["id"].read(0, n))
    seen: dict[str, int] = {}
    for row, text in enumerate(texts):
        if seen.setdefault(text, row) != row:
            if soft:
                twice = f"{shown(text)} is that of rows {seen[text]} and {row}"
                return plain, [f"{path}: rows are named by their numbers, not by their paths: {twice}"]
            raise InputError(f"{path}: id {text!r} stands in rows {seen[text]} and {row}: name every row once")
    return tuple(texts), []


def _texts(path: str, ids: NDArray[Any]) -> list[str]:
    if ids.dtype.kind not in "USiuO":
        raise InputError(f"{path}: id is {ids.dtype}, must be text")
    texts = []
    for row, value in enumerate(ids.tolist()):
        try:
            text = value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: id of row {row} is not text in UTF-8") from error
        if text is None or text == "":
            raise InputError(f"{path}: id of row {row} is empty")
        if type(text) not in (str, int):
            raise InputError(f"{path}: id of row {row} is {text!r}, must be text")
        texts.append(storable(str(text)))
    return texts


def _mtime_ns(file: ArrayFile) -> int:
    return max(os.stat(path).st_mtime_ns for path in file.paths)
