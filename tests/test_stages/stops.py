"""Interrupts a training, as Ctrl-C would."""

from stages.progress import NullProgress


class StopsAt(NullProgress):
    """Interrupts once so many images are done; None: never.

    Attributes:
        done: images, with those that were done before the run was stopped.
        learned: those of this run.
    """

    def __init__(self, images: int | None) -> None:
        self._images = images
        self.done = self.learned = 0

    def advance(self, n=1, **fields):
        self.done += n
        self.learned += n if "epoch" in fields else 0
        if self._images is not None and self.done >= self._images and "epoch" in fields:
            raise KeyboardInterrupt


class StopsIn(NullProgress):
    """Interrupts after the first batch of an epoch; of the n-th task where several are trained."""

    def __init__(self, epoch: int, task: str = "") -> None:
        self.epoch, self.task, self.now = epoch, task, ""

    def start(self, total, unit, description, after_s=0.0):
        self.now = description

    def advance(self, n=1, **fields):
        if fields.get("epoch") == self.epoch and self.now.startswith(self.task):
            raise KeyboardInterrupt
