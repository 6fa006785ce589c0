"""The report: one HTML file made of what the stages left under ``work``; no network, no script, no image is opened.

`write_report` reads (`_Study`), shapes what the tables and panels need, and renders ``templates/report.html.j2``,
which formats. What a study does not have (mixtures, several seeds, a group of OOD sets) is left out.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.figures import Floats, Series, epoch_panel, histogram_panel, range_panel, roc_panel
from stages.artifacts import read_json, write_text
from stages.errors import InputError
from stages.progress import NullProgress, Progress
from stages.table import BASELINES, GROUPS, read_summary

Line = dict[str, Any]  # of summary.csv, table.json, id.json, thresholds.json
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)


class Method(NamedTuple):
    """All that names a method, seed aside; compares equal to the tuples of `stages.table`."""

    backbone: str
    features: str
    head: str
    variant: str
    routing: str
    score: str
    calibrated: str

    @classmethod
    def of(cls, line: Line) -> "Method":
        """The method that a line of a table is about."""
        return cls(*(str(line[field]) for field in cls._fields))


BASELINE = Method(*BASELINES["knn"])
SECOND_BASELINE = Method(*BASELINES["knn+energy"])


class Metric(NamedTuple):
    """A column of the page."""

    column: str
    name: str
    arrow: str
    positive: str  # which class FPR95 takes as positive


METRICS = (
    Metric("auroc", "AUROC", "↑", ""),
    Metric("fpr95", "FPR95", "↓", "ID positive"),
    Metric("fpr95_ood", "FPR95", "↓", "OOD positive"),
)
COMPARED = METRICS[:2]  # those with a paired difference in the summary

_COST_HEAD = "refit"  # whose numbers say what a wrong route costs
HEADS = {  # what the page says of each
    "probe": "Linear probe on the backbone's own features.",
    "finetune": "The linear head that was trained together with the backbone.",
    "trained": "The experts' own heads, as they trained the experts.",
    "refit": "One regularised linear head over all classes, fitted on the refined features after training.",
    "refit-group": "The same for each expert, over its own group's classes.",
    "given": "Logits that came with the features.",
}
ROUTINGS = ("predicted", "top2", "oracle")
KINDS = {
    "end": "Each expert is a copy of the backbone's own end.",
    "adapter": "Each expert is a small bottleneck added to the frozen features.",
    "frozen": "No experts: a head with “other” for each group, on the frozen features (MOS).",
    "dense": "One network of as many parameters as all experts have; nothing is routed.",
}


def write_report(work: Path, progress: Progress | None = None) -> Path:
    """Write ``<work>/report/index.html``; the same files give the same bytes.

    Args:
        work: folder of a study that was scored.
        progress: counts OOD sets and training logs.

    Returns:
        Path of the page.

    Raises:
        InputError: something that ``score`` writes is missing or damaged.
    """
    from jinja2 import UndefinedError

    try:
        page = _render(_Study(work), progress or NullProgress())
    except (*_DAMAGE, UndefinedError) as error:
        raise InputError(
            f"{work / 'scores'} or record.json is not as this version writes it ({error}): delete them, run make score"
        ) from error
    path = work / "report" / "index.html"
    write_text(path, page)
    return path


def _render(study: "_Study", progress: Progress) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "verdict": verdict,
        "duration": duration,
        "score_title": score_title,
        "method_name": method_name,
    }
    progress.start(len(study.oods) + len(study.logs), "plot", "report")
    page = environment.get_template("report.html.j2").render(
        study=study,
        config=study.record.get("config"),
        config_text=json.dumps(study.record.get("config"), indent=2, ensure_ascii=False),
        metrics=METRICS,
        compared=COMPARED,
        baseline=BASELINE,
        heads=HEADS,
        kinds=KINDS,
        table=_table(study),
        sets=_per_set(study),
        distributions=_distributions(study, progress),
        accuracy=_over_seeds(study.id["accuracy"], ("backbone", "features", "variant", "head")),
        routers=(routers := _routers(study)),
        routings=[name for name in ROUTINGS if any(name in line["id_accuracy"] for line in routers)],
        oracle=_oracle(study),
        training=_training(study, progress),
        thresholds=_thresholds(study),
    )
    progress.close()
    return page


# -------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class TrainingLog:
    """What ``metrics.jsonl`` of one variant (all its seeds) or of the fine-tune says."""

    title: str
    runs: list[list[Line]]  # a line an epoch, for every seed and fold
    best_epoch: int | None

    def series(self, colour: str, name: str, dashed: bool = False) -> Series:
        """One of its values over the epochs of every run."""
        return Series(colour, [[line.get(name) for line in run] for run in self.runs], dashed)


class _Study:
    """What lies under ``work``.

    Attributes:
        lines: of each method the lines of the summary, by (OOD set or ``"average"``, group); the baseline first.
        rows: of ``table.json``.
        oods: (name, group) of each OOD set, near ones first.
        groups: those that have averages.
        recommended: what `predict` takes where nothing is asked, if it was scored.
    """

    def __init__(self, work: Path) -> None:
        self.folder = work
        scores = work / "scores"
        self.rows: list[Line] = _read(scores / "table.json", _load_list)
        summary: list[Line] = _read(scores / "summary.csv", lambda path: read_summary(path.parent))
        self.id: Line = _read(scores / "id.json", _load_object)
        self.thresholds: list[Line] = _read(scores / "thresholds.json", _load_list)
        self.record: Line = _read(work / "record.json", _load_object)
        if not summary or not self.rows:
            raise InputError(f"{scores} holds no result: run make score")
        lines: dict[Method, dict[tuple[str, str], Line]] = {}
        for line in summary:
            lines.setdefault(Method.of(line), {})[line["ood"], line["group"]] = line
        self.lines = dict(sorted(lines.items(), key=lambda item: item[0] != BASELINE))
        sets = dict.fromkeys((line["ood"], line["group"]) for line in summary if line["ood"] != "average")
        self.oods = sorted(sets, key=lambda ood: GROUPS.index(ood[1]))
        self.groups = [group for group in GROUPS if any(("average", group) in cells for cells in lines.values())]
        self.n_id: int = self.rows[0]["n_id"]
        self.n_ood: dict[str, int] = {row["ood"]: row["n_ood"] for row in self.rows}
        self.n_seeds: int = max(line["n_seeds"] for line in summary)
        self.experts = {(r["backbone"], r["variant"]): r["experts"] for r in self.id["router"]}
        self.recommended = self._recommended()
        self.logs = list(self._logs())

    def average(self, method: Method) -> Line | None:
        """The averages over all OOD sets; None for a diagnostic that has none."""
        return self.lines.get(method, {}).get(("average", "all"))

    def seed(self, method: Method) -> int | None:
        """The first seed that a method was run with; None where nothing is random."""
        seeds = (row["seed"] for row in self.rows if Method.of(row) == method)
        return min((seed for seed in seeds if seed is not None), default=None)

    def row(self, method: Method, ood: str, group: str) -> Line | None:
        """The row of ``table.json``, with its intervals, of a method that ran with one seed."""
        rows = [row for row in self.rows if Method.of(row) == method and (row["ood"], row["group"]) == (ood, group)]
        return rows[0] if len(rows) == 1 else None

    def features(self, backbone: str, features: str, variant: str) -> str:
        """Name of a choice of features."""
        if features == "cls":
            return {"pretrained": "Frozen backbone", "finetuned": "Fine-tuned backbone"}[backbone]
        experts = self.experts.get((backbone, variant))
        parts = [
            "MoFE",
            variant,
            f"{experts} expert{'s' if experts != 1 else ''}" if experts else "",
            f"{backbone} backbone" if len({method.backbone for method in self.lines}) > 1 else "",
        ]
        return " · ".join(filter(None, parts))

    def scores(self, method: Method) -> dict[str, Floats]:
        """Scores of each set's images by the first seed's model; the ID test set's under ``"id"``."""
        import pyarrow.parquet as pq

        seed = "none" if (first := self.seed(method)) is None else str(first)
        name = "-".join(
            (method.backbone, method.features, method.head, method.variant or "none", seed, method.routing),
        )
        path = self.folder / "scores" / "samples" / f"{name}.parquet"
        column = score_name(method)
        table = _read(path, lambda path: pq.read_table(path, columns=["set", column]).select(["set", column]))
        sets = np.asarray(table["set"].to_pylist())
        values = table[column].to_numpy()
        oods = [ood for ood, _ in self.oods]
        found = {"id": values[~np.isin(sets, oods)]} | {ood: values[sets == ood] for ood in oods}
        if empty := [name for name, own in found.items() if not len(own)]:
            raise InputError(f"{path} holds no image of {empty[0]}: run make score")
        return found

    def threshold(self, method: Method, admit: float) -> Line | None:
        """The first seed's threshold that admits a share of ID."""
        asked = (method, self.seed(method), admit)
        return next((t for t in self.thresholds if (Method.of(t), t["seed"], t["admit"]) == asked), None)

    def classes(self, backbone: str, variant: str, seed: int) -> dict[int, list[str]]:
        """Class names of each expert; empty where the mixture is gone."""
        about = read_json(self.folder / "model" / backbone / variant / f"seed-{seed}" / "mofe.json") or {}
        found: dict[int, list[str]] = {}
        for name, expert in about.get("groups", {}).items():
            found.setdefault(expert, []).append(name)
        return found

    def _recommended(self) -> Method | None:
        mixture = Method(BASELINE.backbone, "mofe", "refit", "", "predicted", "knn+energy", "False")
        found = [method for method in self.lines if method._replace(variant="") == mixture]
        return next((method for method in [*found, SECOND_BASELINE] if method in self.lines), None)

    def _logs(self) -> Iterator[TrainingLog]:
        mixtures = self.folder.glob("model/*/*/seed-*/metrics.jsonl")
        paths = [*mixtures, *self.folder.glob("finetune/seed-*/metrics.jsonl")]

        def order(path: Path) -> tuple[bool, bool, str, bool, str, int]:
            *_, model, backbone, variant, seed, _ = path.parts
            number = int(seed.removeprefix("seed-"))
            return model != "model", backbone != "pretrained", backbone, variant != "default", variant, number

        for folder, members in groupby(sorted(paths, key=order), key=lambda path: path.parent.parent):
            files = list(members)
            runs = [run for path in files for run in _read(path, _load_runs)]
            about = read_json(files[0].parent / "mofe.json") or {}
            is_mixture = folder.parent.parent.name == "model"
            yield TrainingLog(
                title=f"MoFE · {folder.name} · {folder.parent.name} backbone" if is_mixture else "Fine-tune",
                runs=runs,
                best_epoch=about.get("best_epoch") if len(runs) == 1 else None,
            )


def _read(path: Path, load: Callable[[Path], Any]) -> Any:
    try:
        return load(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: run make score") from None
    except _DAMAGE as error:
        raise InputError(f"{path} cannot be read ({error}): delete it and run make score") from error


def _load_list(path: Path) -> list[Line]:
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, list):
        raise TypeError("a list expected")
    return value


def _load_object(path: Path) -> Line:
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        raise TypeError("an object expected")
    return value


def _load_runs(path: Path) -> list[list[Line]]:
    by_run: dict[str, list[Line]] = {}
    for text in path.read_text("utf-8").splitlines():
        line = json.loads(text)
        by_run.setdefault(line.get("run", ""), []).append(line)
    return list(by_run.values())


# -------------------------------------------------------------------------------------------------------- shaping


def _table(study: _Study) -> dict[str, Any]:
    """Methods with averages (routing by the true label has none) under their features, the baseline first."""
    methods = [method for method in study.lines if study.average(method) is not None]
    sections: dict[str, list[Method]] = {}
    for method in methods:
        title = study.features(method.backbone, method.features, method.variant)
        sections.setdefault(title, []).append(method)
    cells = {group: [study.lines[method].get(("average", group)) for method in methods] for group in study.groups}
    return {
        "sections": sections,
        "best": {group: _best(lines) for group, lines in cells.items()},
        "n_sets": {group: sum(group in ("all", own) for _, own in study.oods) for group in study.groups},
        "heads": {method.head for method in methods},
        "calibrated": any(method.calibrated == "True" for method in methods),
        "top2": any(method.routing == "top2" for method in methods),
    }


def _per_set(study: _Study) -> dict[str, Any]:
    """Every OOD set for the frozen baselines and the recommended method."""
    methods = [m for m in dict.fromkeys((BASELINE, SECOND_BASELINE, study.recommended)) if m in study.lines]
    lines = {ood: [study.lines[method].get(ood) for method in methods if method] for ood in study.oods}
    everything = [line for own in lines.values() for line in own]
    return {
        "methods": methods,
        "best": {name: _best(lines[name, group]) for name, group in study.oods},
        "scales": {metric.column: _scale(everything, metric.column) for metric in COMPARED},
    }


def _best(lines: Iterable[Line | None]) -> dict[str, str]:
    """The best of each metric as it is shown: what looks equal is equally good."""
    known = [line for line in lines if line is not None]
    return {
        metric.column: percent((max if metric.arrow == "↑" else min)(line[f"{metric.column}_mean"] for line in known))
        for metric in METRICS
    }


def _scale(lines: Iterable[Line | None], metric: str) -> tuple[float, float]:
    """Where the drawn intervals of a column begin, and how far they go; 0 is always on it."""
    columns = [f"{metric}_minus_knn{end}" for end in ("", "_lo", "_hi")]
    known = [line for line in lines if line is not None and line[columns[0]] is not None]
    values = [0.0, *(line[column] for line in known for column in columns)]
    return min(values), (max(values) - min(values)) or 1.0


def _distributions(study: _Study, progress: Progress) -> dict[str, Any]:
    """Histograms and ROC curves of every OOD set, for the baseline and the recommended method."""
    shown = [method for method in dict.fromkeys((BASELINE, study.recommended)) if method in study.lines]
    methods = dict(zip(("baseline", "method"), [method for method in shown if method], strict=False))
    scores = {colour: study.scores(method) for colour, method in methods.items()}
    panels: dict[str, list[tuple[str, str]]] = {}
    for ood, _ in study.oods:
        panels[ood] = []
        for colour, method in methods.items():
            title = f"{method_name(method)}: scores of ID and {ood}"
            cut = study.threshold(method, 0.95)
            own = scores[colour]["id"], scores[colour][ood], cut["threshold"] if cut else None
            panels[ood].append((method_name(method), histogram_panel(title, *own)))
        curves = {colour: (own["id"], own[ood]) for colour, own in scores.items()}
        panels[ood].append(("ROC", roc_panel(f"ROC of ID against {ood}", curves)))
        progress.advance()
    return {"methods": methods, "panels": panels, "seed": study.seed(shown[-1]) if shown[-1] else None}


def _over_seeds(records: Sequence[Line], names: Sequence[str]) -> list[Line]:
    """Accuracies as mean and standard deviation over seeds."""
    by_name: dict[tuple[Any, ...], list[Line]] = {}
    for record in records:
        by_name.setdefault(tuple(record[name] for name in names), []).append(record)
    lines = []
    for members in by_name.values():
        values = [record["accuracy"] for record in members]
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        lines.append(members[0] | {"accuracy_mean": float(np.mean(values)), "accuracy_std": deviation})
    return lines


def _routers(study: _Study) -> list[Line]:
    """Router and ID accuracy over seeds; of the first seed the load: experts of two seeds are not the same ones."""
    names = ("backbone", "variant", "experts")
    lines = []
    for line in _over_seeds(study.id["router"], names):
        own = [record["id_accuracy"] for record in study.id["router"] if all(record[n] == line[n] for n in names)]
        classes = study.classes(line["backbone"], line["variant"], line["seed"])
        share = {name: [n / sum(load) for n in load] for name, load in line["load"].items()}
        accuracy = {
            routing: float(np.mean([seed[routing][_COST_HEAD] for seed in own])) for routing in line["id_accuracy"]
        }
        lines.append(line | {"classes": classes, "share": share, "id_accuracy": accuracy})
    return lines


def _oracle(study: _Study) -> dict[str, list[list[Method]]]:
    """Methods routed by the true label, each with itself routed by the router (and to two), under their features."""
    sections: dict[str, list[list[Method]]] = {}
    for method in study.lines:
        others = [method._replace(routing=routing) for routing in ("predicted", "top2")]
        found = [other for other in others if other in study.lines]
        plain = method.head in ("none", _COST_HEAD) and method.calibrated == "False"
        has_choice = study.experts.get((method.backbone, method.variant)) != 1
        if method.routing == "oracle" and plain and has_choice and found:
            title = study.features(method.backbone, method.features, method.variant)
            sections.setdefault(title, []).append([method, *found])
    return sections


def _training(study: _Study, progress: Progress) -> list[dict[str, Any]]:
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
            svg = epoch_panel(f"{log.title}: {title}", [*lines.values()], log.best_epoch, per_cent=title == "Accuracy")
            legend = [(line.colour, line.dashed, meaning) for meaning, line in lines.items()]
            panels.append({"title": title, "legend": legend, "svg": svg})
        alpha = [[line["alpha"] for line in run] for run in log.runs if run[0].get("alpha") is not None]
        if alpha:
            svg = range_panel(f"{log.title}: Mixup α", alpha, log.best_epoch)
            legend = [("method", False, "smallest, median and largest over classes")]
            panels.append({"title": "Mixup α", "legend": legend, "svg": svg})
        sections.append({"title": log.title, "panels": panels, "n_runs": len(log.runs), "best": log.best_epoch})
        progress.advance()
    return sections


def _thresholds(study: _Study) -> dict[str, Any]:
    """Thresholds of the first seed by method and share of ID admitted."""
    by_method: dict[Method, dict[float, Line]] = {}
    for line in study.thresholds:
        if line["seed"] == study.seed(Method.of(line)):
            by_method.setdefault(Method.of(line), {})[line["admit"]] = line
    admits = sorted({line["admit"] for line in study.thresholds})
    shown = [method for method in (BASELINE, study.recommended) if method in by_method]
    return {"admits": admits, "shown": dict.fromkeys(shown), "all": by_method}


# ----------------------------------------------------------------------------------------------------- formatting


def score_name(method: Method) -> str:
    """A score's column in ``samples/*.parquet``."""
    return method.score + (" (calibrated)" if method.calibrated == "True" else "")


def score_title(method: Method) -> str:
    """A score as the field writes it: ``kNN+energy`` for ``knn+energy``."""
    names = {"knn": "kNN", "msp": "MSP", "ncm": "NCM", "mos": "MOS"}
    return "+".join(names.get(part, part) for part in method.score.split("+"))


def method_name(method: Method) -> str:
    """Short name of a method for people."""
    features = {"cls": "Frozen" if method.backbone == "pretrained" else "Fine-tuned", "mofe": "MoFE"}[method.features]
    return f"{features} {score_title(method)}" + (f" ({method.head})" if method.head not in ("none", "probe") else "")


def percent(fraction: float | None) -> str:
    """``93.1`` for 0.931.

    >>> percent(0.931), percent(None)
    ('93.1', '–')
    """
    return "–" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.1f}"


def points(fraction: float) -> str:
    """A difference in percentage points, signed.

    >>> points(0.012), points(-0.5), points(0.0)
    ('+1.2', '−50.0', '0.0')
    """
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def verdict(line: Mapping[str, Any], metric: Metric) -> str:
    """Whether the interval of the difference to the frozen kNN excludes 0: ``better``, ``worse`` or ``open``."""
    column = f"{metric.column}_minus_knn"
    if line[f"{column}_lo"] <= 0 <= line[f"{column}_hi"]:
        return "open"
    return "better" if (line[column] > 0) == (metric.arrow == "↑") else "worse"


def duration(seconds: float) -> str:
    """A duration for people.

    >>> duration(5.4), duration(192), duration(7260)
    ('5.4 s', '3 min 12 s', '2 h 1 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, hours = divmod(round(seconds), 60), divmod(round(seconds / 60), 60)
    return f"{minutes[0]} min {minutes[1]} s" if seconds < 3600 else f"{hours[0]} h {hours[1]} min"
