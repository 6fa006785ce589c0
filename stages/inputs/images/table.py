"""What a source holds (`SampleTable`) and how its bytes are read (`ImageReader`)."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple, NoReturn, Protocol

import numpy as np

from cache import is_remote
from stages.errors import InputError
from stages.inputs.images.decode import ImageError
from stages.inputs.images.kind import HEAD_BYTES, IMAGE_SUFFIXES, describe_left_out
from stages.inputs.images.names import number_classes, storable
from stages.inputs.images.opening import file_stat, is_regular, read_part

MAX_FILE_BYTES = 2**30  # larger than any image within the limit on pixels needs, smaller than a worker's memory


class Content(Protocol):
    """Where the bytes of an image come from. Picklable: it is read in whatever process needs it."""

    def read(self) -> bytes:
        """Bytes of an image file; raises `ImageError` where they cannot be had."""


class FileRange(NamedTuple):
    """Bytes of a file: all of it, or one image among others, as in a tar."""

    path: str
    offset: int = 0
    size: int | None = None  # None: to the end

    def read(self) -> bytes:
        """Read the bytes; the file is opened here and now, so a range may travel to any process.

        Raises:
            ImageError: The file is gone, unreadable, too large or shorter than it was.
        """
        try:
            size = self.size
            if size is None or not is_remote(self.path):  # a store is not asked for what a tar's header said
                now = file_stat(self.path)
                if not now.is_regular:  # opening a pipe would wait for ever
                    raise ImageError("not a regular file")
                size = now.size if size is None else size
            if size > MAX_FILE_BYTES:
                raise ImageError(f"too large: more than {MAX_FILE_BYTES >> 20} MiB")
            data = self._read(-1 if self.size is None else self.size)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror}") from error
        if self.size is not None and len(data) != self.size:
            raise ImageError("truncated: the file ends before the image does")
        return data

    def head(self) -> bytes:
        """The first bytes, as many as tell an image, or all that there are; of a regular file, else it may wait.

        Raises:
            OSError: The file cannot be read.
        """
        return self._read(HEAD_BYTES if self.size is None else min(self.size, HEAD_BYTES))

    def _read(self, n_bytes: int) -> bytes:
        return read_part(self.path, self.offset, n_bytes)


class Unusable(NamedTuple):
    """An image that a source lists but does not have."""

    reason: str

    def read(self) -> NoReturn:
        """Raises `ImageError` with the reason."""
        raise ImageError(self.reason)


class Sample(NamedTuple):
    """One image as a source lists it."""

    id: str  # relative path, class folder included
    class_name: str | None  # as the source has it; None: unknown
    size: int
    mtime_ns: int
    content: Content | bytes


@dataclass(frozen=True)
class ImageReader:
    """Bytes of samples by index. Holds no open file: pickles, forks and threads are safe."""

    contents: Sequence[Content | bytes]

    def __len__(self) -> int:
        return len(self.contents)

    def read(self, i: int) -> bytes:
        """Bytes of sample `i`, exactly as stored; raises `ImageError` where they cannot be had."""
        content = self.contents[i]
        return content if isinstance(content, bytes) else content.read()


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The images of one source, sorted by the UTF-8 bytes of their ids; row i of every column is sample i."""

    source: str
    ids: tuple[str, ...]  # unique
    labels: np.ndarray  # [n] int32, index into class_names; -1: unknown
    class_names: tuple[str, ...]  # see stages.inputs.images.names.Classes
    # A size of -1 is unknown without reading the image: then neither says whether it changed, only its bytes do.
    sizes: np.ndarray  # [n] int64, bytes
    mtimes_ns: np.ndarray  # [n] int64; of the tar for its members, 0 for embedded images and where unknown
    left_out: Mapping[str, int]  # files seen that are no images, by extension; see `stages.inputs.images.kind`
    contents: Sequence[Content | bytes] = field(repr=False)
    notes: tuple[str, ...] = ()  # what was decided while listing, a line each

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int) -> "SampleTable":
        """Samples start … stop - 1 alone."""
        rows = slice(start, stop)
        columns = {name: getattr(self, name)[rows] for name in ("ids", "labels", "sizes", "mtimes_ns", "contents")}
        return replace(self, **columns)

    def take(self, rows: Iterable[int]) -> "SampleTable":
        """Some samples alone, by their numbers, in this order."""
        own = [int(row) for row in rows]
        return replace(
            self,
            ids=tuple(self.ids[row] for row in own),
            labels=self.labels[own],
            sizes=self.sizes[own],
            mtimes_ns=self.mtimes_ns[own],
            contents=[self.contents[row] for row in own],
        )

    def reader(self, start: int = 0, stop: int | None = None) -> ImageReader:
        """Reader of samples start … stop - 1, whose index 0 is `start`: a worker is sent only its part."""
        return ImageReader(self.contents[start:stop])


def make_table(
    source: str,
    samples: Iterable[Sample],
    left_out: Mapping[str, int] = MappingProxyType({}),
    notes: Sequence[str] = (),
) -> SampleTable:
    """Sort, check and number what a source listed.

    Args:
        source: What messages call it.
        samples: In any order.
        left_out: How many other files it holds, by `stages.inputs.images.kind.extension`.
        notes: What was decided while listing, a line each.

    Raises:
        InputError: There is no sample, or two have the same id.
    """
    # Code points and UTF-8 bytes sort alike.
    rows = sorted((sample._replace(id=storable(sample.id)) for sample in samples), key=lambda sample: sample.id)
    if not rows:
        others = f" ({describe_left_out(left_out)})" if left_out else ""
        raise InputError(
            f"{source}: no images found{others}; an image's name ends in {', '.join(sorted(IMAGE_SUFFIXES))}, or its "
            "first bytes are those of one"
        )
    for one, other in pairwise(rows):
        if one.id == other.id:
            raise InputError(f"{source}: {one.id!r} is listed twice; name every image once")
    classes = number_classes(source, [row.class_name for row in rows])
    return SampleTable(
        source=source,
        ids=tuple(row.id for row in rows),
        labels=classes.labels,
        class_names=classes.names,
        sizes=np.array([row.size for row in rows], np.int64),
        mtimes_ns=np.array([row.mtime_ns for row in rows], np.int64),
        left_out=dict(left_out),
        contents=tuple(row.content for row in rows),
        notes=(*notes, *classes.notes),
    )


def is_one_file(path: str, ids: Sequence[str]) -> bool:
    """Whether a path is an image file by itself, and no folder, tar or list of images, by the ids listed of it."""
    return tuple(ids) == (os.path.basename(path),) and is_regular(path)


def first_folder(sample_id: str) -> str | None:
    """Class of an image in a tree of folders.

    >>> first_folder("cat/black/1.jpg"), first_folder("1.jpg")
    ('cat', None)
    """
    folder, slash, _ = sample_id.partition("/")
    return folder if slash else None
