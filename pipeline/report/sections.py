"""Sections about scores: the table, every OOD set, distributions, training, thresholds, cost."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.report.figures import epoch_panel, histogram_panel, range_panel, roc_panel
from pipeline.report.study import ReportedStudy
from pipeline.report.wording import COMPARED_METRICS, SHOWN_METRICS, method_name, percent
from stages.detection.conformal import BatchPromise, FalseAlarms, rows_for_threshold
from stages.metrics.selective import SELECTIVE
from stages.progress import Progress
from stages.results.method import FROZEN_KNN, NO_HEAD, Method
from stages.results.scored_study import Line

_BATCH, _FDR = 100, 0.05  # images judged together, for which the page says what calibration rows can do


def table(study: ReportedStudy) -> dict[str, Any]:
    """Methods with averages (routing by the true label has none) under their features, the baseline first.

    The uncalibrated rows of the refitted head stand in front; other heads, calibrated rows and top-2 routing behind.
    """
    scored = study.scored
    methods = [method for method in scored.lines if scored.average(method) is not None]
    front, behind = (
        _sections(study, [method for method in methods if _stands_in_front(method) == wanted])
        for wanted in (True, False)
    )
    cells = {group: [scored.lines[method].get(("average", group)) for method in methods] for group in scored.ood_groups}
    return {
        "parts": [part for part in (front, behind) if part],
        "n_methods": len(methods),
        "best": {group: best(lines) for group, lines in cells.items()},
        "n_sets": {group: sum(group in ("all", own) for _, own in study.oods) for group in scored.ood_groups},
        "heads": {method.head for method in methods},
        "calibrated": any(method.calibrated for method in methods),
        "top2": any(method.routing == "top2" for method in methods),
    }


def _stands_in_front(method: Method) -> bool:
    has_main_head = method.features == "cls" or method.head in (NO_HEAD, "refit") or method.score == "mos"
    return not method.calibrated and method.routing != "top2" and has_main_head


def _sections(study: ReportedStudy, methods: Iterable[Method]) -> dict[str, list[Method]]:
    sections: dict[str, list[Method]] = {}
    for method in methods:
        sections.setdefault(study.features(method.backbone, method.features, method.variant), []).append(method)
    return sections


def per_set(study: ReportedStudy) -> dict[str, Any]:
    """Every OOD set for the frozen baselines and the recommended method."""
    methods = study.compared
    lines = {ood: [study.scored.lines[method].get(ood) for method in methods] for ood in study.oods}
    everything = [line for own in lines.values() for line in own]
    return {
        "methods": methods,
        "best": {name: best(lines[name, group]) for name, group in study.oods},
        "scales": {metric.name: _scale(everything, metric.name) for metric in COMPARED_METRICS},
    }


def best(lines: Iterable[Line | None]) -> dict[str, str]:
    """The best of each metric as it is shown: what looks equal is equally good."""
    known = [line for line in lines if line is not None]
    return {
        metric.name: percent(metric.best([line[f"{metric.name}_mean"] for line in known])) for metric in SHOWN_METRICS
    }


def _scale(lines: Iterable[Line | None], metric: str) -> tuple[float, float]:
    """Where the drawn intervals of a column begin, and how far they go; 0 is always on it."""
    columns = [f"{metric}_minus_knn{end}" for end in ("", "_lo", "_hi")]
    known = [line for line in lines if line is not None and line[columns[0]] is not None]
    values = [0.0, *(line[column] for line in known for column in columns)]
    return min(values), (max(values) - min(values)) or 1.0


def distributions(study: ReportedStudy, progress: Progress) -> dict[str, Any]:
    """Histograms and ROC curves of every OOD set, for the baseline and the recommended method."""
    scored = study.scored
    shown = [method for method in study.compared if method in (FROZEN_KNN, study.recommended)]
    methods = dict(zip(("baseline", "method"), shown, strict=False))
    scores = {colour: scored.scores(method, scored.first_seed(method)) for colour, method in methods.items()}
    panels: dict[str, list[tuple[str, str]]] = {}
    for ood, _ in study.oods:
        panels[ood] = []
        for colour, method in methods.items():
            title = f"{method_name(method)}: scores of ID and {ood}"
            cut = scored.threshold(method, 0.95)
            own = scores[colour]["id"], scores[colour][ood], cut["threshold"] if cut else None
            panels[ood].append((method_name(method), histogram_panel(title, *own)))
        curves = {colour: (own["id"], own[ood]) for colour, own in scores.items()}
        panels[ood].append(("ROC", roc_panel(f"ROC of ID against {ood}", curves)))
        progress.advance()
    return {"methods": methods, "panels": panels, "seed": scored.first_seed(shown[-1])}


def selective(study: ReportedStudy) -> dict[str, Any]:
    """AURC and AUGRC of the methods that stand in front and have a head, under their features; the best of each."""
    scored = study.scored
    lines = {method: line for method in scored.lines if (line := scored.average(method)) is not None}
    shown = [method for method, line in lines.items() if _stands_in_front(method) and line.get("aurc_mean") is not None]
    spectrum = [f"fsood_{name}" for name in SELECTIVE] if scored.shifted else []
    columns = [f"{name}_mean" for name in (*SELECTIVE, *spectrum)]
    return {
        "parts": _sections(study, shown),
        "columns": columns,
        "titles": [metric.title for metric in SELECTIVE.values()],
        "best": {
            column: min((own for method in shown if (own := lines[method][column]) is not None), default=None)
            for column in columns
        },
    }


def shifted(study: ReportedStudy) -> dict[str, Any]:
    """Covariate-shifted ID sets beside the ID test set, and ID with them in it, for the methods that are compared."""
    scored = study.scored
    found = accuracy_over_seeds(
        scored.id.get("shifted_accuracy", []), ("backbone", "features", "variant", "head", "set")
    )
    accuracy = {
        (method, line["set"]): line
        for method in study.compared
        for line in found
        if all(line[name] == getattr(method, name) for name in ("backbone", "features", "variant", "head"))
    }
    return {"sets": scored.shifted, "accuracy": accuracy, "methods": study.compared}


def accuracy_over_seeds(records: Sequence[Line], names: Sequence[str]) -> list[Line]:
    """Accuracies as mean and standard deviation over seeds; None where ID test images have no labels."""
    by_name: dict[tuple[Any, ...], list[Line]] = {}
    for record in records:
        by_name.setdefault(tuple(record[name] for name in names), []).append(record)
    lines = []
    for members in by_name.values():
        values = [record["accuracy"] for record in members]
        known = None not in values
        deviation = float(np.std(values, ddof=1)) if known and len(values) > 1 else None
        lines.append(members[0] | {"accuracy_mean": mean_if_known(values), "accuracy_std": deviation})
    return lines


def mean_if_known(values: Sequence[float | None]) -> float | None:
    """Mean of accuracies; None where one is not known.

    >>> mean_if_known([0.5, 1.0]), mean_if_known([None])
    (0.75, None)
    """
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def training(study: ReportedStudy, progress: Progress) -> list[dict[str, Any]]:
    """Loss, accuracy and range of α per epoch."""
    sections = []
    for log in study.logs:
        names = ("router_accuracy", "router") if "router_accuracy" in log.runs[0][0] else ("train_accuracy", "training")
        loss = {"training": log.series("method", "loss"), "held out": log.series("ood", "select_loss", dashed=True)}
        accuracy = {
            "held-out rows": log.series("method", "select_accuracy"),
            names[1]: log.series("baseline", names[0], dashed=True),
        }
        panels = []
        for title, lines in (("Loss", loss), ("Accuracy", accuracy)):
            svg = epoch_panel(
                f"{log.title}: {title}", [*lines.values()], log.best_epoch, title == "Accuracy", log.first
            )
            legend = [(line.colour, line.dashed, meaning) for meaning, line in lines.items()]
            panels.append({"title": title, "legend": legend, "svg": svg})
        alpha = [
            [line["alpha"] for line in run if line["epoch"] >= 0]
            for run in log.runs
            if run[-1].get("alpha") is not None
        ]
        if alpha:
            svg = range_panel(f"{log.title}: Mixup α", alpha, log.best_epoch)
            legend = [("method", False, "smallest, median and largest over classes")]
            panels.append({"title": "Mixup α", "legend": legend, "svg": svg})
        sections.append({"title": log.title, "panels": panels, "n_runs": len(log.runs), "best": log.best_epoch})
        progress.advance()
    return sections


def thresholds(study: ReportedStudy) -> dict[str, Any]:
    """Thresholds of the first seed by method and share of ID admitted, and what they promise."""
    by_method = study.scored.first_thresholds
    admits = sorted({line["admit"] for line in study.scored.thresholds})
    shown = [method for method in (FROZEN_KNN, study.recommended) if method in by_method]
    rows = sorted({line["n"] for method in shown for line in by_method[method].values()})
    promises = [promise for n in rows for promise in _promises(n, admits)]
    return {"admits": admits, "shown": dict.fromkeys(shown), "all": by_method, "promises": promises}


def _promises(n: int, admits: Sequence[float]) -> Iterator[tuple[str, str]]:
    """What n calibration rows promise: of what, and the promise or why there is none."""
    for admit in admits:
        alarms = FalseAlarms.of(n, admit)
        none = f"none: it needs {rows_for_threshold(admit)} calibration rows, there are {n}"
        yield f"Threshold for {100 * admit:g} % of ID", none if alarms is None else alarms.words(n)
    batch = BatchPromise.of(n, _BATCH, _FDR)
    yield (
        f"A batch of {_BATCH}, false discovery rate {100 * _FDR:g} %",
        batch.too_few or f"with these {n} rows one image can be flagged by itself",
    )


def cost(study: ReportedStudy) -> dict[str, Any]:
    """What the run took: stages with their time and memory, and the caches that are still there."""
    stages = study.record.get("stages", {})
    caches = [
        {
            "set": name,
            "rows": cache.n_rows,
            "bytes": (n_bytes := sum(shard.nbytes for shard in cache.manifest.shards)),
            "bytes_per_row": n_bytes / max(cache.n_rows, 1),
        }
        for name, cache in study.evidence.caches.items()
    ]
    return {
        "stages": {name: stage for name, stage in stages.items() if name != "report"},
        "seconds": sum(stage["duration_s"] for name, stage in stages.items() if name != "report"),
        "caches": caches,
        "cache_bytes": sum(cache["bytes"] for cache in caches),
    }
