"""Verb: stage three. From sealed caches and trained models to scores, thresholds and the table.

No image is opened and no backbone runs. The mixture's refined features are computed once per set and kept, so that
another k, temperature or score costs a search and some arithmetic.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache import CacheMismatchError, FeatureCache
from stages.config import TAKEN_NAMES, ScoreConfig
from stages.context import Cluster, Context
from stages.detection.auto import CHOSEN_FOLDER, AutoScore
from stages.detection.conformal import ThresholdEstimate, threshold_at
from stages.detection.detectors import FittedDetector
from stages.detection.handing import Handing
from stages.detection.routing import ChosenScores, Predictions, RoutedSubject, Scores, routed_subjects, set_key
from stages.detection.selection import SMALLEST
from stages.detection.sources import CS_ID, BackboneSource, ScoredSet
from stages.detection.subject import NO_HEAD, Subject, known_route
from stages.errors import InputError
from stages.id_data.overlap import Overlap, find_overlaps
from stages.id_data.rows import IdData, Labelling, unit
from stages.metrics.ranking import OODMetrics, ood_metrics
from stages.progress import NullProgress, Progress
from stages.results.method import Method
from stages.results.remarks import Remarks
from stages.results.table import Evaluator, Failures, MethodRun
from stages.results.writer import SampleBlock, ScoresWriter
from stages.scorers import AUTO, needs_of
from stages.scorers.neighbours.knn import KNNScorer
from stages.scorers.neighbours.space import RAW
from stages.scorers.neighbours.store import NeighbourStore

ADMIT = (0.95, 0.99)
_SAMPLES = 1 << 16  # rows that are written at once


@dataclass(frozen=True)
class ScoreResult:
    """What stage three says: the lines of the table, those of its summary over seeds, and what is worth saying."""

    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    notes: list[str]


def score(
    sources: Sequence[BackboneSource],
    config: ScoreConfig,
    folder: Path,
    progress: Progress | None = None,
    identity: str = "",
    cluster: Cluster | None = None,
) -> ScoreResult:
    """Score every test set with every detector and write all of ``scores/``.

    Args:
        sources: the pre-trained backbone first: its frozen kNN is the baseline, and the first row of the table.
        config: scores, k, temperature.
        folder: ``<work>/scores``.
        progress: counts detectors.
        identity: of all that the scores are made of; ``contents.json`` has it.
        cluster: refines sets, searches neighbours, fits and scores where rows are many.

    Raises:
        InputError: no ID test set or no OOD set, empty sets, labels that id-train lacks, non-finite features.
        CacheMismatchError: sets whose features are not of one kind.
    """
    progress = progress or NullProgress()
    _check(sources)
    scoring = _Scoring(sources[0].tests, config, ScoresWriter(folder), progress)
    neighbours, context = NeighbourStore(folder / "neighbours", cluster=cluster), Context(progress, cluster=cluster)
    for source in sources:
        scoring.writer.id.split[_label(source)] = source.data.split.rule
        auto = (
            ChosenScores(AutoScore(source, folder / CHOSEN_FOLDER), config, neighbours)
            if AUTO in config.scores
            else None
        )
        handing = Handing(cluster, folder, progress=progress)
        for subject in routed_subjects(source, config, neighbours, context, handing):
            scoring.score(subject, source, auto)
    neighbours.forget_others()
    overlaps = find_overlaps(_sets(sources[0]))
    scoring.writer.id.overlap = [asdict(overlap) for overlap in overlaps]
    table, summary = scoring.writer.finish(identity)
    told = _overlap_notes(overlaps, unit(sources[0].data.train), folder / "id.json")
    return ScoreResult(table, summary, [*_labels_notes(sources[0].data), *told, *scoring.remarks.notes()])


class _Scoring:
    """Scores one choice of features after the other: numbers go to the writer, what is worth saying to the remarks.

    Args:
        tests: the ID test set, the OOD sets and the covariate-shifted ID sets.
        config: scores, k, temperature.
        writer: of the scores.
        progress: counts detectors.
    """

    def __init__(
        self, tests: Sequence[ScoredSet], config: ScoreConfig, writer: ScoresWriter, progress: Progress
    ) -> None:
        self.writer = writer
        self.remarks = Remarks({set_key(test): test.cache.image_hashes for test in tests})
        self._config = config
        self._progress = progress
        others = [(test.name, test.group) for test in tests if test.group != "id"]
        self._oods = [(name, group) for name, group in others if group != CS_ID]
        self._shifted = [name for name, group in others if group == CS_ID]
        sizes = {set_key(test): test.cache.n_rows for test in tests}
        self._evaluator = Evaluator(others, sizes, config.bootstrap)

    def score(self, subject: RoutedSubject, source: BackboneSource, auto: ChosenScores | None) -> None:
        """Score every set with every detector of a choice of features, and with the one that is chosen for it."""
        if not self.writer.rows:
            self._progress.note(_first_row(subject, self._oods))
        detectors = subject.factory.detectors()
        auto = auto if AUTO in subject.factory.config.scores else None
        scored: dict[str, list[tuple[FittedDetector, Scores]]] = {}  # by routing
        predicted = {routing: subject.predictions(routing) for routing in subject.routings}
        first = predicted[subject.routings[0]]
        found = [*zip(detectors, subject.scores(detectors), strict=True)]
        if auto is not None:
            found.append(auto.of(subject))
            self._say_what_is_chosen(found[-1][0])
        self._progress.start(len(found), "detector", f"score {subject.factory.subject.key.slug}")
        for detector, routes in found:
            for routing, scores in routes.items():
                failures = _failures(subject, predicted.get(routing, first), detector.head)
                self._evaluate(detector, routing, scores, failures, source.data.labels)
                scored.setdefault(routing, []).append((detector, scores))
            self._remark(detector, next(iter(routes.values())))
            self._progress.advance()
        self._progress.close()
        self._record(subject, detectors, predicted)
        self._say_what_is_left_out(subject, source)
        for routing, results in scored.items():
            self._write_samples(subject, routing, results, predicted.get(routing, first), source)

    def _evaluate(
        self, detector: FittedDetector, routing: str, scores: Scores, failures: Failures, labels: Labelling
    ) -> None:
        """Rows of the table, and thresholds."""
        key = detector.subject.key
        method = Method(
            key.backbone, key.features, detector.head, key.variant, routing, detector.score, detector.calibrated
        )
        _check_finite_scores(detector, scores)
        known = labels if labels == "given" or detector.reads_classes else "none"
        run = MethodRun(method, key.seed, json.dumps(detector.params, sort_keys=True), self._config.profile, known)
        self.writer.rows += self._evaluator.rows(run, scores["id"], scores, failures)
        for estimate in _thresholds(detector, routing):
            self.writer.add_threshold(run, estimate)
            if why := estimate.too_few:
                self.remarks.no_threshold(why, _words(detector.subject))

    def _remark(self, detector: FittedDetector, scores: Scores) -> None:
        """What there is to say of a detector's fit, and of its scores as rows are routed."""
        for of, head, said in detector.remarks():
            self.remarks.say(of, said, _place(detector.subject, head))
        if not detector.calibrated:  # a map of each expert's own scale unties nothing
            self.remarks.look_for_ties(detector.score, _place(detector.subject, detector.head), scores)

    def _record(
        self, routed: RoutedSubject, detectors: Sequence[FittedDetector], predicted: Mapping[str, Predictions]
    ) -> None:
        """What ``id.json`` says of a choice of features."""
        subject, record, factory = routed.factory.subject, self.writer.id, routed.factory
        record.accuracy += [
            asdict(subject.key) | {"head": head, "accuracy": accuracy, "n": len(routed.sets["id"])}
            for head, accuracy in _accuracy(routed, predicted[routed.routings[0]]).items()
        ]
        for name in self._shifted:
            labels = routed.sets[name].labels
            known = labels >= 0
            record.shifted_accuracy += [
                asdict(subject.key)
                | {"head": head, "set": name, "accuracy": float(np.mean(classes[known] == labels[known]))}
                | {"n": int(known.sum())}
                for head, classes in predicted[routed.routings[0]][name].items()
                if known.any()
            ]
        scorers = (part.scorer for detector in detectors for part in detector.parts)
        for space in dict.fromkeys(scorer.space for scorer in scorers if isinstance(scorer, KNNScorer)):
            k, how = factory.k_in(space)
            record.k.append(asdict(subject.key) | how | {"k": k} | ({} if space == RAW else {"space": space}))
            if how["rule"] == SMALLEST:
                self.remarks.say(f"k = {k}", SMALLEST, _words(subject))
        if subject.n_experts:
            record.router.append(_router_record(routed, predicted))

    def _say_what_is_left_out(self, routed: RoutedSubject, source: BackboneSource) -> None:
        subject = routed.factory.subject
        for lacking, what, head in routed.factory.left_out():
            # What needs a mixture is not missed of features without one, where there are mixtures.
            if subject.n_experts or not source.mixtures or not needs_of(lacking) & {"others", "other"}:
                self.remarks.left_out(lacking, what, _place(subject, head))

    def _say_what_is_chosen(self, detector: FittedDetector) -> None:
        choice = detector.choice
        of = "" if choice["features"] == detector.subject.key.features else ", of the backbone's own features"
        self.remarks.say(f"{AUTO} is {choice['chosen']}{of}", choice["auto"]["rule"], _words(detector.subject))

    def _write_samples(
        self,
        routed: RoutedSubject,
        routing: str,
        results: Sequence[tuple[FittedDetector, Scores]],
        predicted: Predictions,
        source: BackboneSource,
    ) -> None:
        """A file per head, in which scores on features alone stand as well."""
        key = routed.factory.subject.key
        for head in dict.fromkeys(detector.head for detector, _ in results):
            method = Method(key.backbone, key.features, head, key.variant, routing, "")
            own = {
                replace(method, score=detector.score, calibrated=detector.calibrated).column: scores
                for detector, scores in results
                if detector.head in (head, NO_HEAD)
            }
            self.writer.write_samples(method, key.seed, _sample_blocks(routed, routing, head, own, predicted, source))


def _sample_blocks(
    routed: RoutedSubject,
    routing: str,
    head: str,
    scores: Mapping[str, Scores],
    predicted: Predictions,
    source: BackboneSource,
) -> Iterator[SampleBlock]:
    """Every image, some at a time: text takes more memory than what it stands for."""
    names = np.asarray([*source.data.class_names, ""])
    for test in source.tests:
        key = set_key(test)
        rows = routed.rows(routing)[key]
        classes = predicted[key].get(head, np.full(len(rows), -1))
        for start in range(0, len(rows), _SAMPLES):
            some = slice(start, start + _SAMPLES)
            yield SampleBlock(
                set=test.name,
                id=test.cache.ids[some].tolist(),
                label=names[rows.labels[some]].tolist(),
                prediction=names[classes[some]].tolist(),
                expert=None if rows.expert is None else rows.expert[some],
                confidence=None if rows.confidence is None else rows.confidence[some],
                scores={name: own[key][some] for name, own in scores.items()},
            )


def _first_row(routed: RoutedSubject, oods: Sequence[tuple[str, str]]) -> str:
    """The frozen kNN in a line, said before its intervals and all else are computed."""
    detector = routed.factory.detector(NO_HEAD, "knn")
    (routes,) = routed.scores([detector])
    scores = routes["none"]
    found: dict[str, list[OODMetrics]] = {}
    for ood, group in oods:
        found.setdefault(group, []).append(ood_metrics(scores["id"], scores[ood]))
    groups = [
        f"{group} AUROC {100 * np.mean([each.auroc for each in own]):.1f}, "
        f"FPR95 {100 * np.mean([each.fpr95 for each in own]):.1f}"
        for group, own in found.items()
    ]
    return f"frozen knn, k = {detector.params['k']}: {'; '.join(groups)}"


def _check(sources: Sequence[BackboneSource]) -> None:
    for source in sources:
        groups = [test.group for test in source.tests]
        if groups.count("id") != 1 or not {"near", "far"} & set(groups):
            raise InputError("score needs one set with role id-test and at least one with role near-ood or far-ood")
        for test in source.tests:
            if test.group != "id" and test.name in TAKEN_NAMES:
                raise InputError(f"a set is called {test.name!r}, a word of the table's own: give it another name")
            if test.cache.n_rows == 0:
                raise InputError(
                    f"set {test.name!r} has no usable {unit(test.cache)}: see {test.cache.path / 'failures.jsonl'}"
                )
        train = source.data.train
        for cache in (source.data.held_out, *(test.cache for test in source.tests)):
            if difference := cache.spec.first_difference(train.spec):
                raise CacheMismatchError(f"{cache.path}: its features are not those of {train.path}: {difference}")


def _failures(routed: RoutedSubject, classes: Predictions, head: str) -> dict[str, NDArray[np.int8]]:
    """Of each set: which rows a head gets wrong, see `Failures`; of none where there is no head."""
    return {
        name: np.where(rows.labels < 0, -1, classes[name][head] != rows.labels).astype(np.int8)
        for name, rows in routed.sets.items()
        if head in classes[name]
    }


def _check_finite_scores(detector: FittedDetector, scores: Scores) -> None:
    """Refuse what cannot be ranked, by its name.

    Raises:
        InputError: NaN or inf.
    """
    for name, own in scores.items():
        if bad := int(np.count_nonzero(~np.isfinite(own))):
            raise InputError(
                f"score {detector.score}: {bad} of {len(own)} scores of set {name!r} are NaN or inf: look at "
                "score.params and at the features"
            )


def _thresholds(detector: FittedDetector, routing: str) -> list[ThresholdEstimate]:
    if routing == "oracle":
        return []
    scores = detector.top2_calibration_scores if routing == "top2" else detector.calibration_scores
    return [threshold_at(scores, admit) for admit in ADMIT]


def _accuracy(routed: RoutedSubject, predicted: Predictions) -> dict[str, float | None]:
    """Share of ID test rows that each head is right of; None where nobody knows their classes."""
    return {head: _share(classes, routed.sets["id"].labels) for head, classes in predicted["id"].items()}


def _share(found: NDArray[np.integer], truth: NDArray[np.integer]) -> float | None:
    return float(np.mean(found == truth)) if (truth >= 0).all() else None


def _router_record(routed: RoutedSubject, predicted: Mapping[str, Predictions]) -> dict[str, Any]:
    """Accuracy and load of the router, and ID accuracy by routing: what a wrong route costs."""
    subject, test, mixture = routed.factory.subject, routed.sets["id"], routed.mixture
    assert mixture is not None
    loads = {
        name: np.bincount(rows.expert, minlength=subject.n_experts).tolist()
        for name, rows in routed.sets.items()
        if rows.expert is not None
    }
    return (
        asdict(subject.key)
        | mixture.about
        | {
            "experts": subject.n_experts,
            "accuracy": _share(known_route(test.expert), np.where(test.labels < 0, -1, mixture.group[test.labels])),
            "id_accuracy": {routing: _accuracy(routed, classes) for routing, classes in predicted.items()},
            "load": loads,
        }
    )


def _sets(source: BackboneSource) -> list[tuple[str, FeatureCache]]:
    """All sets of the study, those that train and calibrate first; two caches may well be called alike."""
    data = source.data
    held_out = [data.held_out] if data.split.held_out == "id-val" else []
    fitted = [(cache.manifest.dataset, cache) for cache in (data.train, *held_out)]
    return fitted + [(test.name, test.cache) for test in source.tests]


def _labels_notes(data: IdData) -> list[str]:
    if data.labels == "given":
        return []
    return [
        f"id-train has no classes to tell apart: {data.n_classes} clusters of its features stand for them; what "
        "depends on these has labels = clusters in table.csv, what does not labels = none"
    ]


def _overlap_notes(overlaps: Sequence[Overlap], noun: str, where: Path) -> list[str]:
    if not overlaps:
        return []
    return [f"{noun}s that stand in two sets (same bytes): {'; '.join(map(str, overlaps))}; all are named in {where}"]


def _words(subject: Subject) -> str:
    own = "the backbone's own features" if subject.key.features == "cls" else f"variant {subject.key.variant}"
    return own if subject.key.backbone == "pretrained" else f"{own} ({subject.key.backbone})"


def _place(subject: Subject, head: str) -> str:
    return _words(subject) if head in ("", NO_HEAD) else f"head {head} of {_words(subject)}"


def _label(source: BackboneSource) -> str:
    return source.name if source.seed is None else f"{source.name}/seed-{source.seed}"
