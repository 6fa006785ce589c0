"""What ``make results`` says: one recommended score against its baselines and beside all else that a study scored.

The recommended score is named before any run and for every benchmark alike, and so is what it is judged against. A
difference is that of the means over seeds (those that both methods have), with a 95 % interval over images and seeds,
ID and OOD resampled alike for both; it is a gain or a loss where the interval excludes 0 and the false discovery rate
of all differences of the page stays at 5 % (`stages.metrics.intervals`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.config import JOINT, ConfigError, RunConfig
from stages.detection.subject import NO_HEAD
from stages.metrics.intervals import Difference, verdicts
from stages.metrics.ranking import METRICS
from stages.results.method import BASELINES, FROZEN_SUM, NO_ROUTING, RECOMMENDED, Method
from stages.results.scored_study import ScoredStudy
from stages.results.table import Evaluator, MethodRun, OODRow, Replicates, difference_columns, over_seeds
from stages.scorers import AUTO, FROZEN, reads_head

COMPARED_COLUMNS = ("fpr95", "auroc")  # metrics, in the order of the page
# What the recommended score is judged against: the last is the same block as its experts, with nothing routed (E = 1).
JUDGED_AGAINST = (*BASELINES.values(), replace(RECOMMENDED, variant="dense-1"))
CHOSEN = (
    replace(FROZEN_SUM, score=AUTO),
    replace(RECOMMENDED, score=AUTO),
)  # for each study anew, from ID images alone
NAMING = ("features", "head", "variant", "routing", "score", "backbone")  # columns of results.csv that name a method


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
    of_frozen = [score for score in scores if FROZEN not in score]  # what says of itself that it is has no other
    frozen = [scored_by(FROZEN_SUM, score) for score in of_frozen]
    refined = [scored_by(RECOMMENDED, score) for score in scores]
    # Oracle routing sends ID images by their true label, which no deployment knows: it shows what wrong routes cost.
    routings = [replace(RECOMMENDED, routing=name) for name in (["top2"] if config.score.top2 else []) + ["oracle"]]
    names = [variant.name for variant in config.variants if RECOMMENDED.score in config.scores_of(variant.name)]
    variants = [replace(RECOMMENDED, variant=name) for name in names]
    frozen_experts = [name for name, settings in config.variant_configs().items() if settings.expert == "frozen"]
    mos = [Method("pretrained", "mofe", "trained", name, NO_ROUTING, "mos") for name in frozen_experts]
    mos = [method for method in mos if "mos" in config.scores_of(method.variant)]
    own = [*frozen, *refined, *routings, *variants, *mos]
    return [*own, *_finetuned(config, of_frozen)]


def _finetuned(config: RunConfig, scores: list[str]) -> list[Method]:
    """Each score on the fine-tuned features, with the head that was trained with them; then each mixture on them."""
    if config.finetune is None:
        return []
    recommended, plain = (replace(method, backbone="finetuned") for method in (RECOMMENDED, FROZEN_SUM))
    return [
        # What `auto` may choose reads the probe alone.
        *(scored_by(plain if score == AUTO else replace(plain, head="finetune"), score) for score in scores),
        plain,
        *(replace(recommended, variant=name) for name in config.variant_seeds("finetuned")),
    ]


def scored_by(method: Method, score: str) -> Method:
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


def chosen_pairs(config: RunConfig) -> list[tuple[Method, Method]]:
    """What ``auto`` chooses of frozen features, and each frozen baseline."""
    chosen, known = CHOSEN[0], methods_of(config)
    return [(chosen, baseline) for baseline in BASELINES.values() if {chosen, baseline} <= set(known)]


def beside_frozen_pairs(config: RunConfig) -> list[tuple[Method, Method]]:
    """What the experts' part adds to a frozen one: each sum of both, and the same sum of frozen features alone."""
    known = methods_of(config)
    sums = [(own, scored_by(FROZEN_SUM, own.score.replace(FROZEN, ""))) for own in known if FROZEN in own.score]
    return [pair for pair in sums if set(pair) <= set(known)]


PAIRS = {  # what methods are compared with beside the recommended score, by what the table is called
    "what auto chose of frozen features, and the frozen baselines": chosen_pairs,
    "a frozen distance with the experts' energy, and with the probe's": beside_frozen_pairs,
    "what fine-tuning changes": fine_tuned_pairs,
}


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


_Averages = dict[str, tuple[OODRow, Replicates]]  # by group of OOD sets
Compared = tuple[Method, Method, str, str]  # a method, what it is compared with, group of OOD sets, metric


class JudgedStudy:
    """A scored study, its methods compared with the resamples of its own table."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.scored = ScoredStudy(config.work / "scores")
        sizes = {"id": self.scored.n_id} | {ood: self.scored.n_ood[ood] for ood, _ in self.scored.oods}
        self._evaluator = Evaluator(self.scored.oods, sizes, config.score.bootstrap)
        self._seeds: dict[Method, dict[int | None, _Averages]] = {}
        self._differences: dict[Compared, Difference] = {}
        self.says: dict[Compared, str] = {}  # of each difference; see `judge`

    @property
    def groups(self) -> list[str]:
        """``near`` and ``far``, where the study has such sets."""
        return [group for group in self.scored.ood_groups if group != "all"]

    def seeds(self, method: Method) -> dict[int | None, _Averages]:
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
        pairs = [(RECOMMENDED, other) for other in known if other != RECOMMENDED]
        pairs += [pair for pairs_of in PAIRS.values() for pair in pairs_of(self.config)]
        return [
            (*pair, group, metric)
            for pair in dict.fromkeys(pairs)
            for group in self.groups
            for metric in COMPARED_COLUMNS
        ]

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

    def accuracy(self, method: Method) -> list[float]:
        """ID accuracy of the method's head for each seed; none where it has no head, or routes in its own way."""
        if method.routing in ("top2", "oracle"):
            return []
        wanted = {name: getattr(method, name) for name in ("backbone", "features", "variant", "head")}
        return [entry["accuracy"] for entry in self.scored.id["accuracy"] if wanted.items() <= entry.items()]

    def regret(self, method: Method, group: str, metric: str) -> float:
        """How far ``auto`` is behind the best of all scores of its backbone, which only OOD images tell."""
        return float(self.scored.lines[method]["average", group][f"{metric}_regret"])

    def _averages(self, method: Method, seed: int | None) -> _Averages:
        scores = self.scored.scores(method, seed)
        # A study's table averages no oracle rows, lest they be taken for results; here their label says what they are.
        shown = replace(method, routing="predicted") if method.routing == "oracle" else method
        run = MethodRun(shown, seed, "", self.config.score.profile)
        rows = self._evaluator.rows(run, scores.pop("id"), scores)
        return {row.group: (row, drawn) for row, drawn in rows if row.ood == "average"}


def judge(studies: Sequence[JudgedStudy]) -> None:
    """Say of every difference of pages of results what it is; see `judge_together`."""
    judge_together([(study, key) for study in studies for key in study.compared()])


def judge_together(differences: Sequence[tuple[JudgedStudy, Compared]]) -> None:
    """Say of every difference what it is, the false discovery rate held over all of them: they are read together."""
    told = verdicts(
        [study.difference(*key) for study, key in differences],
        [METRICS[key[-1]].higher_is_better for _, key in differences],
    )
    for (study, key), says in zip(differences, told, strict=True):
        study.says[key] = says


def result_lines(study: JudgedStudy) -> list[dict[str, Any]]:
    """A line per method and group: mean, deviation over seeds, interval, and what the recommended score is off it."""
    lines = []
    for method in methods_of(study.config):
        naming = {name: getattr(method, name) for name in NAMING}
        accuracy = study.accuracy(method)
        for group in study.groups:
            line: dict[str, Any] = {"benchmark": study.config.name, **naming, "group": group}
            seeds = list(study.seeds(method).values())
            line |= {"n_seeds": len(seeds)}
            for metric in COMPARED_COLUMNS:
                rows = [averages[group][0] for averages in seeds]
                values = [row.metrics[metric] for row in rows]
                # Over images: they are the same for every seed, so ends are averaged as values are.
                lo, hi = (float(np.mean([getattr(row.intervals[metric], end) for row in rows])) for end in ("lo", "hi"))
                line |= {f"{metric}_mean": float(np.mean(values)), f"{metric}_std": deviation(values)}
                line |= {f"{metric}_lo": lo, f"{metric}_hi": hi}
            line |= {"id_accuracy_mean": float(np.mean(accuracy)) if accuracy else None}
            line |= {"id_accuracy_std": deviation(accuracy)}
            for metric in COMPARED_COLUMNS:
                told: Sequence[Any] = [None] * 4
                if method != RECOMMENDED:
                    found = study.difference(RECOMMENDED, method, group, metric)
                    told = (found.mean, found.lo, found.hi, study.says[RECOMMENDED, method, group, metric])
                line |= zip(difference_columns(f"recommended_minus_{metric}"), told, strict=True)
            lines.append(line)
    return lines


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None for one alone."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
