"""Classes beside the images of a tar, as WebDataset has them: files with the same key.

    file      what it gives
    .cls      the class
    .json     the class, in the field that `Columns` finds
    .txt      the class where nothing else gives one (no .cls, no .json, no folder) and every image has a whole number
              there; otherwise it is a caption, as img2dataset writes it

An image takes the file of its own full stem (`22.05.cls` for `22.05.jpg`), else of its key (`22.cls`). A given
`label_column` is a field of the sample, as in WebDataset: a file of that extension (`cls`, `txt`, …), or a field of the
.json.
"""

import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

from stages.errors import InputError
from stages.inputs.images.columns import Columns
from stages.inputs.images.names import given_class, listed, shown
from stages.inputs.images.table import Content, FileRange

_CLASS, _RECORD, _TEXT = ".cls", ".json", ".txt"
_WHOLE_NUMBER = re.compile(rb"\s*(-1|\d{1,18})\s*")
_SMALL = 1 << 20  # bytes


def key_of(name: str) -> str:
    """Key of a WebDataset sample: up to the first dot of the file name (`webdataset.tariterators.base_plus_ext`).

    >>> key_of("a.b/0001.left.jpg")
    'a.b/0001'
    """
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def keys_apart(names: Iterable[str]) -> list[str]:
    """Keys that stand twice among the members of a tar in their order: files of another key are between theirs.

    >>> keys_apart(["1.jpg", "1.cls", "2.jpg", "1.png"])
    ['1']
    """
    seen, apart, last = set[str](), dict[str, None](), None
    for name in names:
        if (key := key_of(name)) != last:
            if key in seen:
                apart[key] = None
            seen.add(key)
            last = key
    return list(apart)


class SideFiles:
    """The files of one tar that may give a class to its images."""

    def __init__(self, path: str, file: IO[bytes], files: Mapping[str, Content], columns: Columns) -> None:
        """Look through the names.

        Args:
            path: The tar, as messages call it.
            file: The same, open.
            files: What it holds, by name.
            columns: Which field of a sample is its class.
        """
        self.used: set[str] = set()  # those that gave a class
        self.used_for_numbers: set[str] = set()  # .txt files, where all are numbers
        self.notes: list[str] = []
        self._path, self._file, self._files, self._columns = path, file, files, columns
        self._suffixes = (_CLASS if columns.label is None else f".{columns.label.lower()}", _RECORD)
        self._index: dict[str, dict[str, str]] = {suffix: {} for suffix in (*self._suffixes, _TEXT)}
        self._chosen: dict[tuple[str, ...], str | None] = {}  # field that is the class, by the fields of a record
        self._fill_index()

    def classes(self, images: Iterable[str]) -> dict[str, str | None]:
        """Class of every image that has one beside it; None where the file says that it is unknown.

        Raises:
            InputError: A file beside an image cannot be read, has no field `label_column`, or gives as a class what is
                no name and no whole number.
        """
        classes = {}
        for image in images:
            for member in self._beside(image, self._suffixes):
                if (label := self._label(member)) is not None:
                    classes[image] = given_class(label)
                    self.used.add(member)
                    break
        return classes

    def numbers(self, images: Iterable[str]) -> dict[str, str | None]:
        """Class of every image as its `.txt` says it, or nothing if that of any image is no whole number."""
        classes, used = dict[str, str | None](), set[str]()
        for image in images:
            member = next(self._beside(image, (_TEXT,)), None)
            if member is None or not (match := _WHOLE_NUMBER.fullmatch(self._bytes(member))):
                return {}
            classes[image] = given_class(match[1].decode())
            used.add(member)
        self.used_for_numbers = used
        return classes

    def _fill_index(self) -> None:
        twice: list[str] = []
        for name in self._files:
            lower = name.lower()
            for suffix, by_stem in self._index.items():
                if lower.endswith(suffix):
                    stem = name[: -len(suffix)]
                    if stem in by_stem:
                        twice.append(f"{shown(by_stem[stem])} and {shown(name)}")
                    by_stem[stem] = name
        if twice:
            self.notes.append(
                f"{self._path}: files that stand there twice but for capitals, the later counts: {listed(twice)}"
            )

    def _beside(self, image: str, suffixes: Iterable[str]) -> Iterator[str]:
        """Members that may give the class of an image, those that count first in front."""
        for stem in dict.fromkeys((posixpath.splitext(image)[0], key_of(image))):
            for suffix in suffixes:
                if member := self._index[suffix].get(stem):
                    yield member

    def _label(self, member: str) -> str | None:
        """Class that a file gives, or None if it gives none."""
        try:
            text = self._bytes(member).decode("utf-8-sig")
            if not member.lower().endswith(_RECORD):
                return text
            record = json.loads(text)
        except (InputError, ValueError, RecursionError) as error:
            raise InputError(f"{self._path}: {member}: the class cannot be read: {error}") from error
        return self._field(member, record) if isinstance(record, dict) else None

    def _field(self, member: str, record: dict[str, Any]) -> str | None:
        names = tuple(record)
        if names not in self._chosen:
            where = f"{self._path}: {member}"
            self._chosen[names] = self._columns.find_label(where, names)
            if len(self._chosen) == 1:
                self.notes += self._columns.notes(where, labels=names)
        name = self._chosen[names]
        label = None if name is None else record[name]
        if label is not None and type(label) not in (int, str) and not _is_whole(label):
            raise InputError(f"{self._path}: {member}: the class is {label!r}, must be a name or a whole number")
        return None if label is None else str(label)

    def _bytes(self, member: str) -> bytes:
        content = self._files[member]
        if isinstance(content, FileRange) and content.size is not None and content.size <= _SMALL:
            self._file.seek(content.offset)  # a million of them: opened once
            return self._file.read(content.size)
        return content.read()


def _is_whole(label: Any) -> bool:
    return isinstance(label, float) and label.is_integer()
