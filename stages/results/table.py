"""The table: a row per detector and OOD set, averages per group, summary over seeds with paired differences."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.files.documents import write_text
from stages.metrics.bootstrap import bootstrap_each, resample_counts
from stages.metrics.intervals import Difference, SetParts, auroc_interval, fpr95_interval, verdicts
from stages.metrics.ranking import ood_metrics
from stages.results.formats import csv_cell_text, csv_text, latex_table, markdown_table, mean_text
from stages.results.method import BASELINES, METHOD_COLUMNS, Method

METRICS = ("auroc", "fpr95", "fpr95_ood", "aupr_in", "aupr_out")
COMPARED = ("auroc", "fpr95")  # those with a paired difference to each baseline
GROUPS = ("near", "far", "all")
HIGHER_IS_BETTER = {"auroc", "aupr_in", "aupr_out"}


@dataclass(frozen=True)
class OODRow:
    """A row of ``table.csv``; metrics are fractions, see `stages.metrics.ranking`, and intervals 95 %."""

    backbone: str
    features: str
    head: str
    variant: str
    seed: int | None
    routing: str
    score: str
    params: str
    profile: str
    calibrated: bool
    ood: str
    group: str
    n_id: int
    n_ood: int
    auroc: float
    fpr95: float
    fpr95_ood: float
    aupr_in: float
    aupr_out: float
    auroc_lo: float
    auroc_hi: float
    fpr95_lo: float
    fpr95_hi: float

    @property
    def method(self) -> Method:
        """All that names it, seed aside."""
        return Method(*(getattr(self, name) for name in METHOD_COLUMNS))


@dataclass(frozen=True, eq=False)
class Replicates:
    """Bootstrap replicates of a row's metrics, ``[R]`` each; the same resamples for every method, so they pair."""

    auroc: NDArray[np.float64]
    fpr95: NDArray[np.float64]


class Evaluator:
    """Metrics and paired bootstrap of one study's sets.

    Args:
        oods: name and group (``near`` or ``far``) of each OOD set, in order.
        sizes: rows of each set, the ID test set's under ``"id"``.
        replicates: R.
    """

    def __init__(self, oods: Sequence[tuple[str, str]], sizes: dict[str, int], replicates: int) -> None:
        self.oods = list(oods)
        self._sizes = sizes
        self._replicates = replicates

    @cached_property
    def counts(self) -> dict[str, NDArray[np.uint8]]:
        """How often each row of each set is drawn, ``[R, n]``."""
        # Seeds by position: the same study gives the same resamples, and every method gets the same.
        names = ["id", *(ood for ood, _ in self.oods)]
        return {name: resample_counts(self._sizes[name], self._replicates, seed) for seed, name in enumerate(names)}

    def rows(
        self, name: dict[str, Any], id_scores: NDArray[np.float32], ood_scores: dict[str, NDArray[np.float32]]
    ) -> list[tuple[OODRow, Replicates]]:
        """Rows of one detector: each OOD set, then the averages (none for oracle routing, a diagnostic).

        Args:
            name: the columns that name the detector.
            id_scores: ``[n_id]``, higher = more OOD.
            ood_scores: ``[n_ood]`` of each OOD set.
        """
        result: list[tuple[OODRow, Replicates]] = []
        names = [ood for ood, _ in self.oods]
        resampled = bootstrap_each(
            id_scores, [ood_scores[ood] for ood in names], self.counts["id"], [self.counts[ood] for ood in names]
        )
        parts = dict(zip(names, SetParts.of_each(id_scores, [ood_scores[ood] for ood in names]), strict=True))
        for (ood, group), drawn in zip(self.oods, resampled, strict=True):
            metrics = asdict(ood_metrics(id_scores, ood_scores[ood]))
            replicates = Replicates(drawn["auroc"], drawn["fpr95"])
            result.append((OODRow(**name, ood=ood, group=group, **metrics, **_intervals([parts[ood]])), replicates))
        if name["routing"] == "oracle":
            return result
        averages = []
        for group in GROUPS:
            members = [pair for pair in result if group in ("all", pair[0].group)]
            if not members:
                continue
            replicates = Replicates(
                np.mean([drawn.auroc for _, drawn in members], axis=0),
                np.mean([drawn.fpr95 for _, drawn in members], axis=0),
            )
            means: dict[str, Any] = {
                metric: float(np.mean([getattr(row, metric) for row, _ in members])) for metric in METRICS
            }
            sizes: dict[str, Any] = {"n_id": members[0][0].n_id, "n_ood": sum(row.n_ood for row, _ in members)}
            intervals = _intervals([parts[row.ood] for row, _ in members])
            averages.append((OODRow(**name, ood="average", group=group, **sizes, **means, **intervals), replicates))
        return result + averages


def _intervals(sets: Sequence[SetParts]) -> dict[str, Any]:
    auroc, fpr95 = auroc_interval(sets), fpr95_interval(sets)
    return {"auroc_lo": auroc.lo, "auroc_hi": auroc.hi, "fpr95_lo": fpr95.lo, "fpr95_hi": fpr95.hi}


def summarise(rows: Sequence[tuple[OODRow, Replicates]]) -> list[dict[str, Any]]:
    """One line per method and OOD set over seeds: mean, standard deviation, n, and paired differences.

    The difference of a method to a baseline is that of the means over seeds; its interval resamples ID and OOD images
    alike for both, and seeds where there are several. What it says holds the false discovery rate of all differences
    of the summary at 5 %, see `stages.metrics.intervals.verdicts`.
    """
    by_cell: dict[tuple[Any, ...], list[tuple[OODRow, Replicates]]] = {}
    for row, drawn in rows:
        by_cell.setdefault((row.method, row.ood, row.group), []).append((row, drawn))
    lines: list[dict[str, Any]] = []
    found: list[tuple[dict[str, Any], str, str, Difference]] = []
    for (method, ood, group), members in by_cell.items():
        first = members[0][0]
        line: dict[str, Any] = asdict(method) | {"ood": ood, "group": group, "n_seeds": len(members)}
        for metric in METRICS:
            values = [getattr(row, metric) for row, _ in members]
            line[f"{metric}_mean"] = float(np.mean(values))
            line[f"{metric}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        for label, baseline in BASELINES.items():
            reference = by_cell.get((baseline, ood, group))
            for metric in COMPARED:
                column = f"{metric}_minus_{label}"
                line |= dict.fromkeys(difference_columns(column))
                if reference is None or method == baseline:
                    continue
                sides = (over_seeds(members, metric), over_seeds(reference, metric))
                seeded = any(row.seed is not None for row, _ in (*members, *reference))
                found.append((line, metric, column, Difference.of(*sides, seeded, first.n_id, first.n_ood)))
        lines.append(line)
    told = verdicts([one for *_, one in found], [metric in HIGHER_IS_BETTER for _, metric, _, _ in found])
    for (line, _, column, one), says in zip(found, told, strict=True):
        line |= zip(difference_columns(column), (one.mean, one.lo, one.hi, says), strict=True)
    return lines


def difference_columns(column: str) -> list[str]:
    """Where a line has a difference, the ends of its interval, and what it says."""
    return [f"{column}{end}" for end in ("", "_lo", "_hi", "_says")]


def over_seeds(
    members: Sequence[tuple[OODRow, Replicates]], metric: str
) -> tuple[list[float], list[NDArray[np.float64]]]:
    """A metric of each seed, and its bootstrap replicates, as `Difference.of` takes them."""
    return [getattr(row, metric) for row, _ in members], [getattr(drawn, metric) for _, drawn in members]


# ------------------------------------------------------------------------------------------------------- exports


def write_table(folder: Path, rows: Sequence[OODRow], summary: Sequence[dict[str, Any]]) -> None:
    """Write ``table.csv``, ``table.json`` and the summary, see `write_summary`."""
    table = [asdict(row) for row in rows]
    write_text(folder / "table.csv", csv_text(table, [field.name for field in fields(OODRow)]))
    write_text(folder / "table.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    write_summary(folder, summary)


def write_summary(folder: Path, summary: Sequence[dict[str, Any]]) -> None:
    """Write ``summary.csv`` and ``.json``, which have all of it, and ``.md`` and ``.tex``, the averages for people.

    Lines of several studies have a column ``study``.
    """
    write_text(folder / "summary.csv", csv_text(summary, list(summary[0]) if summary else []))
    write_text(folder / "summary.json", json.dumps(list(summary), indent=1, ensure_ascii=False) + "\n")
    header, body = compact(summary)
    write_text(folder / "summary.md", markdown_table(header, body))
    write_text(folder / "summary.tex", latex_table(header, body, header.index("score") + 1))


def read_summary(folder: Path) -> list[dict[str, Any]]:
    """Read ``summary.csv`` back as `summarise` gave it."""
    with (folder / "summary.csv").open(encoding="utf-8", newline="") as file:
        return [{column: _parse(column, text) for column, text in line.items()} for line in csv.DictReader(file)]


def _parse(column: str, text: str) -> Any:
    if column == "calibrated":
        return text == "true"
    if column == "n_seeds":
        return int(text)
    if column.endswith("_says"):
        return text or None
    if column.startswith(METRICS):
        return float(text) if text else None
    return csv_cell_text(text)


def compact(summary: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The averages as a table for people: a line per method, per cent, near, far and all side by side.

    Returns:
        Header and cells. FPR95 has ID positive, as in the paper.
    """
    header = ["backbone", "features", "head", "variant", "routing", "score"]
    if summary and "study" in summary[0]:
        header.insert(0, "study")
    naming = (*header, "calibrated")
    metrics = [(group, metric) for group in GROUPS for metric in ("auroc", "fpr95")]
    header += [f"{group} {metric.upper()} {'↑' if metric in HIGHER_IS_BETTER else '↓'}" for group, metric in metrics]
    averages = [line for line in summary if line["ood"] == "average"]
    body = []
    for _, members in groupby(averages, key=lambda line: tuple(line[name] for name in naming)):
        cells = {line["group"]: line for line in members}
        first = next(iter(cells.values()))
        names = [str(first[name]) for name in naming[:-1]]
        names[-1] += " (calibrated)" if first["calibrated"] else ""
        body.append(names + [per_cent(cells.get(group), metric) for group, metric in metrics])
    return header, body


def per_cent(line: dict[str, Any] | None, metric: str) -> str:
    """``"93.1"``, with the deviation over seeds where there is one: ``"93.1 ± 0.4"``."""
    return "–" if line is None else mean_text(line[f"{metric}_mean"], line[f"{metric}_std"])
