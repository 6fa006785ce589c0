"""A listener that takes the time of what stages tell of their work."""

import time
from collections import defaultdict
from dataclasses import dataclass


@dataclass
class Spent:
    """What tasks of one kind have taken.

    Attributes:
        units: that were counted as done: rows, images, …
        seconds: of the wall.
    """

    units: int = 0
    seconds: float = 0.0


class Clock:
    """A `stages.progress.Progress` that adds up units and seconds by the first word of a task's description."""

    def __init__(self) -> None:
        self._spent: dict[str, Spent] = defaultdict(Spent)
        self._task, self._since = "", 0.0

    def start(self, total: int, unit: str, description: str) -> None:
        """Begin a task, which ends the one before."""
        self.close()
        self._task, self._since = description.split(" ")[0], time.perf_counter()

    def advance(self, n: int = 1, **fields: object) -> None:
        """Count units."""
        if self._task:
            self._spent[self._task].units += n

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
