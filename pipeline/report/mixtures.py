"""Sections about mixtures: routing, each expert, each class, and what their number and the controls make of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.report.figures import Points, Series, line_panel, scatter_panel
from pipeline.report.sections import accuracy_over_seeds, best, mean_if_known
from pipeline.report.study import ReportedStudy, TrainingLog
from pipeline.report.wording import COMPARED_METRICS, score_title
from stages.mixture.mixup import class_difficulty
from stages.results.method import NO_HEAD, RECOMMENDED, Method
from stages.results.scored_study import Line, Samples

_COST_HEAD = RECOMMENDED.head  # whose numbers say what a wrong route costs
_SHOWN_CLASSES = 20  # of more classes the others are folded away


def routers(study: ReportedStudy) -> list[Line]:
    """Router and ID accuracy over seeds; of the first seed the load: experts of two seeds are not the same ones."""
    names = ("backbone", "variant", "experts")
    lines = []
    for line in accuracy_over_seeds(study.scored.id["router"], names):
        own = [
            record["id_accuracy"] for record in study.scored.id["router"] if all(record[n] == line[n] for n in names)
        ]
        groups = study.groups(line["backbone"], line["variant"], line["seed"])
        classes: dict[int, list[str]] = {}
        for name, expert in groups.items():
            classes.setdefault(expert, []).append(name)
        share = {name: [n / sum(load) for n in load] for name, load in line["load"].items()}
        accuracy = {
            routing: mean_if_known([seed[routing][_COST_HEAD] for seed in own]) for routing in line["id_accuracy"]
        }
        own_experts = _experts(study, line, groups)
        lines.append(line | {"classes": classes, "share": share, "id_accuracy": accuracy, "by_expert": own_experts})
    return lines


def _id_samples(study: ReportedStudy, backbone: str, variant: str) -> Samples | None:
    """ID test images by the first seed's mixture and its refitted head; None where no score needed that head."""
    scored, wanted = study.scored, replace(RECOMMENDED, backbone=backbone, variant=variant)
    method = next((own for own in scored.lines if replace(own, score=wanted.score) == wanted), None)
    return None if method is None else scored.samples(method, scored.first_seed(method))["id"][0]


def _experts(study: ReportedStudy, line: Line, groups: Mapping[str, int]) -> dict[str, Any] | None:
    """Of the first seed: where ID test images of each group went, and how well each expert did with what it got."""
    samples = _id_samples(study, line["backbone"], line["variant"])
    if samples is None or samples.expert is None or not groups or not (samples.label != "").all():
        return None
    own = np.asarray([groups[name] for name in samples.label.tolist()])
    right = samples.prediction == samples.label
    n_experts = line["experts"]
    return {
        "confusion": confusion(own, samples.expert, n_experts),
        "lines": [
            {
                "expert": expert,
                "classes": sum(group == expert for group in groups.values()),
                "n": int((got := samples.expert == expert).sum()),
                "own_group": _mean(own[got] == expert),
                "accuracy": _mean(right[got]),
                "accuracy_own": _mean(right[got & (own == expert)]),
                "accuracy_of_group": _mean(right[own == expert]),
            }
            for expert in range(n_experts)
        ],
    }


def confusion(group: NDArray[np.integer], expert: NDArray[np.integer], n_experts: int) -> list[list[int]]:
    """Rows of each group (by line) that went to each expert (by column).

    >>> confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 2)
    [[1, 1], [0, 1]]
    """
    if max(group.max(), expert.max()) >= n_experts:
        raise ValueError(f"images of more than {n_experts} experts: the mixture was trained anew")
    counts = np.zeros((n_experts, n_experts), dtype=int)
    np.add.at(counts, (group, expert), 1)
    return [[int(count) for count in row] for row in counts]


def _mean(values: NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if values.size else None


def oracle(study: ReportedStudy) -> dict[str, list[list[Method]]]:
    """Methods routed by the true label, each with itself routed by the router (and to two), under their features."""
    sections: dict[str, list[list[Method]]] = {}
    for method in study.scored.lines:
        others = [replace(method, routing=routing) for routing in ("predicted", "top2")]
        found = [other for other in others if other in study.scored.lines]
        plain = method.head in (NO_HEAD, _COST_HEAD) and not method.calibrated
        has_choice = study.experts.get((method.backbone, method.variant)) != 1
        if method.routing == "oracle" and plain and has_choice and found:
            title = study.features(method.backbone, method.features, method.variant)
            sections.setdefault(title, []).append([method, *found])
    return sections


def classes(study: ReportedStudy) -> list[dict[str, Any]]:
    """Of every mixture whose log has it: difficulty, α, held-out accuracy and ID test accuracy of each class."""
    sections = []
    for log in study.logs:
        if lines := _class_lines(study, log):
            panels = [_class_panel(log, "α by difficulty", lines, "alpha", "α")]
            if known := [line for line in lines if line["test"] is not None]:
                panels.append(_class_panel(log, "ID test accuracy by difficulty", known, "test", "accuracy, %"))
            shown, more = lines[:_SHOWN_CLASSES], lines[_SHOWN_CLASSES:]
            sections.append({"title": log.title, "lines": shown, "more": more, "panels": panels})
    return sections


def _class_panel(log: TrainingLog, title: str, lines: Sequence[Line], column: str, name: str) -> tuple[str, str]:
    scale = 1 if column == "alpha" else 100
    points = np.asarray([[line["difficulty"], scale * line[column]] for line in lines], dtype=float)
    dots = Points("method" if column == "alpha" else "id", points, 6)
    return title, scatter_panel(f"{log.title}: {title}", [dots], ("difficulty d", name))


def _class_lines(study: ReportedStudy, log: TrainingLog) -> list[Line]:
    """A line a class, the hardest first, of the kept epoch of the first seed; none where nothing was mixed by class."""
    if log.mixture is None or log.kept_epoch is None or len(log.final) <= log.kept_epoch:
        return []
    kept = log.final[log.kept_epoch]
    if kept.get("accuracy") is None or kept.get("alpha") is None or len(log.classes) != len(kept["alpha"]):
        return []
    backbone, variant = log.mixture
    difficulty = class_difficulty(_accuracy_before(log.final, log.kept_epoch))
    samples = _id_samples(study, backbone, variant)
    groups = study.groups(backbone, variant, log.seed)
    lines = []
    for number, name in enumerate(log.classes):
        own = None if samples is None else samples.label == name
        lines.append(
            {
                "name": name,
                "expert": groups.get(name),
                "difficulty": float(difficulty[number]),
                "alpha": kept["alpha"][number],
                "held_out": kept["accuracy"][number],
                "test": None if samples is None or own is None else _mean(samples.prediction[own] == name),
                "n": 0 if own is None else int(own.sum()),
            }
        )
    return sorted(lines, key=lambda line: (-line["difficulty"], line["held_out"]))


def _accuracy_before(epochs: Sequence[Line], kept: int) -> NDArray[np.float64]:
    """``[C]`` accuracy that α of the kept epoch was made of: after the epoch before; at the first all are equal."""
    before = epochs[kept - 1]["accuracy"] if kept else None
    return np.zeros(len(epochs[kept]["alpha"])) if before is None else np.asarray(before, dtype=np.float64)


class Variant(NamedTuple):
    """A variant of the study.

    Attributes:
        method: the recommended score on it.
        record: its line of ``id.json``, of one seed.
        changed: settings that differ from the default's.
    """

    method: Method
    record: Line | None
    changed: Mapping[str, Any]

    @property
    def set(self) -> str:
        """What differs, for people."""
        return ", ".join(f"{key.removeprefix('train.')} = {value}" for key, value in self.changed.items())


def variants(study: ReportedStudy) -> dict[str, Any] | None:
    """The recommended score of every variant beside each other, and how the number of experts matters."""
    scored, recommended = study.scored, study.recommended
    if recommended is None or recommended.features != "mofe":
        return None
    own = [method for method in scored.lines if replace(method, variant=recommended.variant) == recommended]
    if len(own) < 2:
        return None
    records = {
        record["variant"]: record for record in study.scored.id["router"] if record["backbone"] == recommended.backbone
    }
    changed = {entry["name"]: entry["set"] for entry in (study.record.get("config") or {}).get("variants", ())}
    lines = [
        Variant(method, records.get(method.variant), changed.get(method.variant, {}))
        for method in sorted(own, key=lambda method: method.variant != "default")
    ]
    cells = {
        group: [study.scored.lines[method].get(("average", group)) for method in own]
        for group in study.scored.ood_groups
    }
    return {
        "lines": lines,
        "score": score_title(recommended),
        "best": {group: best(found) for group, found in cells.items()},
        "sweep": _sweep(study, [line for line in lines if set(line.changed) <= {"train.experts"}]),
    }


def _sweep(study: ReportedStudy, lines: Sequence[Variant]) -> list[dict[str, Any]]:
    """AUROC and FPR95 by the number of experts, where there are several; the default's number is one of them."""
    # Of two with one number the default's is kept.
    by_number = {line.record["experts"]: line.method for line in reversed(lines) if line.record is not None}
    if len(by_number) < 2:
        return []
    numbers = sorted(by_number)
    colours = {"near": "ood", "far": "far", "all": "method"}
    panels = []
    for metric in COMPARED_METRICS:
        series, legend = [], []
        for group in study.scored.ood_groups:
            cells = [study.scored.lines[by_number[number]][("average", group)] for number in numbers]
            series.append(Series(colours[group], [[100 * cell[f"{metric.name}_mean"] for cell in cells]]))
            legend.append((colours[group], False, f"{group} OOD"))
        svg = line_panel(f"{metric.title} by number of experts", numbers, series, ("experts", f"{metric.title}, %"))
        panels.append({"title": f"{metric.heading} by number of experts", "legend": legend, "svg": svg})
    return panels
