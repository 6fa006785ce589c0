"""The summary of the scores as a table for the terminal."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline.terminal import Lines
from stages.results.table import compact, read_summary


def table_lines(folder: Path) -> Lines:
    """The summary as a table for the terminal, without the calibrated scores, and where the files are."""
    summary = read_summary(folder)
    calibrated = sum(line["calibrated"] and line["ood"] == "average" and line["group"] == "all" for line in summary)
    more = f" (with {calibrated} rows calibrated over experts)" if calibrated else ""
    table = terminal_table([line for line in summary if not line["calibrated"]])
    return [table, f"scores: {folder / 'summary.md'}{more}, {folder / 'table.csv'}, {folder / 'thresholds.json'}"]


def terminal_table(summary: Sequence[dict[str, Any]]) -> Table:
    """Averages of a summary for the terminal, the best of each column in bold."""
    header, body = compact(summary)
    table = Table(
        title="per cent; FPR95 with ID positive (admit 95 % of ID, report the OOD admitted)", title_style="dim"
    )
    names = header.index("score") + 1
    for index, column in enumerate(header):
        table.add_column(column, justify="left" if index < names else "right", no_wrap=True)
    best = [_best(header[index], [row[index] for row in body]) for index in range(len(header))]
    for row in body:
        table.add_row(
            *(
                Text(cell, style="bold" if index >= names and cell == best[index] else "")
                for index, cell in enumerate(row)
            )
        )
    return table


def _best(column: str, cells: Sequence[str]) -> str | None:
    values = {cell: float(cell.split()[0]) for cell in cells if cell[:1].isdigit()}
    choose: Callable[..., str] = max if column.endswith("↑") else min
    return choose(values, key=lambda cell: values[cell]) if values else None
