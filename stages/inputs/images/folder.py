"""Images on disk or in a store: a folder per class (nested or not), a flat folder, one file."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from cache import RemotePath, is_remote, read_ranges
from stages.errors import InputError
from stages.inputs.images.kind import (
    EMPTY,
    HEAD_BYTES,
    SPECIAL,
    extension,
    is_hidden,
    is_image,
    is_image_head,
    is_image_name,
)
from stages.inputs.images.opening import absolute, file_stat, files_below, is_regular
from stages.inputs.images.table import FileRange, Sample, SampleTable, first_folder, make_table

_HEADS_AT_ONCE = 1000  # first bytes of objects that are asked for together


class Files(NamedTuple):
    """What lies below a folder."""

    samples: list[Sample]  # the images
    others: list[str]  # other regular files, by their paths below it
    special: Counter[str]  # how many pipes and devices, as `stages.inputs.images.kind` calls them
    folders: frozenset[str] = frozenset()  # names of those of the first level

    def table(self, source: str) -> SampleTable:
        """The images as a table.

        Raises:
            InputError: There is none.
        """
        classes = {first_folder(sample.id) for sample in self.samples}
        empty = set() if None in classes else self.folders.difference(classes)
        left_out = Counter(map(extension, self.others)) + self.special + Counter({EMPTY: len(empty)})
        return make_table(source, self.samples, left_out)


def find_files(source: str) -> Files:
    """Find the files under a folder; what counts as an image, and what is hidden, `stages.inputs.images.kind` says.

    Links are followed: one to a file is that file, and one back to a folder above it ends there. The class of an image
    is its first folder below `source`; an image that lies directly in `source` has none.

    A file that cannot be looked at (a broken link, say) is an image as well, whatever its name: reading it fails, and
    is then recorded.
    """
    if is_remote(source):
        return _find_objects(absolute(source))
    root = os.path.abspath(source)
    files = Files([], [], Counter(), _folders(root))
    start_of_id = len(os.path.join(root, ""))
    for path in _files(root):
        sample_id = path[start_of_id:]
        sample = file_sample(sample_id, path, first_folder(sample_id))
        if sample is None:
            files.special[SPECIAL] += 1
        elif _is_image(path):
            files.samples.append(sample)
        else:
            files.others.append(sample_id)
    return files


def list_file(source: str) -> SampleTable:
    """List one image file: a table of one row without a class."""
    sample = file_sample(os.path.basename(source), absolute(source), None)
    return make_table(source, [] if sample is None else [sample])


def is_image_file(path: str) -> bool:
    """Whether a path leads to a regular file that is an image by its name or its first bytes."""
    return is_regular(path) and _is_image(path)


def file_sample(sample_id: str, path: str, class_name: str | None) -> Sample | None:
    """Sample of a file, or None for what is no regular file.

    A file that cannot be looked at (a broken link, say) is a sample as well: reading it fails, and is then recorded.
    """
    try:
        now = file_stat(path)
    except OSError:
        return Sample(sample_id, class_name, 0, 0, FileRange(path))
    if not now.is_regular:
        return None
    return Sample(sample_id, class_name, now.size, now.mtime_ns, FileRange(path))


def _is_image(path: str) -> bool:
    """Whether a file is an image, or cannot be opened to find out; it must not be a pipe."""
    try:
        return is_image(path, FileRange(path).head)
    except OSError:
        return True


def _find_objects(url: str) -> Files:
    """The same of a store; what does not say by its name that it is an image is asked for its first bytes."""
    files = Files([], [], Counter())
    found = {name: now for name, now in files_below(url).items() if not is_hidden(name)}
    unsaid = [name for name in found if not is_image_name(name)]
    heads: dict[str, bytes] = {}
    for start in range(0, len(unsaid), _HEADS_AT_ONCE):
        names = unsaid[start : start + _HEADS_AT_ONCE]
        stops = [HEAD_BYTES] * len(names)
        paths = [RemotePath(f"{url}/{name}") for name in names]
        heads |= zip(names, read_ranges(paths, [0] * len(names), stops), strict=True)
    for name, now in found.items():
        if name in heads and not is_image_head(heads[name]):
            files.others.append(name)
        else:
            content = FileRange(f"{url}/{name}", 0, now.size)
            files.samples.append(Sample(name, first_folder(name), now.size, now.mtime_ns, content))
    return files


def _files(root: str) -> Iterator[str]:
    """Paths of what is no folder, hidden ones left out, in any order."""
    folders: list[tuple[str, frozenset[tuple[int, int]]]] = [(root, frozenset())]  # and which folders it lies in
    while folders:
        folder, above = folders.pop()
        try:
            here = os.stat(folder)
            inode = (here.st_dev, here.st_ino)
            if inode in above:  # a link back to a folder that is being walked
                continue
            inside = above | {inode}
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not _is_folder(entry):
                        if not is_hidden(entry.name):
                            yield entry.path
                    elif not is_hidden(f"{entry.name}/"):
                        folders.append((entry.path, inside))
        except OSError as error:
            raise _unlisted(folder, error) from error


def _folders(root: str) -> frozenset[str]:
    """Names of what `_files` goes into first."""
    try:
        with os.scandir(root) as entries:
            return frozenset(own.name for own in entries if _is_folder(own) and not is_hidden(f"{own.name}/"))
    except OSError as error:
        raise _unlisted(root, error) from error


def _unlisted(folder: str, error: OSError) -> InputError:
    return InputError(f"{error.filename or folder}: the folder cannot be listed: {error.strerror}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
