"""A folder for what other processes are handed and give back, for as long as one piece of work takes.

::

    <folder>/.handed-<number>/
        rows.pickle          what they read: rows as plans, mapped arrays as their places (`stages.files.places`)
        ….safetensors        what they write
"""

import pickle
import shutil
import uuid
from pathlib import Path
from typing import Any

from cache.files import write_file
from stages.files.places import dumped


class HandedFolder:
    """On the disk that all workers see; what a killed one left in `folder` goes when the next begins."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute() / f".handed-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> "HandedFolder":
        for killed in self._folder.parent.glob(".handed-*"):
            shutil.rmtree(killed, ignore_errors=True)
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def path(self, name: str) -> str:
        """Of a file."""
        return str(self._folder / name)

    def file(self, name: str, content: object) -> str:
        """Write one, and say where it is."""
        path = self.path(f"{name}.pickle")
        write_file(Path(path), dumped(content))
        return path


def unpickled(path: str) -> Any:
    """What `HandedFolder.file` has written."""
    return pickle.loads(Path(path).read_bytes())
