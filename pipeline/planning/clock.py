"""A listener that takes the time of what stages tell of their work, and can stop one that takes too long."""

from collections import defaultdict
from dataclasses import dataclass
from time import perf_counter


class EnoughError(Exception):
    """A task has taken as long as it may: what it did tells how long the rest would take."""


@dataclass
class Spent:
    """What tasks of one kind have taken.

    Attributes:
        total: units that there were to do: rows, images, …
        units: that were done.
        seconds: of the wall.
        paced: seconds of these at the usual pace, when kernels were chosen and memory was found: of the last epoch, its
            judging included, or of what followed on the first units.
        paced_units: that were done in these.
    """

    total: int = 0
    units: int = 0
    seconds: float = 0.0
    paced: float = 0.0
    paced_units: int = 0

    @property
    def each(self) -> float:
        """Seconds of a unit at the usual pace."""
        return self.paced / self.paced_units if self.paced_units else self.seconds / max(1, self.units)

    @property
    def starting(self) -> float:
        """Seconds more than all units take at that pace."""
        return max(0.0, self.seconds - self.units * self.each)

    @property
    def whole(self) -> float:
        """Seconds that all units would have taken."""
        return self.seconds + (self.total - self.units) * self.each


@dataclass
class _Task:
    """A task that goes on: where it is, and where its usual pace began, in seconds and units."""

    name: str
    began: float
    epoch: object = None
    at: tuple[float, int] = (0.0, 0)
    since: tuple[float, int] | None = None

    def advance(self, n: int, epoch: object) -> None:
        if epoch != self.epoch:
            self.epoch, self.since = epoch, self.at if self.at[1] else None
        self.at = perf_counter() - self.began, self.at[1] + n
        self.since = self.since or self.at


class Clock:
    """A `stages.progress.Progress` that adds up units and seconds by the first word of a task's description.

    Attributes:
        limit: seconds after which the next unit of a task raises `EnoughError`; None: never.
    """

    def __init__(self) -> None:
        self.limit: float | None = None
        self._spent: dict[str, Spent] = defaultdict(Spent)
        self._task: _Task | None = None

    def start(self, total: int, unit: str, description: str, after_s: float = 0.0) -> None:
        """Begin a task, which ends the one before."""
        self.close()
        self._task = _Task(description.split(" ")[0], perf_counter())
        self._spent[self._task.name].total += total

    def advance(self, n: int = 1, **fields: object) -> None:
        """Count units.

        Args:
            n: how many.
            fields: of which ``epoch`` tells one epoch from the next.

        Raises:
            EnoughError: the task has taken too long.
        """
        task = self._task
        if task is None or not n:
            return
        spent = self._spent[task.name]
        spent.units += n
        task.advance(n, fields.get("epoch"))
        if self.limit is not None and spent.units < spent.total and task.at[0] > self.limit:
            raise EnoughError

    def note(self, line: str) -> None:
        """Nobody listens."""

    def close(self) -> None:
        """End the task."""
        if self._task is not None:
            spent, (seconds, units) = self._spent[self._task.name], self._task.since or self._task.at
            spent.seconds += perf_counter() - self._task.began
            spent.paced += self._task.at[0] - seconds
            spent.paced_units += self._task.at[1] - units
        self._task = None

    def taken(self, *tasks: str) -> dict[str, Spent]:
        """What these kinds of tasks have taken since this was asked last."""
        self.close()
        spent, self._spent = self._spent, defaultdict(Spent)
        return {task: spent[task] for task in tasks}
