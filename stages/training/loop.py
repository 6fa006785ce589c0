"""The training loop: epochs of steps, on from where a killed run was stored, to the same bits.

What is trained, on which batches and by which loss, is the trainer's: `stages.training.cached` and
`stages.training.images`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from stages.context import Context
from stages.id_data.split import Rows
from stages.networks.repeatable import repeatable
from stages.networks.transfer import Fetched
from stages.training.run import Record, Resumable, TrainingRun


class Planned(Protocol):
    """A batch of an epoch."""

    @property
    def rows(self) -> Rows:
        """``[B]`` what is learnt from."""


class Step(NamedTuple):
    """A step that was taken, and what it found, over all processes; a GPU may still be at work on it."""

    rows: Rows  # that were learnt from
    found: Fetched  # sums over rows, as the trainer has them


PlannedBatch = TypeVar("PlannedBatch", bound=Planned)


class Trainer(Resumable, Protocol[PlannedBatch]):
    """Trains one network; how many epochs, and which of them is kept, is left to the run.

    Attributes:
        n_rows: of an epoch.
        unit: what a row is to people.
    """

    n_rows: int
    unit: str

    def plan(self, epoch: int, history: Sequence[Record]) -> list[PlannedBatch]:
        """Begin an epoch with nothing counted: its batches."""

    def go_on(self, counted: dict[str, Any]) -> None:
        """Go on within the epoch, from what was `counted`."""

    def load(self, batches: Sequence[PlannedBatch]) -> Iterator[Any]:
        """These batches, each with what `step` needs of it."""

    def step(self, loaded: Any) -> Step:
        """Learn from one batch."""

    def is_good(self, step: Step) -> bool:
        """Whether a step was what it should be: its loss is a number."""

    def count(self, step: Step) -> object:
        """Count a step; gives its loss a row, as it is shown. What was not good is raised."""

    def judge(self) -> Record:
        """End the epoch: judge by the held-out rows, and say what there is to say of it."""


def train_epochs(
    trainer: Trainer[Any],
    run: TrainingRun,
    context: Context,
    title: str,
    on_epoch: Callable[[Record], None] | None = None,
) -> None:
    """Train every epoch that is left.

    Args:
        trainer: where the run was stored (`TrainingRun.resume`), or new.
        run: remembers, stores and ends.
        context: told of every step.
        title: what is trained, for people.
        on_epoch: told of every record once it is stored.
    """
    with repeatable(context.place, trains=True):
        progress = context.progress
        progress.start(run.epochs * trainer.n_rows, trainer.unit, title)
        progress.advance(run.trained * trainer.n_rows)
        while not run.ended:
            epoch = run.trained
            batches = trainer.plan(epoch, run.history)
            steps = run.begun["steps"]
            if steps:
                trainer.go_on(run.begun)
            progress.advance(sum(len(batch.rows) for batch in batches[:steps]))

            def count(step: Step, epoch: int = epoch) -> None:
                loss = trainer.count(step)
                run.count_step()
                progress.advance(len(step.rows), epoch=epoch, loss=loss)

            last: Step | None = None
            for loaded in trainer.load(batches[steps:]):
                # What a bad step ends is left to all processes together, a step later: this one alone stores.
                if last is not None and run.overdue and trainer.is_good(last):
                    count(last)
                    last = None
                    run.prepare(trainer)
                step = trainer.step(loaded)
                # The step before is looked at while a GPU computes this one: nothing that a bad step spoils is kept.
                if last is not None:
                    count(last)
                last = step
            if last is not None:
                count(last)
            record = trainer.judge()
            run.end_epoch(record, trainer)
            if on_epoch is not None:
                on_epoch(record)
        progress.close()
