"""Checkpoints that a killed training goes on from: tensors and plain values, arriving whole or not at all.

A file ends in the SHA-256 of all before it, since torch does not notice a tensor whose bytes have changed.
"""

import hashlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cache.files import write_file

_DIGEST_BYTES = hashlib.sha256().digest_size


def load_checkpoint(path: Path, device: str = "cpu", say: Callable[[str], None] | None = None) -> dict[str, Any] | None:
    """Read a state onto a device, running no code in it; None where there is none.

    Args:
        path: of the file.
        device: where its tensors go.
        say: told of a file that is damaged, which counts as none.
    """
    if not path.is_file():
        return None
    try:
        content = memoryview(path.read_bytes())
        state, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if hashlib.sha256(state).digest() == digest:
            stored: dict[str, Any] = torch.load(io.BytesIO(state), weights_only=True, map_location=device)
            return stored
    except OSError:  # the disk does not give it
        pass
    if say is not None:
        say(f"{path} is damaged and counts as none: this training starts anew")
    return None


class Checkpoints:
    """Stores where a training is in one file, so seldom that this takes at most a few per cent of its time.

    Args:
        path: the file; its folder is made.
        train_per_store: seconds of training for each second of storing a checkpoint.
        most_lost: seconds of training after which an epoch that goes on is stored as well.
    """

    def __init__(self, path: Path, train_per_store: float = 30, most_lost: float = 60) -> None:
        self.path = path
        self._train_per_store, self._most_lost = train_per_store, most_lost
        self._prepared: io.BytesIO | None = None
        self._taken = 0.0  # seconds, for what is prepared
        self._stored = time.monotonic()
        self._next = 0.0

    @property
    def due(self) -> bool:
        """Whether enough time went into training since the last was stored."""
        return time.monotonic() >= self._next

    @property
    def overdue(self) -> bool:
        """Whether a kill would lose so much that the end of the epoch should not be waited for."""
        return self.due and time.monotonic() >= self._stored + self._most_lost

    def save(self, state: dict[str, Any]) -> None:
        """Store a state of tensors and plain values in place of the one before."""
        self.prepare(state)
        self.commit()

    def prepare(self, state: dict[str, Any]) -> None:
        """Take a state as it is now, to be stored by `commit`; in place of one that was not."""
        started = time.monotonic()
        self._prepared = io.BytesIO()
        torch.save(state, self._prepared)
        self._prepared.write(hashlib.sha256(self._prepared.getbuffer()).digest())
        self._taken = time.monotonic() - started

    def commit(self) -> None:
        """Store what was prepared, if anything was."""
        if self._prepared is None:
            return
        started = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, self._prepared.getbuffer())
        self._prepared = None
        self._stored = time.monotonic()
        self._next = self._stored + self._train_per_store * (self._taken + self._stored - started)
