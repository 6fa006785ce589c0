"""What the file of a detector is known by, before a part of it is read; importing it is light."""

import os
from pathlib import Path

from stages.files.archive import SealedArchive, is_zip

BUNDLE_KIND = "detector bundle"
BUNDLE_VERSION = 1

SUFFIX = ".ood"


def is_meant_as_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether a path is given as a detector's, whole or damaged: by its name, or by how the file begins or ends."""
    return Path(path).suffix.lower() == SUFFIX or is_zip(path)


def check_is_bundle(path: str | os.PathLike[str]) -> None:
    """Look at its manifest and its size, before work.

    Raises:
        InputError: no such file, another, of another version, or cut short.
    """
    SealedArchive(path, BUNDLE_KIND, BUNDLE_VERSION, compared=False)
