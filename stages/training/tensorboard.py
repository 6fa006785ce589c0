"""Scalars for TensorBoard: the numbers of ``metrics.jsonl`` once more, in an event file beside it.

An optional extra (``pip install 'mofe-feature-cache[tensorboard]'``). One event file a folder, whatever was killed and
resumed in between: a run that goes on writes what it knows of its history anew, and no step stands there twice.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.errors import InputError

EVENT_FILES = "events.out.tfevents.*"  # as TensorBoard looks for them

_Record = Mapping[str, Any]


def require_tensorboard(key: str) -> None:
    """Check that event files can be written.

    Args:
        key: that which asks for them.

    Raises:
        InputError: the package is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401  # here and below, since it takes a second and may not be there
    except ImportError as error:
        raise InputError(
            f"{key}: needs the package tensorboard: pip install 'mofe-feature-cache[tensorboard]', or leave it out: "
            "metrics.jsonl is written always"
        ) from error


@contextmanager
def scalar_log(folder: Path, asked: bool, history: Iterable[_Record] = ()) -> Iterator[Callable[[_Record], None]]:
    """Write records as scalars; gives what writes one more.

    Numbers of a record are scalars by their names, or ``<run>/<name>`` where it names a ``run``; its ``epoch`` is the
    step. Lists, such as accuracy per class, are left to ``metrics.jsonl``.

    Args:
        folder: where the event file goes; those that an older run left there are removed.
        asked: False writes nothing.
        history: records so far.
    """
    for path in folder.glob(EVENT_FILES):
        path.unlink()
    if not asked:
        yield lambda record: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def write(record: _Record) -> None:
            for tag, value in scalars_of(record).items():
                writer.add_scalar(tag, value, record["epoch"])
            writer.flush()

        for record in history:
            write(record)
        yield write


def scalars_of(record: _Record) -> dict[str, float]:
    """The scalars of one record by their tags.

    >>> scalars_of({"run": "final", "epoch": 3, "loss": 0.5, "load": [3, 4], "lr": None})
    {'final/loss': 0.5}
    """
    prefix = f"{record['run']}/" if "run" in record else ""
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "epoch"}
    return {f"{prefix}{name}": float(value) for name, value in numbers.items()}


def scalars_of_metrics(folder: Path) -> None:
    """Write the event file of a finished ``metrics.jsonl``, where there is none."""
    if any(folder.glob(EVENT_FILES)):
        return
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    with scalar_log(folder, True, map(json.loads, lines)):
        pass
