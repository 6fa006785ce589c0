"""The table: a row per detector and OOD set, averages per group, summary over seeds with paired differences."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.detection.sources import CS_ID
from stages.files.documents import write_text
from stages.metrics.bootstrap import Counts, Resamples, bootstrap_each, resample_counts
from stages.metrics.intervals import Difference, Interval, SetParts, auroc_interval, fpr95_interval, verdicts
from stages.metrics.ranking import METRICS, ood_metrics
from stages.metrics.selective import SELECTIVE, selective_metrics
from stages.results.formats import csv_cell_text, csv_text, latex_table, markdown_table, mean_text
from stages.results.method import BASELINES, Method
from stages.scorers import AUTO

GROUPS = ("near", "far", "all")
_COMPARED = [metric.name for metric in METRICS.values() if metric.compared]  # with a difference to each baseline
# The same with id-test and the covariate-shifted ID sets as one ID set: full-spectrum OOD (Zhang et al., OpenOOD v1.5).
_FULL_SPECTRUM = tuple(f"fsood_{name}" for name in (*METRICS, *SELECTIVE))
_BESIDE = (*SELECTIVE, *_FULL_SPECTRUM)  # empty where there is no head, no label, or no covariate-shifted ID set
COLUMNS = (  # of table.csv
    *("backbone", "features", "head", "variant", "seed", "routing", "score", "params", "profile", "calibrated"),
    *("ood", "group", "n_id", "n_ood"),
    *METRICS,
    *(f"{metric}_{end}" for metric in _COMPARED for end in Interval._fields),
    *(*SELECTIVE, "fsood_n_id", *_FULL_SPECTRUM),
    "labels",
)
_INTERVALS: Mapping[str, Callable[[Sequence[SetParts]], Interval]] = {"auroc": auroc_interval, "fpr95": fpr95_interval}

_HELD_COUNTS = 64 << 20  # bytes of a set's counts; more are drawn again for every method

Replicates = Mapping[str, NDArray[np.float64]]  # of compared metrics, [R]; of the same resamples for every method
Scored = Mapping[str, NDArray[np.float32]]  # of each set, ``[n]``
Failures = Mapping[str, NDArray[np.int8]]  # of each ID set, ``[n]``: 1 wrong, 0 right, -1 where nobody knows


@dataclass(frozen=True)
class MethodRun:
    """A method with a seed, and with the settings that were in force.

    Attributes:
        method: all that names it.
        seed: None where nothing is random.
        params: settings of the score, as JSON.
        profile: whose defaults they follow.
        labels: whose classes it depends on: ``given``, ``clusters`` of ID rows without labels, or ``none`` of these.
    """

    method: Method
    seed: int | None
    params: str
    profile: str
    labels: str = "given"

    @property
    def columns(self) -> dict[str, Any]:
        """As tables have it."""
        own = {"seed": self.seed, "params": self.params, "profile": self.profile, "labels": self.labels}
        return asdict(self.method) | own


@dataclass(frozen=True)
class OODRow:
    """A row of ``table.csv``.

    Attributes:
        run: what was scored.
        ood: name of the OOD set, or ``"average"``.
        group: ``near``, ``far`` or `CS_ID`; of averages also ``all``.
        n_id: ID rows.
        n_ood: OOD rows.
        metrics: of `stages.metrics.ranking.METRICS`, fractions.
        intervals: 95 %, of those that are compared.
        beside: areas of selective classification on ID rows, and what the full spectrum of ID rows makes of all that;
            what is not there is empty.
    """

    run: MethodRun
    ood: str
    group: str
    n_id: int
    n_ood: int
    metrics: Mapping[str, float]
    intervals: Mapping[str, Interval]
    beside: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, Any]:
        """As ``table.csv`` has it."""
        sizes = {"n_id": self.n_id, "n_ood": self.n_ood}
        ends = {
            f"{name}_{end}": value
            for name, own in self.intervals.items()
            for end, value in zip(own._fields, own, strict=True)
        }
        found = self.run.columns | {"ood": self.ood, "group": self.group} | sizes | dict(self.metrics) | ends
        found |= dict.fromkeys(("fsood_n_id", *_BESIDE)) | dict(self.beside)
        return {column: found[column] for column in COLUMNS}


class Evaluator:
    """Metrics and paired bootstrap of one study's sets.

    Args:
        oods: name and group of each OOD set (``near`` or ``far``) and of each covariate-shifted ID set (`CS_ID`).
        sizes: rows of each set, the ID test set's under ``"id"``.
        replicates: R.
    """

    def __init__(self, oods: Sequence[tuple[str, str]], sizes: dict[str, int], replicates: int) -> None:
        # Shifted ID last: so the others have the resamples that they have without it.
        self.oods = sorted(oods, key=lambda ood: ood[1] == CS_ID)
        self._sizes = sizes
        self._replicates = replicates

    @cached_property
    def counts(self) -> dict[str, Counts]:
        """How often each row of each set is drawn, ``[R, n]``; of a large set drawn anew for each method."""
        # Seeds by position: the same study gives the same resamples, and every method gets the same.
        names = ["id", *(ood for ood, _ in self.oods)]
        return {name: self._counts_of(self._sizes[name], seed) for seed, name in enumerate(names)}

    def _counts_of(self, n: int, seed: int) -> Counts:
        if n * self._replicates <= _HELD_COUNTS:
            return resample_counts(n, self._replicates, seed)
        return Resamples(n, self._replicates, seed)

    def rows(
        self,
        run: MethodRun,
        id_scores: NDArray[np.float32],
        ood_scores: Scored,
        failures: Failures | None = None,
    ) -> list[tuple[OODRow, Replicates]]:
        """Rows of one detector: each set, then the averages over OOD sets (none for oracle routing, a diagnostic).

        Args:
            run: what names the detector.
            id_scores: ``[n_id]``, higher = more OOD.
            ood_scores: ``[n]`` of each other set.
            failures: which ID rows its head gets wrong, those of the ID test set under ``"id"``; None without a head.
        """
        result: list[tuple[OODRow, Replicates]] = []
        names = [ood for ood, _ in self.oods]
        resampled = bootstrap_each(
            id_scores, [ood_scores[ood] for ood in names], self.counts["id"], [self.counts[ood] for ood in names]
        )
        parts = dict(zip(names, SetParts.of_each(id_scores, [ood_scores[ood] for ood in names]), strict=True))
        beside = self._beside({"id": id_scores} | dict(ood_scores), failures or {})
        for (ood, group), drawn in zip(self.oods, resampled, strict=True):
            found = asdict(ood_metrics(id_scores, ood_scores[ood]))
            metrics, intervals = {name: found[name] for name in METRICS}, _intervals([parts[ood]])
            row = OODRow(run, ood, group, found["n_id"], found["n_ood"], metrics, intervals, beside[ood])
            result.append((row, drawn))
        if run.method.routing == "oracle":
            return result
        of_ood = [pair for pair in result if pair[0].group != CS_ID]
        groups = {name: [pair for pair in of_ood if name in ("all", pair[0].group)] for name in GROUPS}
        return result + [_average(name, own, parts) for name, own in groups.items() if own]

    def _beside(self, scores: Scored, failures: Failures) -> dict[str, dict[str, float | None]]:
        """Of each set: what its row has beside the metrics; see `OODRow`."""
        own = _selective(scores, failures, ["id"])
        spectrum = ["id", *(name for name, group in self.oods if group == CS_ID)]
        if len(spectrum) == 1:
            return {ood: own for ood, _ in self.oods}
        ids = np.concatenate([scores[name] for name in spectrum])
        whole = {f"fsood_{name}": value for name, value in _selective(scores, failures, spectrum).items()}
        found: dict[str, dict[str, float | None]] = {}
        for ood, group in self.oods:
            found[ood] = own
            if group != CS_ID:
                metrics = asdict(ood_metrics(ids, scores[ood]))
                del metrics["n_ood"]
                found[ood] = own | {f"fsood_{name}": value for name, value in metrics.items()} | whole
        return found


def _selective(scores: Scored, failures: Failures, sets: Sequence[str]) -> dict[str, float | None]:
    """Areas of selective classification on several sets as one; empty where of one of them nothing is known."""
    if not all(name in failures and (failures[name] >= 0).any() for name in sets):
        return dict.fromkeys(SELECTIVE)
    return selective_metrics(*(np.concatenate([own[name] for name in sets]) for own in (scores, failures)))


def _average(
    group: str, members: Sequence[tuple[OODRow, Replicates]], parts: Mapping[str, SetParts]
) -> tuple[OODRow, Replicates]:
    """The unweighted mean of several sets' rows."""
    first, rows = members[0][0], [row for row, _ in members]
    metrics = {name: float(np.mean([row.metrics[name] for row in rows])) for name in METRICS}
    intervals = _intervals([parts[row.ood] for row in rows])
    beside = {name: _mean([row.beside[name] for row in rows]) for name in first.beside}
    n_ood = sum(row.n_ood for row in rows)
    average = OODRow(first.run, "average", group, first.n_id, n_ood, metrics, intervals, beside)
    return average, {name: np.mean([drawn[name] for _, drawn in members], axis=0) for name in _COMPARED}


def _mean(values: Sequence[float | None]) -> float | None:
    """Of what there is everywhere; what is the same everywhere stays as it is."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return known[0] if len(set(known)) == 1 else float(np.mean(known))


def _intervals(sets: Sequence[SetParts]) -> dict[str, Interval]:
    return {name: _INTERVALS[name](sets) for name in _COMPARED}


def summarise(rows: Sequence[tuple[OODRow, Replicates]]) -> list[dict[str, Any]]:
    """One line per method and set over seeds: mean, standard deviation, n, and paired differences.

    The difference of a method to a baseline is that of the means over seeds; its interval resamples ID and OOD images
    alike for both, and seeds where there are several. What it says holds the false discovery rate of all differences
    of the summary at 5 %, see `stages.metrics.intervals.verdicts`. Of ``auto`` it also says its regret.
    """
    by_cell: dict[tuple[Any, ...], list[tuple[OODRow, Replicates]]] = {}
    for row, drawn in rows:
        by_cell.setdefault((row.run.method, row.ood, row.group), []).append((row, drawn))
    lines: list[dict[str, Any]] = []
    found: list[tuple[dict[str, Any], str, str, Difference]] = []
    for (method, ood, group), members in by_cell.items():
        first = members[0][0]
        line: dict[str, Any] = asdict(method) | {"ood": ood, "group": group, "n_seeds": len(members)}
        for metric in METRICS:
            values = [row.metrics[metric] for row, _ in members]
            line[f"{metric}_mean"] = float(np.mean(values))
            line[f"{metric}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        for label, baseline in BASELINES.items():
            reference = by_cell.get((baseline, ood, group))
            for metric in _COMPARED:
                column = f"{metric}_minus_{label}"
                line |= dict.fromkeys(difference_columns(column))
                if reference is None or method == baseline or group == CS_ID:  # where neither direction is better
                    continue
                sides = (over_seeds(members, metric), over_seeds(reference, metric))
                seeded = any(row.run.seed is not None for row, _ in (*members, *reference))
                found.append((line, metric, column, Difference.of(*sides, seeded, first.n_id, first.n_ood)))
        for name in _BESIDE:
            known = [value for row, _ in members if (value := row.beside.get(name)) is not None]
            whole = len(known) == len(members)
            line[f"{name}_mean"] = float(np.mean(known)) if whole else None
            line[f"{name}_std"] = float(np.std(known, ddof=1)) if whole and len(known) > 1 else None
        line["labels"] = first.run.labels
        lines.append(line)
    _add_regrets(lines)
    told = verdicts([one for *_, one in found], [METRICS[metric].higher_is_better for _, metric, _, _ in found])
    for (line, _, column, one), says in zip(found, told, strict=True):
        line |= zip(difference_columns(column), (one.mean, one.lo, one.hi, says), strict=True)
    return lines


def _add_regrets(lines: Sequence[dict[str, Any]]) -> None:
    """Of ``auto``: how far it is behind the best of all scores of its backbone, which only OOD images tell."""
    best: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines:
        if line["score"] != AUTO and line["routing"] != "oracle":
            best.setdefault((line["backbone"], line["ood"], line["group"]), []).append(line)
    for line in lines:
        others = best.get((line["backbone"], line["ood"], line["group"]), [])
        for metric in _COMPARED:
            line[f"{metric}_regret"] = None
            if line["score"] == AUTO and others and line["group"] != CS_ID:
                value = METRICS[metric].best([other[f"{metric}_mean"] for other in others])
                sign = 1 if METRICS[metric].higher_is_better else -1
                line[f"{metric}_regret"] = sign * (value - line[f"{metric}_mean"])


def difference_columns(column: str) -> list[str]:
    """Where a line has a difference, the ends of its interval, and what it says."""
    return [f"{column}{end}" for end in ("", "_lo", "_hi", "_says")]


def over_seeds(
    members: Sequence[tuple[OODRow, Replicates]], metric: str
) -> tuple[list[float], list[NDArray[np.float64]]]:
    """A metric of each seed, and its bootstrap replicates, as `Difference.of` takes them."""
    return [row.metrics[metric] for row, _ in members], [drawn[metric] for _, drawn in members]


# ------------------------------------------------------------------------------------------------------- exports


def write_table(folder: Path, table: Sequence[dict[str, Any]], summary: Sequence[dict[str, Any]]) -> None:
    """Write ``table.csv``, ``table.json`` and the summary, see `write_summary`."""
    write_text(folder / "table.csv", csv_text(table, COLUMNS))
    write_text(folder / "table.json", json.dumps(list(table), indent=1, ensure_ascii=False) + "\n")
    write_summary(folder, summary)


def write_summary(folder: Path, summary: Sequence[dict[str, Any]]) -> None:
    """Write ``summary.csv`` and ``.json``, which have all of it, and ``.md`` and ``.tex``, the averages for people.

    Lines of several studies have a column ``study``.
    """
    columns = dict.fromkeys(column for line in summary for column in line)  # some studies may be of before a column
    write_text(folder / "summary.csv", csv_text(summary, list(columns)))
    write_text(folder / "summary.json", json.dumps(list(summary), indent=1, ensure_ascii=False) + "\n")
    header, body = compact(summary)
    write_text(folder / "summary.md", markdown_table(header, body))
    write_text(folder / "summary.tex", latex_table(header, body, header.index("score") + 1))


def read_summary(folder: Path) -> list[dict[str, Any]]:
    """Read ``summary.csv`` back as `summarise` gave it."""
    with (folder / "summary.csv").open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file)
        readers = {column: _reader(column) for column in lines.fieldnames or ()}
        return [{column: readers[column](text) for column, text in line.items()} for line in lines]


def _reader(column: str) -> Callable[[str], Any]:
    """What makes of a cell of a column what it says."""
    if column == "calibrated":
        return lambda text: text == "true"
    if column == "n_seeds":
        return int
    if column.endswith("_says"):
        return lambda text: text or None
    if column.startswith((*METRICS, *_BESIDE)):
        return lambda text: float(text) if text else None
    return csv_cell_text


def compact(summary: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The averages as a table for people: a line per method, per cent, near, far and all side by side.

    Returns:
        Header and cells. FPR95 has ID positive, as in the paper. Whose classes a line depends on is told where they are
        not everywhere those that were given.
    """
    header = ["backbone", "features", "head", "variant", "routing", "score"]
    if summary and "study" in summary[0]:
        header.insert(0, "study")
    summary = [line | {"labels": line.get("labels") or "given"} for line in summary]  # one of before does not say it
    if any(line["labels"] != "given" for line in summary):
        header.insert(-1, "labels")
    naming = (*header, "calibrated")
    metrics = [(group, metric) for group in GROUPS for metric in _COMPARED]
    header += [f"{group} {METRICS[metric].heading}" for group, metric in metrics]
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
