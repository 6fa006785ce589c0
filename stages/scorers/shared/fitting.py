"""Which ID rows a score takes its settings from."""

from collections.abc import Mapping
from typing import Any, Literal

from stages.errors import InputError
from stages.scorers.inputs import ScoreInputs

RowsName = Literal["train", "select"]


def fitting_rows(
    which: RowsName, train: ScoreInputs, select: ScoreInputs | None, who: str
) -> tuple[ScoreInputs, dict[str, Any]]:
    """Rows that a threshold is taken from, ``"train"`` or ``"select"``, and what to record of them.

    An expert that no held-out row went to takes its training rows, and the record says so.

    Raises:
        InputError: held-out rows are asked for and none were given.
    """
    if which == "select" and select is None:
        raise InputError(f"{who} needs held-out ID rows to fit on: give them to fit() as well")
    rows = select if which == "select" and select is not None and len(select) else train
    return rows, {"fitted_on": "train" if rows is train else "select", "fitted_rows": len(rows)}


def fitted_on_train(which: RowsName, record: Mapping[str, Any]) -> str:
    """What to say where held-out rows were asked for and training rows stand in: the remark of such a score."""
    return "fitted on ID training rows, for no held-out row is there" if record["fitted_on"] != which else ""
