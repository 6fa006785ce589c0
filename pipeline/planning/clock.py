"""A listener that takes the time of what stages tell of their work, and can stop one that takes too long."""

import time
from collections import defaultdict
from dataclasses import dataclass


class EnoughError(Exception):
    """A task has taken as long as it may: what it did tells how long the rest would take."""


@dataclass
class Spent:
    """What tasks of one kind have taken.

    Attributes:
        total: units that there were to do: rows, images, …
        units: that were done.
        seconds: of the wall.
        starting: seconds of these until the first units were done.
        started: these units.
    """

    total: int = 0
    units: int = 0
    seconds: float = 0.0
    starting: float = 0.0
    started: int = 0

    @property
    def each(self) -> float:
        """Seconds of a unit, once it has started."""
        more = self.units - self.started
        return (self.seconds - self.starting) / more if more else self.seconds / max(1, self.units)

    @property
    def whole(self) -> float:
        """Seconds that all units would have taken."""
        return self.seconds + (self.total - self.units) * self.each


class Clock:
    """A `stages.progress.Progress` that adds up units and seconds by the first word of a task's description.

    Attributes:
        limit: seconds after which the next unit of a task raises `EnoughError`; None: never.
    """

    def __init__(self) -> None:
        self.limit: float | None = None
        self._spent: dict[str, Spent] = defaultdict(Spent)
        self._task, self._since = "", 0.0

    def start(self, total: int, unit: str, description: str) -> None:
        """Begin a task, which ends the one before."""
        self.close()
        self._task, self._since = description.split(" ")[0], time.perf_counter()
        self._spent[self._task].total += total

    def advance(self, n: int = 1, **fields: object) -> None:
        """Count units.

        Raises:
            EnoughError: the task has taken too long.
        """
        if not self._task:
            return
        spent = self._spent[self._task]
        spent.units += n
        if (
            n
            and self.limit is not None
            and spent.units < spent.total
            and time.perf_counter() - self._since > self.limit
        ):
            raise EnoughError

    def note(self, line: str) -> None:
        """Nobody listens."""

    def close(self) -> None:
        """End the task."""
        if self._task:
            self._spent[self._task].seconds += time.perf_counter() - self._since
        self._task = ""

    def taken(self, *tasks: str) -> dict[str, Spent]:
        """What these kinds of tasks have taken since this was asked last."""
        self.close()
        spent, self._spent = self._spent, defaultdict(Spent)
        return {task: spent[task] for task in tasks}
