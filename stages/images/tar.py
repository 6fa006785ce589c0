"""Images in an uncompressed tar: a tree of folders, flat, or WebDataset pairs.

The headers are read once, while listing; after that every image is a range of bytes of the tar, read without tarfile.
"""

import json
import os
import posixpath
import tarfile
from collections import Counter

from stages.errors import InputError
from stages.images.columns import USUAL, Columns
from stages.images.kind import extension, is_hidden, is_image
from stages.images.names import given_class
from stages.images.table import FileRange, Sample, SampleTable, first_folder, make_table

_LABEL_SUFFIXES = (".cls", ".json")  # first found wins


def list_tar(source: str, columns: Columns = USUAL) -> SampleTable:
    """List the images of a tar. Members are dated by the tar: what their headers say need not change when they do.

    If any image has its class beside it (`key.cls`, or a field of `key.json`, see `Columns`), classes come from there
    alone (WebDataset); otherwise the class of an image is its first folder.

    Raises:
        InputError: No uncompressed tar, damaged, or a class beside an image cannot be read.
    """
    path = os.path.abspath(source)
    members = {name: place for name, place in _members(path).items() if not is_hidden(name)}
    images = [name for name, place in members.items() if is_image(name, place.head)]
    beside: dict[str, str | None] = {}
    label_files = set()
    for key in {_key(name) for name in images}:
        for member in (key + suffix for suffix in _LABEL_SUFFIXES):
            if member in members and (label := _label(source, member, members[member], columns)) is not None:
                beside[key] = given_class(label)
                label_files.add(member)
                break
    mtime_ns = os.stat(path).st_mtime_ns
    samples = []
    for name in images:
        place = members[name]
        class_name = beside.get(_key(name)) if beside else first_folder(name)
        samples.append(Sample(name, class_name, place.size or 0, mtime_ns, place))
    others = members.keys() - label_files - set(images)
    return make_table(source, samples, Counter(map(extension, others)))


def _members(path: str) -> dict[str, FileRange]:
    """Place of every regular file by name; of two with one name the later counts, as when the tar is unpacked."""
    places: dict[str, FileRange] = {}
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined] # tarfile keeps them all; there may be a million
                name = _name(member.name)
                if member.size < 0:  # would be walked in circles
                    raise tarfile.ReadError("a negative size")
                if member.islnk() and (target := places.get(_name(member.linkname))):
                    places[name] = target
                elif member.isreg() and not member.issparse():
                    places[name] = FileRange(path, member.offset_data, member.size)
            end = tar.offset
        with open(path, "rb") as file:  # tarfile takes a damaged header for the end
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"a damaged header at byte {end}")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path}: not an uncompressed tar, or a damaged one: {error}; unpack or copy it again"
        ) from error
    return places


def _name(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _key(name: str) -> str:
    """Key of a WebDataset sample: up to the first dot of the file name.

    >>> _key("a.b/0001.left.jpg")
    'a.b/0001'
    """
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _label(source: str, member: str, place: FileRange, columns: Columns) -> str | None:
    """Class that a label file names, or None if it names none."""
    try:
        text = place.read().decode("utf-8")
        if member.endswith(".cls"):
            return text
        fields = json.loads(text)
    except (InputError, ValueError, RecursionError) as error:
        raise InputError(f"{source}: {member}: the class cannot be read: {error}") from error
    if not isinstance(fields, dict):
        return None
    name = columns.find_label(f"{source}: {member}", fields)
    label = None if name is None else fields[name]
    if label is not None and type(label) not in (int, str):
        raise InputError(f"{source}: {member}: the class is {label!r}, must be a name or a whole number")
    return None if label is None else str(label)
