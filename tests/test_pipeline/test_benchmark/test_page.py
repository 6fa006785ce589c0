"""The project's page of results is as `make results` writes it, and README's table is its summary."""

import re
from itertools import pairwise
from pathlib import Path

from pipeline.benchmark.page import PROJECTS_PAGE, SUMMARY, BenchmarkResults, results_page
from pipeline.benchmark.tables import TextTable

PAGE = PROJECTS_PAGE.read_text(encoding="utf-8")
BEGIN, END = SUMMARY
MOST_ROWS = 8  # of the summary, a benchmark


def cells_of(table: str) -> list[list[str]]:
    """Rows of a table of Markdown, the header first."""
    rows = [[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in line[1:-1].split("|")] for line in table.splitlines()]
    return [rows[0], *rows[2:]]


def read_page(page: str) -> list[BenchmarkResults]:
    """What a page says, back from its text."""
    header, *summary = cells_of(page.split(BEGIN)[1].split(END)[0])
    (_, *names), *facts = cells_of(page.split("\n## What was run\n\n")[1].split("\n\n## ")[0])
    found = []
    for column, name in enumerate(names, start=1):
        section = page.split(f"\n## {name}\n\n")[1].split("\n## ")[0]
        blocks = re.findall(r"\*\*([^\n]*)\*\*\n\n((?:\|[^\n]*\n)+)", section)
        tables = [TextTable(title, rows[0], rows[1:]) for title, text in blocks if (rows := cells_of(text))]
        own = TextTable(f"{name}: summary", header, [row for row in summary if row[0] == name])
        found.append(BenchmarkResults(name, {fact[0]: fact[column] for fact in facts}, own, tables))
    return found


def test_the_page_is_in_the_writers_form():
    benchmarks = read_page(PAGE)
    assert [own.name for own in benchmarks] == ["caltech", "tinyimagenet", "manyclasses"]
    assert results_page(benchmarks) == PAGE
    assert all(re.match(r"[0-9a-f]{40}\b", own.ran["commit"]) for own in benchmarks)


def test_the_summary_is_of_the_rows_below_it():
    for own in read_page(PAGE):
        assert 0 < len(own.summary.body) <= MOST_ROWS
        (whole,) = (table for table in own.tables if table.title == f"{own.name}: all")
        stated = [[own.name, row[0], *row[2:]] for row in whole.body]
        assert [row for row in own.summary.body if row not in stated] == []


def test_the_readme_shows_the_summary():
    """Copied whole, from mark to mark, whenever the page is written anew."""
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- results: begin -->\n(.*?)<!-- results: end -->", readme, re.DOTALL)[1]
    assert shown == PAGE.split(BEGIN)[1].split(END)[0]


def test_facts_of_benchmarks_stand_side_by_side():
    table = TextTable("one: all", ["", "near FPR95 ↓"], [["frozen: knn", "12.3"]])
    summary = TextTable("one: summary", ["benchmark", "method", "near FPR95 ↓"], [["one", "frozen: knn", "12.3"]])
    page = results_page(
        [
            BenchmarkResults("one", {"commit": "a1", "seeds": "0, 1"}, summary, [table]),
            BenchmarkResults("two", {"commit": "b2", "remark": "*"}, summary, [table, table]),
        ]
    )
    for line in ("| commit | a1 | b2 |", "| seeds | 0, 1 |  |", r"| remark |  | \* |"):
        assert f"\n{line}\n" in page
    places = [page.index(f"\n## {name}\n") for name in ("Summary", "What was run", "one", "two")]
    assert all(first < second for first, second in pairwise(places))
    assert page.endswith("| frozen: knn | 12.3 |\n")
