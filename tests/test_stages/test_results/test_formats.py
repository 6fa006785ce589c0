"""Tables as files: what is in a cell is text and nothing else, whoever opens the file."""

import csv
import io
import re
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.results.formats import csv_cell_text, csv_text, latex_table, markdown_table

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=20)
ODD = [r"a#b", "{x}", "a^2", r"C:\new", "~", "a_b & c", "50 %", "$5", "<b>", "a|b", "*x*", "`x`", "=1+1", "two\nlines"]


@given(st.lists(st.sampled_from(["a\rb", "\r"]) | TEXTS, min_size=1, max_size=3))
def test_a_csv_file_gives_every_text_back_and_holds_no_formula(texts):
    columns = [f"c{index}" for index in range(len(texts))]
    written = csv_text([dict(zip(columns, texts, strict=True))], columns)
    (line,) = csv.DictReader(io.StringIO(written, newline=""))
    assert [csv_cell_text(cell) for cell in line.values()] == texts
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in line.values())


def test_numbers_stay_numbers():
    assert csv_text([{"x": -0.25, "y": None, "z": True}], ["x", "y", "z"]) == "x,y,z\n-0.25,,true\n"


@given(st.lists(st.sampled_from(ODD) | TEXTS, min_size=2, max_size=2))
def test_a_markdown_table_has_one_line_a_row_and_no_more_columns(cells):
    lines = markdown_table(["a", "b"], [cells], numbers_from=1).split("\n")
    assert lines[1] == "| --- | ---: |"
    assert len(lines) == 4  # the last is empty
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", lines[2])) == 3


def test_latex_escapes_all_that_tex_reads():
    (row,) = latex_table(["a"], [["".join(ODD)]], 1).splitlines()[4:5]
    bare = re.sub(r"\\textbackslash\{\}|\\text\w+\{\}|\\[#$%&_{}]|\$[^$]*\$|\\\\$", "", row)
    assert not re.search(r"[#$%&_{}^~\\<>|]", bare)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(tmp_path):
    table = latex_table(["name", "x"], [[text, "1"] for text in ODD], 1)
    head = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs}\begin{document}"
    (tmp_path / "t.tex").write_text(f"{head}\n{table}\n\\end{{document}}\n")
    subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True, capture_output=True)
