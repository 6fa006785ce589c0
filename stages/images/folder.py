"""Images on disk: a folder per class (nested or not), a flat folder, one file."""

import os
import stat
from collections.abc import Iterator

from stages.errors import InputError
from stages.images.table import FileRange, Sample, SampleTable, first_folder, is_image_name, make_table


def list_folder(source: str) -> SampleTable:
    """List the images under a folder; links are followed, hidden folders are not entered.

    The class of an image is its first folder below `source`; an image that lies directly in `source` has none.
    """
    root, samples, ignored = os.path.abspath(source), [], 0
    start_of_id = len(os.path.join(root, ""))
    for path in _files(root, ()):
        sample_id = path[start_of_id:]
        if not is_image_name(sample_id) or (sample := file_sample(sample_id, path, first_folder(sample_id))) is None:
            ignored += 1
        else:
            samples.append(sample)
    return make_table(source, samples, ignored)


def list_file(source: str) -> SampleTable:
    """List one image file: a table of one row without a class."""
    sample = file_sample(os.path.basename(source), os.path.abspath(source), None)
    return make_table(source, [] if sample is None else [sample])


def file_sample(sample_id: str, path: str, class_name: str | None) -> Sample | None:
    """Sample of a file, or None for what is no regular file.

    A file that cannot be looked at (a broken link, say) is a sample as well: reading it fails, and is then recorded.
    """
    try:
        now = os.stat(path)
    except OSError:
        return Sample(sample_id, class_name, 0, 0, FileRange(path))
    if not stat.S_ISREG(now.st_mode):
        return None
    return Sample(sample_id, class_name, now.st_size, now.st_mtime_ns, FileRange(path))


def _files(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    try:
        here = os.stat(folder)
        inode = (here.st_dev, here.st_ino)
        if inode in above:  # a link back to a folder that is being walked
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if not _is_folder(entry):
                    yield entry.path
                elif not entry.name.startswith("."):
                    yield from _files(entry.path, (*above, inode))
    except OSError as error:
        raise InputError(f"{error.filename or folder}: the folder cannot be listed: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
