"""One training run: its epochs so far, which of them is kept, when it ends, and what a killed one goes on from."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from stages.context import Context
from stages.errors import StageError
from stages.files.documents import write_text
from stages.training.checkpoint import Checkpoints, load_checkpoint

Record = dict[str, Any]  # a line of metrics.jsonl: plain values, with `epoch` and `select_loss`


class Resumable(Protocol):
    """What can be stored within a run and go on to the same bits."""

    @property
    def judged(self) -> nn.Module:
        """The network that held-out rows judge, and whose weights are kept."""

    def state(self) -> dict[str, Any]:
        """Weights, their average and the optimiser: all that outlasts an epoch."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""

    def counted(self) -> dict[str, Any]:
        """What the epoch that is begun has counted so far."""


class TrainingRun:
    """What a run has to remember.

    Attributes:
        epochs: how many it is to have at most.
        history: a record of each that is done; before them, where the start was judged, one of it as epoch −1.
        begun: what was counted in the one after them, and how many ``steps`` of it were taken.
        best: weights of the epoch that is kept, on the CPU.
    """

    def __init__(self, epochs: int, patience: int | None, checkpoints: Checkpoints, context: Context) -> None:
        """Begin a run.

        Args:
            epochs: to train.
            patience: epochs without a lower held-out loss after which it ends; None: never.
            checkpoints: stores it.
            context: of several processes, the first stores and all go on from the same.
        """
        self.epochs = epochs
        self.history: list[Record] = []
        self.begun: dict[str, Any] = {"steps": 0}
        self.best: dict[str, Tensor] = {}
        self._patience = patience
        self._checkpoints = checkpoints
        self._context = context

    @property
    def checkpoint(self) -> Path:
        """The file that it is stored in."""
        return self._checkpoints.path

    @property
    def trained(self) -> int:
        """How many epochs are done."""
        return len(self.history) - sum(record["epoch"] < 0 for record in self.history[:1])

    @property
    def kept(self) -> Record:
        """The first of the records with the lowest held-out loss."""
        return self.history[int(np.argmin([record["select_loss"] for record in self.history]))]

    @property
    def best_epoch(self) -> int:
        """The epoch that is kept, from 0; −1 where nothing was better than what it started as."""
        return int(self.kept["epoch"])

    @property
    def ended(self) -> bool:
        """Whether every epoch was trained, or patience has run out."""
        n, patience = self.trained, self._patience
        return n >= self.epochs or (patience is not None and n > 0 and n - 1 - self.best_epoch >= patience)

    def resume(self, trainer: Resumable) -> None:
        """Go on from the checkpoint, if there is one."""
        ranks, say, path = self._context.ranks, self._context.progress.note, self._checkpoints.path
        stored = load_checkpoint(path, say=say) if ranks.first else None
        if not ranks.agree(stored is not None):
            return
        stored = load_checkpoint(path) if stored is None else stored  # by each, rather than sent: it may be gigabytes
        if stored is None:
            raise StageError(f"{path} is read by one process and not by another: all need the folder that it is in")
        if stored.keys() != {"training", "best", "history", "begun"}:
            say(f"{path} is of another version and counts as none: this training starts anew")
            return
        trainer.restore(stored["training"])
        self.best, self.history, self.begun = stored["best"], stored["history"], stored["begun"]

    @property
    def overdue(self) -> bool:
        """Whether this process is to store the run within the epoch."""
        return self._context.ranks.first and self._checkpoints.overdue

    def prepare(self, trainer: Resumable) -> None:
        """Take the run as it is within an epoch, to be stored once the loss of its weights is known to be a number."""
        self._checkpoints.prepare(self._state(trainer))

    def count_step(self) -> None:
        """Count a step of the epoch, whose loss is a number."""
        self.begun["steps"] += 1
        if self._context.ranks.first:
            self._checkpoints.commit()

    def end_epoch(self, record: Record, trainer: Resumable) -> None:
        """Take an epoch's record, keep its weights if it is the best, and store the run unless that was just now."""
        self.history.append(record)
        self.begun = {"steps": 0}
        if self.kept is record:
            self.best = {name: tensor.cpu().clone() for name, tensor in trainer.judged.state_dict().items()}
        if self._context.ranks.first and (self._checkpoints.due or self.ended):
            self._checkpoints.save(self._state(trainer))

    def _state(self, trainer: Resumable) -> dict[str, Any]:
        steps = self.begun["steps"]
        begun = {"steps": steps} | (trainer.counted() if steps else {})
        return {"training": trainer.state(), "best": self.best, "history": self.history, "begun": begun}


def write_metrics(folder: Path, history: Iterable[Mapping[str, Any]]) -> None:
    """Write ``metrics.jsonl``, a line an epoch."""
    write_text(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))
