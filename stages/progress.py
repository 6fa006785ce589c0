"""How a stage says how far it is, without knowing who listens: a terminal, a log file, a notebook or nobody."""

from typing import Protocol


class Progress(Protocol):
    """What a stage calls while it works; one task at a time, a new ``start`` ends the one before."""

    def start(self, total: int, unit: str, description: str, after_s: float = 0.0) -> None:
        """Begin a task of ``total`` units (``unit``: singular, such as ``image``); shown once it takes ``after_s``."""

    def advance(self, n: int = 1, **fields: object) -> None:
        """Count ``n`` more units as done; fields (``failures``, ``loss``, …) are shown as last given."""

    def note(self, line: str) -> None:
        """Say one line that stays."""

    def close(self) -> None:
        """End the task."""


class NullProgress:
    """Nobody listens: the default of every stage."""

    def start(self, total: int, unit: str, description: str, after_s: float = 0.0) -> None:
        """Do nothing."""

    def advance(self, n: int = 1, **fields: object) -> None:
        """Do nothing."""

    def note(self, line: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


SILENT: Progress = NullProgress()
MOMENT = 2.0  # seconds; what takes no longer in most studies is shown in the others alone
