"""The tables of the benchmark's results, as text: for the page and for the terminal."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from pipeline.benchmark.comparison import (
    CHOSEN,
    COMPARED_COLUMNS,
    JUDGED_AGAINST,
    NAMING,
    PAIRS,
    JudgedStudy,
    deviation,
    method_label,
    methods_of,
)
from stages.metrics.ranking import METRICS
from stages.results.formats import markdown_table, mean_text
from stages.results.method import RECOMMENDED, Method
from stages.results.table import difference_columns
from stages.scorers import AUTO


@dataclass(frozen=True)
class TextTable:
    """A table for people, to be written as Markdown or to a terminal."""

    title: str
    header: list[str]
    body: list[list[str]]

    def markdown(self) -> str:
        """As Markdown, the title before it."""
        return f"**{self.title}**\n\n{markdown_table(self.header, self.body, numbers_from=1)}"

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, title_style="dim")
        for index, column in enumerate(self.header):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for line in self.body:
            table.add_row(*line)
        return table


class ResultTables:
    """Tables of one benchmark's lines of `result_lines`."""

    def __init__(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self.benchmark: str = lines[0]["benchmark"]
        self._groups = list(dict.fromkeys(line["group"] for line in lines))
        self._lines: dict[Method, list[Mapping[str, Any]]] = {}
        for line in lines:
            self._lines.setdefault(Method(**{name: line[name] for name in NAMING}), []).append(line)

    @property
    def judged(self) -> TextTable:
        """The recommended score beside what it is judged against."""
        return self._whole(
            "the recommended score and what it is judged against; mean ± deviation over seeds "
            "[95 % interval over images]",
            self._shown,
            _mean_and_interval,
        )

    @property
    def differences(self) -> TextTable:
        """What the recommended score is off what it is judged against."""
        body = [[method_label(method), *self._cells(method, _shown_difference)] for method in JUDGED_AGAINST]
        return TextTable(f"{self.benchmark}: {method_label(RECOMMENDED)}, minus", ["", *self._columns], body)

    @property
    def every_method(self) -> TextTable:
        """Every method."""
        return self._whole("all", self._lines, _mean)

    @property
    def summary(self) -> TextTable:
        """`judged` without its intervals; its lines say which benchmark they are of."""
        whole = self._whole("summary", self._shown, _mean)
        body = [[self.benchmark, name, *numbers] for name, _, *numbers in whole.body]
        return TextTable(whole.title, ["benchmark", "method", *whole.header[2:]], body)

    @property
    def _shown(self) -> list[Method]:
        """The recommended score, what it is judged against, and ``auto`` where that was among the scores."""
        return [RECOMMENDED, *JUDGED_AGAINST, *(method for method in CHOSEN if method in self._lines)]

    def _whole(self, title: str, methods: Iterable[Method], show: "_Show") -> TextTable:
        header = ["", "seeds", *self._columns, "ID accuracy ↑"]
        body = [
            [method_label(method), self._seeds(method), *self._cells(method, show), self._accuracy(method)]
            for method in methods
        ]
        return TextTable(f"{self.benchmark}: {title}", header, body)

    @property
    def _columns(self) -> list[str]:
        return [_column(group, metric) for group in self._groups for metric in COMPARED_COLUMNS]

    def _cells(self, method: Method, show: "_Show") -> list[str]:
        return [show(line, metric) for line in self._lines[method] for metric in COMPARED_COLUMNS]

    def _seeds(self, method: Method) -> str:
        is_random = bool(method.variant) or method.backbone == "finetuned"
        return str(self._lines[method][0]["n_seeds"]) if is_random else "–"

    def _accuracy(self, method: Method) -> str:
        return _mean(self._lines[method][0], "id_accuracy")


_Show = Callable[[Mapping[str, Any], str], str]  # a cell, of a line and a metric


def pair_tables(study: JudgedStudy) -> list[TextTable]:
    """Paired differences of methods that a study has."""
    columns = [(group, metric) for group in study.groups for metric in COMPARED_COLUMNS]
    return [
        TextTable(
            f"{study.config.name}: {title}",
            ["", "minus", *(_column(group, metric) for group, metric in columns)],
            [[*map(method_label, pair), *(_difference(study, *pair, *column) for column in columns)] for pair in pairs],
        )
        for title, pairs_of in PAIRS.items()
        if (pairs := pairs_of(study.config))
    ]


def _difference(study: JudgedStudy, method: Method, other: Method, group: str, metric: str) -> str:
    found = study.difference(method, other, group, metric)
    return _difference_text(found.mean, found.lo, found.hi, study.says[method, other, group, metric])


def _column(group: str, metric: str) -> str:
    return f"{group} {METRICS[metric].heading}"


def auto_table(study: JudgedStudy) -> TextTable:
    """What ``auto`` chose, and its regret: of the near sets, the far sets, and all, each to the best score of these."""
    columns = [(group, metric) for group in (*study.groups, "all") for metric in COMPARED_COLUMNS]
    return TextTable(
        f"{study.config.name}: what auto chose from ID images, and how far that is behind the best of all scores",
        ["", "chosen", *(_column(group, metric) for group, metric in columns)],
        [
            [
                method_label(method),
                ", ".join(study.scored.chosen[method]),
                *(f"{100 * study.regret(method, *column) + 0:.1f}" for column in columns),
            ]
            for method in methods_of(study.config)
            if method.score == AUTO
        ],
    )


def router_table(study: JudgedStudy) -> TextTable:
    """How often ID test images reach their class's expert, what the others cost, and how large each mixture is."""
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for entry in study.scored.id["router"]:
        if entry["experts"] > 1 and entry["backbone"] == "pretrained":
            by_variant.setdefault(entry["variant"], []).append(entry)
    head = RECOMMENDED.head
    body = []
    for variant, seeds in by_variant.items():
        accuracies = [[seed["accuracy"] for seed in seeds]]
        for routing in ("predicted", "top2", "oracle"):
            accuracies.append([own[routing][head] for seed in seeds if routing in (own := seed["id_accuracy"])])
        shown = [mean_text(float(np.mean(own)) if own else None, deviation(own)) for own in accuracies]
        parameters = f"{seeds[0]['parameters'] / 1e6:.1f} M"
        body.append([variant, str(len(seeds)), str(seeds[0]["experts"]), parameters, *shown])
    return TextTable(
        f"{study.config.name}: routing of ID test images, and their accuracy by the {head} head as they are routed",
        ["", "seeds", "experts", "parameters", "router accuracy", "predicted", "top 2", "true routes"],
        body,
    )


def _mean(line: Mapping[str, Any], metric: str) -> str:
    return mean_text(line[f"{metric}_mean"], line[f"{metric}_std"])


def _mean_and_interval(line: Mapping[str, Any], metric: str) -> str:
    return f"{_mean(line, metric)} [{100 * line[f'{metric}_lo']:.1f}, {100 * line[f'{metric}_hi']:.1f}]"


def _shown_difference(line: Mapping[str, Any], metric: str) -> str:
    return _difference_text(*(line[name] for name in difference_columns(f"recommended_minus_{metric}")))


def _difference_text(mean: float, lo: float, hi: float, says: str) -> str:
    return f"{100 * mean:+.1f} [{100 * lo:+.1f}, {100 * hi:+.1f}] {says}"
