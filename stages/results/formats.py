"""Tables as files for programs and people: CSV, Markdown and LaTeX, in which no cell is taken for anything but text."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# What a spreadsheet takes for a formula where it stands first in a cell (OWASP, "CSV Injection"), and the mark itself.
_FORMULA = re.compile(r"[=+\-@\t\r']")

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "#": r"\#",
        "$": r"\$",
        "%": r"\%",
        "&": r"\&",
        "_": r"\_",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "±": r"$\pm$",
        "−": r"$-$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
    }
)
# Any of these may begin a construct of Markdown or be taken for HTML; brackets where they make a link.
_MARKDOWN = re.compile(r"([\\`*_<>|~]|&(?=[#\w])|\](?=[(\[]))")


def csv_text(lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    r"""Lines as CSV: numbers as Python writes them, ``true`` and ``false``, nothing for None, texts by `csv_cell`.

    >>> csv_text([{"name": "=1+1", "auroc": -0.5, "best": True, "seed": None}], ["name", "auroc", "best", "seed"])
    "name,auroc,best,seed\n'=1+1,-0.5,true,\n"
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    quoting = csv.DictWriter(out, columns, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for line in lines:
        cells = {column: csv_cell(value) for column, value in line.items()}
        # A carriage return ends a line for who reads it, but Python 3.11 does not quote it here.
        (quoting if any(isinstance(cell, str) and "\r" in cell for cell in cells.values()) else writer).writerow(cells)
    return out.getvalue()


def csv_cell(value: Any) -> Any:
    """A cell of a CSV file; a text that a spreadsheet would take for a formula begins with an apostrophe.

    >>> csv_cell("=HYPERLINK(1)"), csv_cell(-1.5), csv_cell("dog"), csv_cell("'s")
    ("'=HYPERLINK(1)", -1.5, 'dog', "''s")
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and _FORMULA.match(value):
        return f"'{value}"
    return "" if value is None else value


def csv_cell_text(cell: str) -> str:
    """The text that `csv_cell` made the cell of."""
    return cell.removeprefix("'")


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]], numbers_from: int | None = None) -> str:
    """A table of GitHub's Markdown, every cell as text.

    Args:
        header: a cell a column.
        body: lines of as many cells.
        numbers_from: columns from this one on are aligned to the right.
    """
    rule = ["---:" if numbers_from is not None and index >= numbers_from else "---" for index in range(len(header))]
    lines = [
        [_markdown_cell(cell) for cell in header],
        rule,
        *([_markdown_cell(cell) for cell in line] for line in body),
    ]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _markdown_cell(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", _one_line(text))


def latex_table(header: Sequence[str], body: Sequence[Sequence[str]], numbers_from: int) -> str:
    """A ``tabular`` of booktabs, every cell as text; needs T1 or Unicode fonts for letters that ASCII lacks."""
    rows = [" & ".join(_one_line(cell).translate(_LATEX) for cell in line) + r" \\" for line in (header, *body)]
    columns = "l" * numbers_from + "r" * (len(header) - numbers_from)
    begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", end, ""])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def mean_text(mean: float | None, deviation: float | None) -> str:
    """A fraction in per cent, with the deviation over seeds where there is one.

    >>> mean_text(0.931, None), mean_text(0.931, 0.004), mean_text(None, None)
    ('93.1', '93.1 ± 0.4', '–')
    """
    if mean is None or math.isnan(mean):
        return "–"
    return f"{100 * mean:.1f}" + (f" ± {100 * deviation:.1f}" if deviation is not None else "")
