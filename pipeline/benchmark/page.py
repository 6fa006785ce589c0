"""The page of results: what was run, a summary, and all tables. ``make results`` writes it, and nobody by hand.

It stands in the work folder of every run; `PROJECTS_PAGE` is the one that the project shows.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.benchmark.comparison import JudgedStudy, judge, method_label, result_lines
from pipeline.benchmark.images import BenchmarkImages
from pipeline.benchmark.tables import ResultTables, TextTable, auto_table, pair_tables, router_table
from pipeline.config import RunConfig
from stages.files.documents import read_document, write_text
from stages.results.formats import csv_text, markdown_table
from stages.results.method import RECOMMENDED
from stages.scorers import AUTO

PROJECTS_PAGE = Path(__file__).with_name("RESULTS.md")
ABOUT = f"""\
`make results` writes this page, and nobody by hand. What it says is in `pipeline/benchmark/FINDINGS.md`, which images
and studies it is about in `pipeline/benchmark/README.md`. "Default" is the default of the commit that is named below.

Recommended before the run: {method_label(RECOMMENDED)}. Per cent; FPR95 with ID positive (admit 95 %
of ID, report the OOD admitted); near and far are means over sets. The interval of a difference resamples ID and OOD
images alike for both methods, and seeds where there are several; it is a gain or a loss where that excludes 0 and the
false discovery rate of all differences of this page stays at 5 %.
"""
SUMMARY = ("<!-- summary: begin -->\n", "<!-- summary: end -->\n")  # stand around the summary, which README shows


@dataclass(frozen=True)
class BenchmarkResults:
    """What the page says of one benchmark.

    Attributes:
        name: of its study.
        ran: what was run, by what it is: commit, seeds, …
        summary: the recommended score and what it is judged against.
        tables: all.
    """

    name: str
    ran: Mapping[str, str]
    summary: TextTable
    tables: Sequence[TextTable]


def results_page(benchmarks: Sequence[BenchmarkResults]) -> str:
    """The page as Markdown."""
    header = benchmarks[0].summary.header
    summary = markdown_table(header, list(chain.from_iterable(own.summary.body for own in benchmarks)), 2)
    facts = list(dict.fromkeys(chain.from_iterable(own.ran for own in benchmarks)))
    ran = markdown_table(
        ["", *(own.name for own in benchmarks)],
        [[fact, *(own.ran.get(fact, "") for own in benchmarks)] for fact in facts],
    )
    begin, end = SUMMARY
    parts = ["# Results\n", ABOUT, "## Summary\n", f"{begin}{summary}{end}", "## What was run\n", ran]
    for own in benchmarks:
        parts += [f"## {own.name}\n", *(table.markdown() for table in own.tables)]
    return "\n".join(parts)


def write_results(
    configs: Sequence[RunConfig], work: Path, images: Sequence[BenchmarkImages], page: Path | None = None
) -> list[Any]:
    """Write ``results.md`` and ``results.csv`` of scored studies; returns the tables for the terminal.

    Args:
        configs: the studies.
        work: where to.
        images: which each was run on.
        page: another place for the page.
    """
    studies = [JudgedStudy(config) for config in configs]
    judge(studies)
    lines = [result_lines(study) for study in studies]
    found = [_benchmark(*of_study) for of_study in zip(studies, lines, images, strict=True)]
    everything = list(chain.from_iterable(lines))
    places = [work / "results.md", *([] if page is None else [page])]
    for place in places:
        write_text(place, results_page(found))
    write_text(work / "results.csv", csv_text(everything, list(everything[0])))
    shown = [table.rich() for own in found for table in own.tables]
    return [*shown, f"results: {', '.join(map(str, [*places, work / 'results.csv']))}"]


def _benchmark(study: JudgedStudy, lines: Sequence[Mapping[str, Any]], images: BenchmarkImages) -> BenchmarkResults:
    tables = ResultTables(lines)
    chosen = [auto_table(study)] if AUTO in study.config.score.scores else []
    shown = [tables.judged, tables.differences, tables.every_method, *chosen, *pair_tables(study), router_table(study)]
    record = read_document(study.config.work / "record.json") or {}
    return BenchmarkResults(study.config.name, what_was_run(record, images), tables.summary, shown)


def what_was_run(record: Mapping[str, Any], images: BenchmarkImages) -> dict[str, str]:
    """What was run, as the record of a study has it.

    Args:
        record: ``record.json``.
        images: that it was run on.
    """
    git, machine = record.get("git") or {"commit": "unknown", "dirty": False}, record.get("hardware", {})
    listed = (
        "those of the benchmark's list" if images.difference is None else f"NOT the benchmark's: {images.difference}"
    )
    return {
        "commit": git["commit"] + (", with changes" if git["dirty"] else ""),
        "images": f"{listed}; SHA-256 of all: {images.digest}",
        "seeds": _listed(record.get("seeds", ())),
        "CPU": f"{machine.get('cpu', 'unknown')}, {machine.get('cores', 'unknown')} cores",
        "GPUs": _listed(machine.get("gpus", ())) or "none",
        "threads": os.environ.get("OMP_NUM_THREADS", "as many as cores"),
        "versions": _listed(f"{name} {version}" for name, version in record.get("versions", {}).items()),
    }


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
