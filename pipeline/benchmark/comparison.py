"""What ``make results`` says: one recommended score against its baselines and beside all else that a study scored.

The recommended score is named here, before any run and for every benchmark alike, and so are the baselines. A
difference is that of the means over seeds (those that both methods have), with a 95 % interval over images and seeds,
ID and OOD resampled alike for both; it is a gain or a loss where the interval excludes 0 and the false discovery rate
of all differences of the page stays at 5 % (`stages.metrics.intervals`).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pipeline.config import JOINT, ConfigError, RunConfig
from stages.detection.detectors import NO_HEAD, reads_head
from stages.files.documents import read_document, write_text
from stages.metrics.intervals import Difference, verdicts
from stages.results.formats import csv_text, markdown_table
from stages.results.method import BASELINES, FROZEN_SUM, NO_ROUTING, RECOMMENDED, Method
from stages.results.scored_study import ScoredStudy
from stages.results.table import HIGHER_IS_BETTER, Evaluator, OODRow, Replicates, difference_columns, over_seeds

_METRICS = ("fpr95", "auroc")


# What the recommended score is judged against: the last is the same block as its experts, with nothing routed (E = 1).
JUDGED_AGAINST = (*BASELINES.values(), replace(RECOMMENDED, variant="dense-1"))
_NAMING = ("features", "head", "variant", "routing", "score", "backbone")  # columns of results.csv that name a method


def method_label(method: Method) -> str:
    """Name of a method for people."""
    head = "" if method.head == NO_HEAD else f" ({method.head})"
    routing = {"top2": ", top 2", "oracle": ", true routes (diagnostic)"}.get(method.routing, "")
    name = "frozen" if method.features == "cls" else f"MoFE {method.variant}{routing}"
    if method.backbone == "finetuned":
        name = "fine-tuned" if method.features == "cls" else f"fine-tuned, {name}"
    return f"{name}: {method.score}{head}"


def methods_of(config: RunConfig) -> list[Method]:
    """All rows of a study's results: each score frozen and refined, then the recommended one of every variant."""
    scores = [score for score in config.score.scores if score != "mos"]
    frozen = [_scored_by(FROZEN_SUM, score) for score in scores]
    refined = [_scored_by(RECOMMENDED, score) for score in scores]
    # Oracle routing sends ID images by their true label, which no deployment knows: it shows what wrong routes cost.
    routings = [replace(RECOMMENDED, routing=name) for name in (["top2"] if config.score.top2 else []) + ["oracle"]]
    variants = [replace(RECOMMENDED, variant=variant.name) for variant in config.variants]
    frozen_experts = [name for name, settings in config.variant_configs().items() if settings.expert == "frozen"]
    mos = [Method("pretrained", "mofe", "trained", name, NO_ROUTING, "mos") for name in frozen_experts]
    own = [*frozen, *refined, *routings, *variants, *(mos if "mos" in config.score.scores else [])]
    return [*own, *_finetuned(config, scores)]


def _finetuned(config: RunConfig, scores: list[str]) -> list[Method]:
    """Each score on the fine-tuned features, with the head that was trained with them; then each mixture on them."""
    if config.finetune is None:
        return []
    recommended, plain = (replace(method, backbone="finetuned") for method in (RECOMMENDED, FROZEN_SUM))
    return [
        *(_scored_by(replace(plain, head="finetune"), score) for score in scores),
        plain,
        *(replace(recommended, variant=name) for name in config.variant_seeds("finetuned")),
    ]


def _scored_by(method: Method, score: str) -> Method:
    """The same with another score, and with no head where that reads none."""
    return replace(method, score=score, head=method.head if reads_head(score) else NO_HEAD)


def fine_tuned_pairs(config: RunConfig) -> list[tuple[Method, Method]]:
    """What shows what fine-tuning changes: each method on the fine-tuned features, and what it is compared with.

    That is the same method on the pre-trained features, whose head is the probe. The recommended mixture, and the one
    that was trained together with the backbone, are compared with no mixture as well, on the same features and on the
    pre-trained ones; the latter with the former, too, on either.
    """
    known = methods_of(config)
    tuned = [method for method in known if method.backbone == "finetuned"]
    heads = [FROZEN_SUM.head if own.head == "finetune" else own.head for own in tuned]
    pairs = [(own, replace(own, head=head, backbone="pretrained")) for own, head in zip(tuned, heads, strict=True)]
    recommended, plain = (replace(method, backbone="finetuned") for method in (RECOMMENDED, FROZEN_SUM))
    joint = replace(recommended, variant=JOINT)
    pairs += [(recommended, other) for other in (plain, FROZEN_SUM)]
    pairs += [(joint, other) for other in (recommended, RECOMMENDED, plain, FROZEN_SUM)]
    return [pair for pair in pairs if set(pair) <= set(known)]


def check_comparable(config: RunConfig) -> None:
    """Refuse a study in which something that is to be compared is not there, before hours of work.

    Raises:
        ConfigError: a variant or a score is missing.
    """
    known = methods_of(config)
    if missing := [method_label(method) for method in (RECOMMENDED, *JUDGED_AGAINST) if method not in known]:
        raise ConfigError(
            f"{config.name}: the results need {', '.join(missing)}: leave score.scores and the variants as they are"
        )


Seeds = dict[int | None, dict[str, tuple[OODRow, Replicates]]]  # by seed, then by group of OOD sets


Compared = tuple[Method, Method, str, str]  # a method, what it is compared with, group of OOD sets, metric


class JudgedStudy:
    """A scored study, its methods compared with the resamples of its own table."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.scored = ScoredStudy(config.work / "scores")
        sizes = {"id": self.scored.n_id} | {ood: self.scored.n_ood[ood] for ood, _ in self.scored.oods}
        self._evaluator = Evaluator(self.scored.oods, sizes, config.score.bootstrap)
        self._seeds: dict[Method, Seeds] = {}
        self._differences: dict[Compared, Difference] = {}
        self.says: dict[Compared, str] = {}  # of each difference; see `judge`

    @property
    def groups(self) -> list[str]:
        """``near`` and ``far``, where the study has such sets."""
        return [group for group in self.scored.ood_groups if group != "all"]

    def seeds(self, method: Method) -> Seeds:
        """Averages over each group's sets, by seed."""
        if method not in self._seeds:
            self._seeds[method] = {seed: self._averages(method, seed) for seed in self._seeds_of(method)}
        return self._seeds[method]

    def _seeds_of(self, method: Method) -> tuple[int | None, ...]:
        seeds: tuple[int | None, ...] = self.config.finetune_seeds() if method.backbone == "finetuned" else (None,)
        if method.variant:
            seeds = self.config.variant_seeds(method.backbone)[method.variant]
        return seeds

    def compared(self) -> list[Compared]:
        """All differences that a page of results shows."""
        known = methods_of(self.config)
        pairs = [(RECOMMENDED, other) for other in known if other != RECOMMENDED] + fine_tuned_pairs(self.config)
        return [(*pair, group, metric) for pair in dict.fromkeys(pairs) for group in self.groups for metric in _METRICS]

    def difference(self, method: Method, other: Method, group: str, metric: str) -> Difference:
        """A method minus another, over the seeds that both have (all, where one of them has none)."""
        key = (method, other, group, metric)
        if key not in self._differences:
            own, others = self.seeds(method), self.seeds(other)
            seeded = any(None not in side for side in (own, others))
            if None not in own and None not in others:
                common = [seed for seed in own if seed in others]
                own, others = ({seed: side[seed] for seed in common} for side in (own, others))
            row = next(iter(own.values()))[group][0]
            sides = [over_seeds([each[group] for each in side.values()], metric) for side in (own, others)]
            self._differences[key] = Difference.of(sides[0], sides[1], seeded, row.n_id, row.n_ood)
        return self._differences[key]

    def difference_text(self, method: Method, other: Method, group: str, metric: str) -> str:
        """The same in per cent, with what it says."""
        found = self.difference(method, other, group, metric)
        return _difference_text(found.mean, found.lo, found.hi, self.says[method, other, group, metric])

    def accuracy(self, method: Method) -> list[float]:
        """ID accuracy of the method's head for each seed; none where it has no head, or routes in its own way."""
        if method.routing in ("top2", "oracle"):
            return []
        wanted = {name: getattr(method, name) for name in ("backbone", "features", "variant", "head")}
        return [entry["accuracy"] for entry in self.scored.id["accuracy"] if wanted.items() <= entry.items()]

    def _averages(self, method: Method, seed: int | None) -> dict[str, tuple[OODRow, Replicates]]:
        scores = self.scored.scores(method, seed)
        name = asdict(method) | {"seed": seed, "params": "", "profile": self.config.score.profile}
        # A study's table averages no oracle rows, lest they be taken for results; here their label says what they are.
        name["routing"] = "predicted" if method.routing == "oracle" else method.routing
        rows = self._evaluator.rows(name, scores.pop("id"), scores)
        return {row.group: (row, drawn) for row, drawn in rows if row.ood == "average"}


def judge(studies: Sequence[JudgedStudy]) -> None:
    """Say of every difference what it is, the false discovery rate held over all of them: they are read together."""
    keys = [(study, key) for study in studies for key in study.compared()]
    told = verdicts([study.difference(*key) for study, key in keys], [key[-1] in HIGHER_IS_BETTER for _, key in keys])
    for (study, key), says in zip(keys, told, strict=True):
        study.says[key] = says


def result_lines(study: JudgedStudy) -> list[dict[str, Any]]:
    """A line per method and group: mean, deviation over seeds, interval, and what the recommended score is off it."""
    lines = []
    for method in methods_of(study.config):
        naming = {name: getattr(method, name) for name in _NAMING}
        accuracy = study.accuracy(method)
        for group in study.groups:
            line: dict[str, Any] = {"benchmark": study.config.name, **naming, "group": group}
            seeds = list(study.seeds(method).values())
            line |= {"n_seeds": len(seeds)}
            for metric in _METRICS:
                values = [getattr(averages[group][0], metric) for averages in seeds]
                # Over images: they are the same for every seed, so ends are averaged as values are.
                lo, hi = (
                    float(np.mean([getattr(averages[group][0], f"{metric}_{end}") for averages in seeds]))
                    for end in ("lo", "hi")
                )
                line |= {f"{metric}_mean": float(np.mean(values)), f"{metric}_std": _deviation(values)}
                line |= {f"{metric}_lo": lo, f"{metric}_hi": hi}
            line |= {"id_accuracy_mean": float(np.mean(accuracy)) if accuracy else None}
            line |= {"id_accuracy_std": _deviation(accuracy)}
            for metric in _METRICS:
                told: Sequence[Any] = [None] * 4
                if method != RECOMMENDED:
                    found = study.difference(RECOMMENDED, method, group, metric)
                    told = (found.mean, found.lo, found.hi, study.says[RECOMMENDED, method, group, metric])
                line |= zip(difference_columns(f"recommended_minus_{metric}"), told, strict=True)
            lines.append(line)
    return lines


def _difference_text(mean: float, lo: float, hi: float, says: str) -> str:
    return f"{100 * mean:+.1f} [{100 * lo:+.1f}, {100 * hi:+.1f}] {says}"


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class TextTable:
    """A table for people, to be written as Markdown or to a terminal."""

    title: str
    header: list[str]
    body: list[list[str]]

    def markdown(self) -> str:
        """As Markdown, the title before it."""
        return f"{self.title}:\n\n{markdown_table(self.header, self.body, numbers_from=1)}\n"

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, title_style="dim")
        for index, column in enumerate(self.header):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for line in self.body:
            table.add_row(*line)
        return table


def text_tables(lines: Sequence[dict[str, Any]]) -> list[TextTable]:
    """One benchmark's tables: the recommended score beside the baselines, its differences to them, and all rows."""
    groups = list(dict.fromkeys(line["group"] for line in lines))
    by_method: dict[Method, list[dict[str, Any]]] = {}
    for line in lines:
        by_method.setdefault(Method(**{name: line[name] for name in _NAMING}), []).append(line)
    names = [_column(group, metric) for group in groups for metric in _METRICS]

    def cells(method: Method, show: Callable[[dict[str, Any], str], str]) -> list[str]:
        return [show(line, metric) for line in by_method[method] for metric in _METRICS]

    def whole(method: Method, show: Callable[[dict[str, Any], str], str]) -> list[str]:
        line = by_method[method][0]
        seeds = "–" if not method.variant and method.backbone == "pretrained" else str(line["n_seeds"])
        return [method_label(method), seeds, *cells(method, show), _mean(line, "id_accuracy")]

    header = ["", "seeds", *names, "ID accuracy ↑"]
    benchmark = lines[0]["benchmark"]
    return [
        TextTable(
            f"{benchmark}: the recommended score and what it is judged against; mean ± deviation over seeds "
            "[95 % interval over images]",
            header,
            [whole(method, _mean_and_interval) for method in (RECOMMENDED, *JUDGED_AGAINST)],
        ),
        TextTable(
            f"{benchmark}: {method_label(RECOMMENDED)}, minus",
            ["", *names],
            [[method_label(method), *cells(method, _shown_difference)] for method in JUDGED_AGAINST],
        ),
        TextTable(f"{benchmark}: all", header, [whole(method, _mean) for method in by_method]),
    ]


def fine_tuning_table(study: JudgedStudy) -> TextTable:
    """What fine-tuning the backbone changes, in paired differences."""
    columns = [(group, metric) for group in study.groups for metric in _METRICS]
    return TextTable(
        f"{study.config.name}: what fine-tuning changes",
        ["", "minus", *(_column(group, metric) for group, metric in columns)],
        [
            [
                method_label(own),
                method_label(other),
                *(study.difference_text(own, other, *column) for column in columns),
            ]
            for own, other in fine_tuned_pairs(study.config)
        ],
    )


def _column(group: str, metric: str) -> str:
    return f"{group} {'FPR95 ↓' if metric == 'fpr95' else 'AUROC ↑'}"


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
        shown = [_per_cent(float(np.mean(own)) if own else None, _deviation(own)) for own in accuracies]
        parameters = f"{seeds[0]['parameters'] / 1e6:.1f} M"
        body.append([variant, str(len(seeds)), str(seeds[0]["experts"]), parameters, *shown])
    return TextTable(
        f"{study.config.name}: routing of ID test images, and their accuracy by the {head} head as they are routed",
        ["", "seeds", "experts", "parameters", "router accuracy", "predicted", "top 2", "true routes"],
        body,
    )


def _mean(line: dict[str, Any], metric: str) -> str:
    return _per_cent(line[f"{metric}_mean"], line[f"{metric}_std"])


def _per_cent(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "–"
    return f"{100 * mean:.1f}" + (f" ± {100 * deviation:.1f}" if deviation is not None else "")


def _mean_and_interval(line: dict[str, Any], metric: str) -> str:
    return f"{_mean(line, metric)} [{100 * line[f'{metric}_lo']:.1f}, {100 * line[f'{metric}_hi']:.1f}]"


def _shown_difference(line: dict[str, Any], metric: str) -> str:
    return _difference_text(*(line[name] for name in difference_columns(f"recommended_minus_{metric}")))


def write_results(configs: Sequence[RunConfig], work: Path, difference: str | None) -> list[Any]:
    """Write ``results.md`` and ``results.csv`` of scored studies; returns the tables for the terminal.

    Args:
        configs: the studies.
        work: where to.
        difference: how the images differ from the benchmark's, if they do.
    """
    images = "those of the benchmark's list" if difference is None else f"NOT the benchmark's: {difference}"
    text = [
        "# Results\n\n",
        f"Recommended before the run: {method_label(RECOMMENDED)}. Per cent; FPR95 with ID positive (admit 95 % of ID, "
        "report the OOD admitted); near and far are means over sets. The interval of a difference resamples ID and OOD "
        "images alike for both methods, and seeds where there are several; it is a gain or a loss where that excludes "
        "0 and the false discovery rate of all differences of this page stays at 5 %.\n\n",
        f"Images: {images}.\n\n",
    ]
    found: list[dict[str, Any]] = []
    shown: list[Any] = []
    studies = [JudgedStudy(config) for config in configs]
    judge(studies)
    for study in studies:
        config, lines = study.config, result_lines(study)
        found += lines
        tuned = [fine_tuning_table(study)] if config.finetune is not None else []
        tables = [*text_tables(lines), *tuned, router_table(study)]
        git = (read_document(config.work / "record.json") or {}).get("git") or {"commit": "unknown", "dirty": False}
        text += [f"## {config.name}\n\n", *(table.markdown() for table in tables)]
        text.append(f"Code: {git['commit']}{', with changes' if git['dirty'] else ''}.\n\n")
        shown += [table.rich() for table in tables]
    write_text(work / "results.md", "".join(text).rstrip("\n") + "\n")
    write_text(work / "results.csv", csv_text(found, list(found[0])))
    return [*shown, f"results: {work / 'results.md'}, {work / 'results.csv'}"]
