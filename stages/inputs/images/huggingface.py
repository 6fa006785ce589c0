"""A folder that `datasets.Dataset.save_to_disk` wrote: Arrow files with the images' own bytes in them.

The library says what the columns mean and which files hold them. Where each image lies in these is found once, while
listing; after that it is a range of bytes of a file, as in a tar, and reading it needs neither the library nor a map
of the file into memory, which would kill the process if the file became shorter.
"""

import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stages.errors import InputError
from stages.inputs.images.columns import USUAL, Columns
from stages.inputs.images.decode import short
from stages.inputs.images.folder import file_sample
from stages.inputs.images.names import given_class
from stages.inputs.images.table import FileRange, Sample, SampleTable, Unusable, make_table

if TYPE_CHECKING:
    import pyarrow as pa

_MARKS = ("state.json", "dataset_info.json")  # a Dataset on disk; a DatasetDict has _SPLITS and a folder per split
_SPLITS = "dataset_dict.json"
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


class _Row(NamedTuple):
    place: FileRange | None  # None: not stored as bytes
    path: str | None
    label: int | str | None


def is_huggingface(folder: str) -> bool:
    """Whether `save_to_disk` of a `Dataset` or of a `DatasetDict` wrote a folder."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in _MARKS) or os.path.isfile(
        os.path.join(folder, _SPLITS)
    )


def list_huggingface(source: str, columns: Columns = USUAL) -> SampleTable:
    """List a Hugging Face dataset on disk. An id is the number of the row, and the name of its file where it has one.

    Images come from the one column of type `Image`, classes from the one of type `ClassLabel` (of several, `label`),
    or else from a column of names or whole numbers with a usual name, or both from the columns that are named. An
    image stored by its path is read from there; a relative path starts at the folder. Images stored as bytes are dated
    by the Arrow files.

    Raises:
        InputError: The library is missing, the folder holds several splits, its files are damaged, or it is not clear
            which column holds the images or the classes.
    """
    import pyarrow as pa

    folder = os.path.abspath(source)
    if not all(os.path.isfile(os.path.join(folder, name)) for name in _MARKS):
        raise InputError(f"{source}: a dataset of several splits; give {_splits(source, folder)}")
    features, files = _open(source, folder)
    image_column = _image_column(source, features, columns)
    label_column, names, notes = _label_column(source, features, columns)
    samples: list[Sample] = []
    try:
        mtime_ns = max((os.stat(file).st_mtime_ns for file in files), default=0)
        for file in files:
            for row in _rows(file, image_column, label_column):
                class_name = _class_name(source, len(samples), row.label, names)
                samples.append(_sample(len(samples), row, class_name, folder, mtime_ns))
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
        raise _damaged(source, error) from error
    if not samples:
        raise InputError(f"{source}: the dataset has no rows")
    return make_table(source, samples, notes=notes)


def _open(source: str, folder: str) -> tuple[dict[str, Any], list[str]]:
    """Features and Arrow files of a dataset, as the library reads them."""
    try:
        import datasets  # here and below, since it takes a second and may not be installed
    except ImportError as error:
        raise InputError(f"{source} is a Hugging Face dataset: pip install 'mofe-feature-cache[hf]'") from error
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_from_disk(folder, keep_in_memory=False)
    except Exception as error:  # the library has no error of its own for damaged files
        raise _damaged(source, error) from error
    finally:
        if had_bars:
            datasets.enable_progress_bars()
    return dict(dataset.features), [file["filename"] for file in dataset.cache_files]


def _damaged(source: str, error: Exception) -> InputError:
    return InputError(f"{source}: the Hugging Face dataset cannot be read: {short(error)}; copy or save it again")


def _splits(source: str, folder: str) -> str:
    try:
        with open(os.path.join(folder, _SPLITS), encoding="utf-8") as file:
            splits = json.load(file)["splits"]
        return " or ".join(os.path.join(source, split) for split in splits)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(source, error) from error


def _image_column(source: str, features: dict[str, Any], columns: Columns) -> str:
    from datasets import Image

    found = [name for name, feature in features.items() if isinstance(feature, Image)]
    if columns.path is not None:
        named = str(columns.find_path(source, features))
        if named not in found:
            raise InputError(f"{source}: path_column {named!r} is {features[named]}, must be of type Image")
        return named
    if len(found) != 1:
        what = f"several columns of images, {', '.join(found)}" if found else "no column of type Image"
        raise InputError(f"{source}: {what} (of {', '.join(features)}); give path_column, or save it with one")
    return found[0]


def _label_column(
    source: str, features: dict[str, Any], columns: Columns
) -> tuple[str | None, list[str] | None, tuple[str, ...]]:
    """Column of the classes, if any, their names, if the dataset gives any, and what is to be said of the choice."""
    from datasets import ClassLabel

    if columns.label is not None:
        column = str(columns.find_label(source, features))
        if isinstance(features[column], ClassLabel):
            return column, features[column].names, ()
        if not _is_plain(features[column]):
            raise InputError(
                f"{source}: label_column {column!r} is {features[column]}, must be a ClassLabel, names or whole numbers"
            )
        return column, None, ()
    named = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if len(named) > 1 and "label" not in named:
        raise InputError(f"{source}: several columns of classes, {', '.join(named)}: label_column says which counts")
    if named:
        column = "label" if "label" in named else named[0]
        return column, features[column].names, ()
    plain = [name for name, feature in features.items() if _is_plain(feature)]
    return columns.find_label(source, plain), None, columns.notes(source, labels=plain)


def _is_plain(feature: Any) -> bool:
    """Whether a column holds names or whole numbers."""
    return str(getattr(feature, "dtype", "")).removeprefix("u").removeprefix("large_").startswith(("int", "string"))


def _class_name(source: str, row: int, label: int | str | None, names: list[str] | None) -> str | None:
    if names is None or label is None:
        return None if label is None else given_class(str(label))
    if label not in range(-1, len(names)):
        raise InputError(
            f"{source}: row {row} is of class {label}, must be -1 or the number of one of its {len(names)} classes"
        )
    return None if label == -1 else names[int(label)]


def _rows(path: str, image_column: str, label_column: str | None) -> Iterator[_Row]:
    """Rows of an Arrow file; the images are not touched."""
    import pyarrow as pa

    with pa.memory_map(path) as file:
        damaged = pa.ArrowInvalid(f"{os.path.basename(path)} and its data do not end together")
        if file.read_at(len(_END), max(file.size() - len(_END), 0)) != _END:
            raise damaged
        start_of_file = file.read_buffer(1).address
        file.seek(0)
        for batch in pa.ipc.open_stream(file):
            images = batch.column(image_column)
            images.validate(full=True)  # offsets that point elsewhere would be followed
            stored, paths = (images.flatten()[images.type.get_field_index(name)] for name in ("bytes", "path"))
            labels = batch.column(label_column).to_pylist() if label_column else [None] * len(batch)
            starts, sizes = _spans(stored, start_of_file, file.size())
            for has_bytes, start, size, stored_path, label in zip(
                stored.is_valid().to_pylist(), starts, sizes, paths.to_pylist(), labels, strict=True
            ):
                yield _Row(FileRange(path, start, size) if has_bytes else None, stored_path, label)
        if file.tell() != file.size():  # Arrow takes some damage for the end
            raise damaged


def _spans(stored: "pa.BinaryArray", start_of_file: int, file_size: int) -> tuple[list[int], list[int]]:
    """Where in the file each value of a mapped array starts, and how long it is."""
    import pyarrow as pa

    _, offsets, values = stored.buffers()
    if values is None or not values.size:  # nothing but nulls and empty ones
        return [0] * len(stored), [0] * len(stored)
    bounds = np.frombuffer(offsets, np.int32)[stored.offset : stored.offset + len(stored) + 1].astype(np.int64)
    starts = bounds + (values.address - start_of_file)
    if starts[0] < 0 or starts[-1] > file_size:
        raise pa.ArrowInvalid("its buffers are compressed")
    return starts[:-1].tolist(), np.diff(bounds).tolist()


def _sample(row_number: int, row: _Row, class_name: str | None, folder: str, mtime_ns: int) -> Sample:
    base = (row.path or "").partition("::")[0].rpartition("/")[2]  # "zip://cats/1.jpg::archive.zip" is 1.jpg
    sample_id = f"{row_number:08d}/{base}" if base else f"{row_number:08d}"
    if row.place is not None:
        return Sample(sample_id, class_name, row.place.size or 0, mtime_ns, row.place)
    if row.path is None:
        return Sample(sample_id, class_name, 0, mtime_ns, Unusable("the row has no image"))
    if "://" in row.path:
        return Sample(sample_id, class_name, 0, mtime_ns, Unusable(f"stored elsewhere, at {row.path!r}"[:120]))
    path = os.path.join(folder, row.path)
    return file_sample(sample_id, path, class_name) or Sample(sample_id, class_name, 0, 0, FileRange(path))
