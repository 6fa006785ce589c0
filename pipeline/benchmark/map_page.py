"""The map as a page, a picture and a table: each mixture against the same score of frozen features, cell by cell.

A difference has a 95 % interval over images, ID and OOD resampled alike for both methods; the false discovery rate of
all differences of the map stays at 5 %. A mixture has one seed, so what is found is found for that seed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pipeline.benchmark.cells import Cell, number_of_experts
from pipeline.benchmark.comparison import COMPARED_COLUMNS, JudgedStudy, judge_together, scored_by
from pipeline.benchmark.images import BenchmarkImages
from pipeline.benchmark.page import what_was_run
from pipeline.benchmark.tables import TextTable
from pipeline.config import RunConfig
from pipeline.report.figures import HeatMap, heat_map_file
from pipeline.report.wording import points
from stages.files.documents import read_document, write_text
from stages.metrics.ranking import METRICS
from stages.results.formats import csv_text, markdown_table
from stages.results.method import FROZEN_SUM, RECOMMENDED, Method
from stages.scorers import FROZEN, title_of

PROJECTS_MAP = Path(__file__).with_name("MAP.md")
MAP_SUMMARY = ("<!-- map: begin -->\n", "<!-- map: end -->\n")  # stand around the summary, which FINDINGS.md shows
_SHOWN = "fpr95"  # of the page and the picture; map.csv has the other metric as well
_ABOUT = """\
`make map` writes this page, and nobody by hand. What it says is in `pipeline/benchmark/FINDINGS.md`, which images it is
about in `pipeline/benchmark/README.md`.

A cell is a study of its own: so many ID classes, so many training images of each (a quarter of them held out), and the
same near and far sets for all. Each number is what a mixture of E experts is off the same score of frozen features, in
percentage points of FPR95 with ID positive: less is better; near and far are means over sets. It is called a gain or a
loss where its interval, which resamples ID and OOD images alike for both, excludes 0 and the false discovery rate of
all differences of the map, those of AUROC included, stays at 5 %; in the picture these are bold. One seed. "frozen"
before a part of a score: it looks past the experts; what that is compared with looks past them in all its parts.
"""


def map_lines(configs: Mapping[Cell, RunConfig]) -> list[dict[str, Any]]:
    """A line per cell, number of experts, score and group of OOD sets, all of them judged together.

    Args:
        configs: study of each cell, scored, with one seed.
    """
    studies = {cell: JudgedStudy(config) for cell, config in configs.items()}
    config = next(iter(configs.values()))
    experts, scores = number_of_experts(config), config.score.scores
    compared = [
        (cell, variant, score, group)
        for score in scores
        for group in next(iter(studies.values())).groups
        for cell in studies
        for variant in experts
    ]
    judge_together(
        [
            (studies[cell], (*_pair(variant, score), group, metric))
            for cell, variant, score, group in compared
            for metric in COMPARED_COLUMNS
        ]
    )
    return [
        {"score": score, "group": group, "classes": cell.classes, "images": cell.images, "experts": experts[variant]}
        | _numbers(studies[cell], _pair(variant, score), group)
        for cell, variant, score, group in compared
    ]


def _pair(variant: str, score: str) -> tuple[Method, Method]:
    """A mixture's score, and the same of frozen features, where all parts look at these."""
    frozen = "+".join(part.removeprefix(FROZEN) for part in score.split("+"))
    return scored_by(replace(RECOMMENDED, variant=variant), score), scored_by(FROZEN_SUM, frozen)


def _numbers(study: JudgedStudy, pair: tuple[Method, Method], group: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for metric in COMPARED_COLUMNS:
        for name, method in zip((metric, f"{metric}_frozen"), pair, strict=True):
            (averages,) = study.seeds(method).values()
            found[name] = averages[group][0].metrics[metric]
        difference = study.difference(*pair, group, metric)
        found |= {f"{metric}_difference": difference.mean, f"{metric}_lo": difference.lo, f"{metric}_hi": difference.hi}
        found |= {f"{metric}_says": study.says[*pair, group, metric]}
    for name, method in zip(("id_accuracy", "id_accuracy_frozen"), pair, strict=True):
        found[name] = next(iter(study.accuracy(method)), None)  # none of a score that reads no head
    (router,) = (own for own in study.scored.id["router"] if own["variant"] == pair[0].variant)
    return found | {"router_accuracy": router["accuracy"]}


class MapTables:
    """Tables and the picture of `map_lines`."""

    def __init__(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self._lines = lines
        self._experts = list(dict.fromkeys(line["experts"] for line in lines))
        self._parts = list(dict.fromkeys((line["score"], line["group"]) for line in lines))

    def _rows(self, score: str, group: str) -> Iterator[tuple[Cell, list[Mapping[str, Any]]]]:
        """Cells with their lines, by number of experts."""
        own = [line for line in self._lines if (line["score"], line["group"]) == (score, group)]
        for cell in dict.fromkeys(Cell(line["classes"], line["images"]) for line in own):
            yield cell, [line for line in own if Cell(line["classes"], line["images"]) == cell]

    @property
    def _header(self) -> list[str]:
        return [f"E = {experts}" for experts in self._experts]

    @property
    def parts(self) -> list[TextTable]:
        """A table for each score and group."""
        return [
            TextTable(
                _title(score, group),
                ["classes × images", "frozen", *self._header],
                [
                    [_cell_name(cell), f"{100 * lines[0][f'{_SHOWN}_frozen']:.1f}", *map(_difference, lines)]
                    for cell, lines in self._rows(score, group)
                ],
            )
            for score, group in self._parts
        ]

    @property
    def summary(self) -> TextTable:
        """How often each number of experts gained and lost, and by how much on average."""
        body = []
        for score, group in self._parts:
            cells = [lines for _, lines in self._rows(score, group)]
            body.append([_title(score, group), *(_tally(column) for column in zip(*cells, strict=True))])
        title = f"Mean difference in {METRICS[_SHOWN].title}, points (gains / losses among {len(cells)} cells)"
        return TextTable(title, ["", *self._header], body)

    def picture(self) -> str:
        """All differences as an SVG file."""
        maps = []
        for score, group in self._parts:
            rows = list(self._rows(score, group))
            values = np.array([[line[f"{_SHOWN}_difference"] for line in lines] for _, lines in rows])
            marked = np.array([[_is_told(line) for line in lines] for _, lines in rows])
            maps.append(HeatMap(_title(score, group), values, marked))
        return heat_map_file(maps, [_cell_name(cell) for cell, _ in rows], self._header)


def _title(score: str, group: str) -> str:
    return f"{title_of(score)}, {group}"


def _cell_name(cell: Cell) -> str:
    return f"{cell.classes} × {cell.images}"


def _word(line: Mapping[str, Any]) -> str:
    return str(line[f"{_SHOWN}_says"]).split(" ")[0]


def _is_told(line: Mapping[str, Any]) -> bool:
    """Whether the difference is a gain or a loss."""
    return _word(line) in ("gain", "loss")


def _difference(line: Mapping[str, Any]) -> str:
    mean, lo, hi = (points(line[f"{_SHOWN}_{name}"]) for name in ("difference", "lo", "hi"))
    return f"{mean} [{lo}, {hi}]" + (f" {_word(line)}" if _is_told(line) else "")


def _tally(lines: Sequence[Mapping[str, Any]]) -> str:
    said = [*map(_word, lines)]
    mean = points(float(np.mean([line[f"{_SHOWN}_difference"] for line in lines])))
    return f"{mean} ({said.count('gain')} / {said.count('loss')})"


def write_map(
    configs: Mapping[Cell, RunConfig], work: Path, images: BenchmarkImages, page: Path | None = None
) -> list[str | Table]:
    """Write ``map.md``, ``map.svg`` and ``map.csv`` of scored cells; returns what the terminal shows.

    Args:
        configs: study of each cell.
        work: where to.
        images: which they were run on.
        page: another place for the page; its picture stands beside it.
    """
    lines = map_lines(configs)
    tables = MapTables(lines)
    places = [work / "map.md", *([] if page is None else [page])]
    picture, ran = tables.picture(), _ran_table(configs, images)
    for place in places:
        beside = place.with_suffix(".svg")
        write_text(beside, picture)
        write_text(place, _page(tables, beside.name, ran))
    write_text(work / "map.csv", csv_text(lines, list(lines[0])))
    return [tables.summary.rich(), f"map: {', '.join(map(str, [*places, work / 'map.csv']))}"]


def _ran_table(configs: Mapping[Cell, RunConfig], images: BenchmarkImages) -> str:
    """What was run; where cells differ in it, as after a change of the program, all of it."""
    ran = [what_was_run(read_document(config.work / "record.json") or {}, images) for config in configs.values()]
    facts = dict.fromkeys(fact for own in ran for fact in own)
    body = [[fact, "; ".join(dict.fromkeys(own[fact] for own in ran if fact in own))] for fact in facts]
    return markdown_table(["", "all cells"], body)


def _page(tables: MapTables, picture: str, ran: str) -> str:
    begin, end = MAP_SUMMARY
    summary = tables.summary
    parts = [
        "# Where mixtures gain\n",
        _ABOUT,
        f"![the map]({picture})\n",
        "## Summary\n",
        f"{summary.title}:\n",
    ]
    parts += [f"{begin}{markdown_table(summary.header, summary.body, numbers_from=1)}{end}"]
    parts += ["## Every cell\n", *(table.markdown() for table in tables.parts), "## What was run\n", ran]
    return "\n".join(parts)
