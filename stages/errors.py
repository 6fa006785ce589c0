"""Errors of the stages.

StageError                 a stage failed (exit status 1)
├── InputError             what the user gave is wrong (exit status 2)
│   ├── NotFiniteError     rows hold NaN or inf
│   └── stages.inputs.images.ImageError   one image cannot be used; listed, never raised to the user
└── PeerLostError          another of several processes has ended, and says why
"""

from collections.abc import Iterator
from contextlib import contextmanager


class StageError(Exception):
    """A stage could not do its work; what it had finished is kept."""


class InputError(StageError):
    """What the user gave cannot be used; the message says what, where and what to do."""


class NotFiniteError(InputError):
    """Some of the rows hold NaN or inf."""


class PeerLostError(StageError):
    """One of the processes that work together has ended; it, not this one, knows why."""


@contextmanager
def reading(path: str, *unreadable: type[Exception]) -> Iterator[None]:
    """Turn what a library makes of a bad file into one line.

    Args:
        path: of the file.
        unreadable: what the library raises.

    Raises:
        InputError: it was raised.
    """
    try:
        yield
    except InputError:
        raise
    except unreadable as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: cannot be read: {reason}") from error
