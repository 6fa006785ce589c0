"""Verb: stage three. From sealed caches and trained models to scores, thresholds and the table.

No image is opened and no backbone runs. The mixture's refined features are computed once per set and kept, so that
another k, temperature or score costs a search and some arithmetic.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.special import softmax

from cache import CacheMismatchError, FeatureCache
from stages.config import TAKEN_NAMES, ScoreConfig
from stages.detection.calibration import ThresholdEstimate, threshold_at
from stages.detection.detectors import Detector, gate_share, gate_weighted, score_together
from stages.detection.factory import DetectorFactory
from stages.detection.frozen import FrozenFeatures
from stages.detection.refined import RefinedFeatures
from stages.detection.selection import SMALLEST
from stages.detection.sources import BackboneSource, ScoredSet
from stages.detection.subject import NO_HEAD, SetRows, Subject, SubjectKey
from stages.errors import InputError
from stages.files.documents import write_contents, write_json
from stages.id_data.overlap import find_overlaps, first_alike
from stages.id_data.rows import labels_in, unit
from stages.metrics.ranking import OODMetrics, ood_metrics
from stages.progress import NullProgress, Progress
from stages.results.method import Method, samples_path
from stages.results.scored_study import FILES
from stages.results.table import Evaluator, OODRow, Replicates, summarise, write_table
from stages.scorers import needs_of
from stages.scorers.neighbours.store import NeighbourStore

SCORE_SEMANTICS = 4  # raise it when the same caches, models and settings would give another table
ADMIT = (0.95, 0.99)
Scores = dict[str, NDArray[np.float32]]  # of each set
Predictions = dict[str, dict[str, NDArray[np.int32]]]  # class of each row, by set and head
_WORTH_SAYING = 0.01  # share of rows that tie
_SAMPLES = 1 << 16  # rows that are written at once


@dataclass(frozen=True)
class ScoreResult:
    """What stage three says: the table, its summary over seeds, and lines worth saying."""

    rows: list[OODRow]
    summary: list[dict[str, Any]]
    notes: list[str]


def score(
    sources: Sequence[BackboneSource],
    config: ScoreConfig,
    folder: Path,
    progress: Progress | None = None,
    identity: str = "",
) -> ScoreResult:
    """Score every test set with every detector and write all of ``scores/``.

    Args:
        sources: the pre-trained backbone first: its frozen kNN is the baseline, and the first row of the table.
        config: scores, k, temperature.
        folder: ``<work>/scores``.
        progress: counts detectors.
        identity: of all that the scores are made of; ``contents.json`` has it.

    Raises:
        InputError: no ID test set or no OOD set, empty sets, labels that id-train lacks, non-finite features.
        CacheMismatchError: sets whose features are not of one kind.
    """
    progress = progress or NullProgress()
    tests = sources[0].tests
    _check(sources)
    oods = [(test.name, test.group) for test in tests if test.group != "id"]
    sizes = {"id" if test.group == "id" else test.name: test.cache.n_rows for test in tests}
    evaluator = Evaluator(oods, sizes, config.bootstrap)
    rows: list[tuple[OODRow, Replicates]] = []
    left_out: dict[tuple[str, str], list[str]] = {}  # (score, what it needs) -> features that lack it
    remarks: dict[tuple[str, str], list[str]] = {}  # (score, what there is to say of its fit) -> features
    ties = _Ties({_key(test): test.cache.image_hashes for test in tests})
    thresholds: list[dict[str, Any]] = []
    without_threshold: dict[str, list[str]] = {}  # why -> features that have none
    written: set[Path] = set()
    id_record: dict[str, Any] = {"accuracy": [], "router": [], "k": [], "split": {}}
    neighbours = NeighbourStore(folder / "neighbours")
    for source in sources:
        id_record["split"][_label(source.name, source.seed)] = source.data.split.rule
        for made in _subjects(source, config, neighbours, progress):
            subject = made.factory.subject
            if not rows:
                progress.note(_first_row(made, oods))
            detectors = made.factory.detectors()
            progress.start(len(detectors), "detector", f"score {'-'.join(_slug(subject.key))}")
            scored: dict[str, list[tuple[Detector, Scores]]] = {}
            for detector, routes in zip(detectors, made.scores(detectors), strict=True):
                for routing, scores in routes.items():
                    name = _columns(detector, routing, config)
                    rows += evaluator.rows(name, scores["id"], {ood: scores[ood] for ood, _ in oods})
                    scored.setdefault(routing, []).append((detector, scores))
                    for estimate in _thresholds(detector, routing):
                        thresholds.append(name | asdict(estimate))
                        if why := estimate.too_few:
                            without_threshold.setdefault(why, []).append(_words(subject))
                for of, head, said in detector.remarks():
                    remarks.setdefault((of, said), []).append(_place(subject, head))
                if not detector.calibrated:  # a map of each expert's own scale unties nothing
                    ties.look(detector.score, _place(subject, detector.head), next(iter(routes.values())))
                progress.advance()
            progress.close()
            predicted = {routing: made.predictions(routing) for routing in made.routings}
            id_record["accuracy"] += [
                asdict(subject.key) | {"head": head, "accuracy": accuracy, "n": len(made.sets["id"])}
                for head, accuracy in _accuracy(made, predicted[made.routings[0]]).items()
            ]
            if any("k" in part.scorer.follows for detector in detectors for part in detector.parts):
                id_record["k"].append(asdict(subject.key) | made.factory.k_record | {"k": made.factory.k})
                if made.factory.k_record["rule"] == SMALLEST:
                    remarks.setdefault((f"k = {made.factory.k}", SMALLEST), []).append(_words(subject))
            if subject.n_experts:
                id_record["router"].append(_router_record(made, predicted))
            for lacking, what, head in made.factory.left_out():
                if subject.n_experts or not source.mixtures or not needs_of(lacking) & {"others", "other"}:
                    left_out.setdefault((lacking, what), []).append(_place(subject, head))
            for routing, results in scored.items():
                shown = _Shown(made.routed(routing), predicted.get(routing, predicted[made.routings[0]]))
                written |= _write_samples(folder, subject, routing, results, shown, source)
    overlaps = find_overlaps(_sets(sources[0]))
    id_record["overlap"] = [asdict(overlap) for overlap in overlaps]
    summary = summarise(rows)
    table = [row for row, _ in rows]
    write_json(folder / "id.json", id_record)
    write_json(folder / "thresholds.json", thresholds)
    for left in set((folder / "samples").glob("*.parquet")) - written:  # of variants and seeds that are no more
        left.unlink()
    neighbours.forget_others()
    write_table(folder, table, summary)
    write_contents(folder, identity, [*FILES, *(path.relative_to(folder).as_posix() for path in written)])
    notes = []
    if overlaps:
        what = f"{unit(sources[0].data.train)}s that stand in two sets (same bytes)"
        notes.append(f"{what}: {'; '.join(map(str, overlaps))}; all are named in {folder / 'id.json'}")
    for why, places in without_threshold.items():
        notes.append(f"no threshold for {', '.join(dict.fromkeys(places))}: {why}")
    for (lacking, what), places in left_out.items():
        notes.append(f"{lacking}: not of {', '.join(dict.fromkeys(places))}: it needs {what}")
    notes += [f"{of}: {said}: {', '.join(dict.fromkeys(places))}" for (of, said), places in remarks.items()]
    notes += ties.notes()
    return ScoreResult(table, summary, notes)


class _Ties:
    """Rows that a score cannot tell apart: a tie counts half in AUROC, and no threshold comes between.

    Args:
        images: SHA-256 of each row's image, ``[n, 32]`` of each set. Of rows of one image the first counts alone.
    """

    def __init__(self, images: Mapping[str, NDArray[np.uint8]]) -> None:
        earlier = first_alike(np.concatenate(list(images.values())))
        first = earlier == np.arange(len(earlier))
        ends = np.cumsum([len(own) for own in images.values()])[:-1]
        self._distinct = dict(zip(images, np.split(first, ends), strict=True))
        self._found: dict[str, dict[str, str]] = {}  # score -> where -> how many

    def look(self, score: str, where: str, scores: Scores) -> None:
        """Count among the rows of all sets together; remembered where more than 1 % tie."""
        values = np.concatenate([scores[name][own] for name, own in self._distinct.items()])
        counts = np.unique(values, return_counts=True)[1]
        tied = int(counts[counts > 1].sum())
        if tied > _WORTH_SAYING * len(values):
            self._found.setdefault(score, {})[where] = f"{tied} of {len(values)}"

    def notes(self) -> list[str]:
        """A line for each score of which more than 1 % of the rows tie."""
        return [
            f"{score}: rows that have another row's score, and count half in AUROC: "
            + ", ".join(f"{share} ({where})" for where, share in places.items())
            for score, places in self._found.items()
        ]


@dataclass(frozen=True, eq=False)
class _Shown:
    """What the samples say of each set beside its scores: rows as they were routed, and classes by each head."""

    sets: Mapping[str, SetRows]
    predictions: Predictions


@dataclass(frozen=True, eq=False)
class _Made:
    """One choice of features with the rows to score; the ID test set's stand under ``"id"``.

    Attributes:
        factory: of its detectors.
        sets: rows of each set, routed where there are experts.
        oracle: ID test rows routed by their true label; None without experts.
        second: rows of each set through the router's second choice; None where no top-2 rows are asked.
        mixture: the trained mixture; None for the backbone's own features.
    """

    factory: DetectorFactory
    sets: dict[str, SetRows]
    oracle: SetRows | None = None
    second: dict[str, SetRows] | None = None
    mixture: RefinedFeatures | None = None

    @property
    def routings(self) -> tuple[str, ...]:
        """Ways to send rows to experts, what the router does first; ``none`` without experts."""
        if self.mixture is None:
            return ("none",)
        return ("predicted", *(["top2"] if self.second is not None else []), "oracle")

    def scores(self, detectors: Sequence[Detector]) -> list[dict[str, Scores]]:
        """Of each detector: scores of each set by each routing that it depends on."""
        routed = [detector for detector in detectors if detector.is_routed]
        plain = _scores(detectors, self.sets)
        second = dict(zip(routed, _scores(routed, self.second or {}), strict=True))
        oracle = dict(zip(routed, _scores(routed, {} if self.oracle is None else {"id": self.oracle}), strict=True))
        found: list[dict[str, Scores]] = []
        for detector, own in zip(detectors, plain, strict=True):
            if not detector.is_routed:
                found.append({"none": own})
                continue
            routes = {"predicted": own}
            if self.second is not None:
                routes["top2"] = {
                    name: gate_weighted(own[name], second[detector][name], gate_share(self.sets[name], twins))
                    for name, twins in self.second.items()
                }
            if self.oracle is not None:
                routes["oracle"] = own | oracle[detector]
            found.append(routes)
        return found

    def routed(self, routing: str) -> dict[str, SetRows]:
        """Rows of each set as a routing sends them; top-2's as the first choice has them."""
        return self.sets | {"id": self.oracle} if routing == "oracle" and self.oracle is not None else self.sets

    def predictions(self, routing: str) -> dict[str, dict[str, NDArray[np.int32]]]:
        """``[n]`` class of each row of each set, by each head."""
        if routing == "top2" and self.second is not None:
            return {name: _top2_predictions(rows, self.second[name]) for name, rows in self.sets.items()}
        return {name: rows.predictions() for name, rows in self.routed(routing).items()}


def _scores(detectors: Sequence[Detector], sets: Mapping[str, SetRows]) -> list[Scores]:
    """Of each detector: scores of each set, which is read once for all of them."""
    by_set = {name: score_together(detectors, rows) for name, rows in sets.items()}
    return [{name: scores[index] for name, scores in by_set.items()} for index in range(len(detectors))]


def _top2_predictions(rows: SetRows, twins: SetRows) -> dict[str, NDArray[np.int32]]:
    """``[n]`` class by each head, of what two experts make of the rows: the gate-weighted mean of their softmaxes."""
    found = {head: np.empty(len(rows), dtype=np.int32) for head in rows.logits}
    for (some, first), (_, second) in zip(rows.blocks(), twins.blocks(), strict=True):
        share = gate_share(first, second)[:, None]
        for head, logits in first.logits.items():
            one, other = (softmax(np.asarray(values), axis=1) for values in (logits, second.logits[head]))
            found[head][some] = gate_weighted(one, other, share).argmax(axis=1)
    return found


def _subjects(
    source: BackboneSource, config: ScoreConfig, neighbours: NeighbourStore, progress: Progress
) -> Iterator[_Made]:
    """Every choice of features of one backbone, one at a time: only one is in memory."""
    names = source.data.class_names
    labels = {
        test.name: labels_in(test.cache, names) if test.group == "id" else np.full(test.cache.n_rows, -1, np.int32)
        for test in source.tests
    }
    frozen = FrozenFeatures(source)
    # The frozen kNN is what everything is compared with, asked for or not.
    asked = config.scores if "knn" in config.scores else ["knn", *config.scores]
    first = sorted(asked, key=lambda score: score != "knn")
    sets = {_key(test): frozen.rows(test.cache, labels[test.name]) for test in source.tests}
    factory = DetectorFactory(frozen.subject(), config.model_copy(update={"scores": first}), neighbours)
    yield _Made(factory, sets)
    for folder in source.mixtures:
        refined = RefinedFeatures(source, folder, progress)
        sets = {_key(test): refined.rows(test.name, test.cache, labels[test.name]) for test in source.tests}
        id_test = next(test for test in source.tests if test.group == "id")
        oracle = refined.rows(id_test.name, id_test.cache, labels[id_test.name], oracle=True)
        second = None
        if top2 := config.top2 and refined.n_experts > 1:
            second = {_key(test): refined.second(test.name, test.cache, labels[test.name]) for test in source.tests}
        yield _Made(DetectorFactory(refined.subject(top2), config, neighbours), sets, oracle, second, refined)


def _first_row(made: _Made, oods: Sequence[tuple[str, str]]) -> str:
    """The frozen kNN in a line, said before its intervals and all else are computed."""
    (routes,) = made.scores([made.factory.detector(NO_HEAD, "knn")])
    scores = routes["none"]
    found: dict[str, list[OODMetrics]] = {}
    for ood, group in oods:
        found.setdefault(group, []).append(ood_metrics(scores["id"], scores[ood]))
    groups = [
        f"{group} AUROC {100 * np.mean([each.auroc for each in own]):.1f}, "
        f"FPR95 {100 * np.mean([each.fpr95 for each in own]):.1f}"
        for group, own in found.items()
    ]
    return f"frozen knn, k = {made.factory.k}: {'; '.join(groups)}"


def _check(sources: Sequence[BackboneSource]) -> None:
    for source in sources:
        groups = [test.group for test in source.tests]
        if groups.count("id") != 1 or len(groups) < 2:
            raise InputError("score needs one set with role id-test and at least one with role near-ood or far-ood")
        for test in source.tests:
            if test.group != "id" and test.name in TAKEN_NAMES:
                raise InputError(f"an OOD set is called {test.name!r}, a word of the table's own: give it another name")
            if test.cache.n_rows == 0:
                raise InputError(
                    f"set {test.name!r} has no usable {unit(test.cache)}: see {test.cache.path / 'failures.jsonl'}"
                )
        train = source.data.train
        for cache in (source.data.held_out, *(test.cache for test in source.tests)):
            if difference := cache.spec.first_difference(train.spec):
                raise CacheMismatchError(f"{cache.path}: its features are not those of {train.path}: {difference}")


def _columns(detector: Detector, routing: str, config: ScoreConfig) -> dict[str, Any]:
    return {
        **asdict(detector.subject.key),
        "head": detector.head,
        "routing": routing,
        "score": detector.score,
        "params": json.dumps(detector.params, sort_keys=True),
        "profile": config.profile,
        "calibrated": detector.calibrated,
    }


def _thresholds(detector: Detector, routing: str) -> list[ThresholdEstimate]:
    if routing == "oracle":
        return []
    scores = detector.top2_calibration_scores if routing == "top2" else detector.calibration_scores
    return [threshold_at(scores, admit) for admit in ADMIT]


def _accuracy(made: _Made, predicted: Predictions) -> dict[str, float]:
    labels = made.sets["id"].labels
    return {head: float(np.mean(classes == labels)) for head, classes in predicted["id"].items()}


def _router_record(made: _Made, predicted: Mapping[str, Predictions]) -> dict[str, Any]:
    """Accuracy and load of the router, and ID accuracy by routing: what a wrong route costs."""
    subject, test, mixture = made.factory.subject, made.sets["id"], made.mixture
    assert mixture is not None
    loads = {
        name: np.bincount(rows.expert, minlength=subject.n_experts).tolist()
        for name, rows in made.sets.items()
        if rows.expert is not None
    }
    return (
        asdict(subject.key)
        | mixture.about
        | {
            "experts": subject.n_experts,
            "accuracy": float(np.mean(test.expert == mixture.group[test.labels])),
            "id_accuracy": {routing: _accuracy(made, classes) for routing, classes in predicted.items()},
            "load": loads,
        }
    )


def _sets(source: BackboneSource) -> list[tuple[str, FeatureCache]]:
    """All sets of the study, those that train and calibrate first; two caches may well be called alike."""
    data = source.data
    held_out = [data.held_out] if data.split.held_out == "id-val" else []
    fitted = [(cache.manifest.dataset, cache) for cache in (data.train, *held_out)]
    return fitted + [(test.name, test.cache) for test in source.tests]


def _write_samples(
    folder: Path,
    subject: Subject,
    routing: str,
    results: list[tuple[Detector, Scores]],
    shown: _Shown,
    source: BackboneSource,
) -> set[Path]:
    """A Parquet file per head: a row per image, a float32 column per score. Returns their paths."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    names = np.asarray([*source.data.class_names, ""])
    written = set()
    for head in dict.fromkeys(detector.head for detector, _ in results):
        own = {
            detector.score + (" (calibrated)" if detector.calibrated else ""): scores
            for detector, scores in results
            if detector.head in (head, NO_HEAD)
        }
        key = subject.key
        method = Method(key.backbone, key.features, head, key.variant, routing, "")
        path = samples_path(folder, method, key.seed)
        temporary = path.with_suffix(".tmp")
        with ExitStack() as stack:
            writer: pq.ParquetWriter | None = None
            for test in source.tests:
                for table in _sample_tables(test, shown, head, own, names):
                    writer = writer or stack.enter_context(pq.ParquetWriter(temporary, table.schema))
                    writer.write_table(table)
        temporary.replace(path)
        written.add(path)
    return written


def _sample_tables(
    test: ScoredSet, shown: _Shown, head: str, scores: Mapping[str, Scores], names: NDArray[np.str_]
) -> Iterator[pa.Table]:
    """Rows of a set for `_write_samples`, some at a time: text takes more memory than what it stands for."""
    rows, unknown = shown.sets[_key(test)], np.full(len(shown.sets[_key(test)]), -1)
    predicted = shown.predictions[_key(test)].get(head, unknown)
    for start in range(0, len(rows), _SAMPLES):
        some = slice(start, start + _SAMPLES)
        n = len(rows.labels[some])
        columns: dict[str, Any] = {
            "set": pa.array([test.name] * n),
            "id": pa.array(test.cache.ids[some].tolist()),
            "label": pa.array(names[rows.labels[some]].tolist()),
            "prediction": pa.array(names[predicted[some]].tolist()),
            "expert": pa.nulls(n) if rows.expert is None else pa.array(rows.expert[some]),
            "confidence": pa.nulls(n) if rows.confidence is None else pa.array(np.float64(rows.confidence[some])),
        }
        columns |= {name: pa.array(own[_key(test)][some], pa.float32()) for name, own in scores.items()}
        yield pa.table(columns)


def _words(subject: Subject) -> str:
    own = "the backbone's own features" if subject.key.features == "cls" else f"variant {subject.key.variant}"
    return own if subject.key.backbone == "pretrained" else f"{own} ({subject.key.backbone})"


def _place(subject: Subject, head: str) -> str:
    return _words(subject) if head in ("", NO_HEAD) else f"head {head} of {_words(subject)}"


def _key(test: ScoredSet) -> str:
    return "id" if test.group == "id" else test.name


def _slug(key: SubjectKey) -> tuple[str, str, str, str]:
    return key.backbone, key.features, key.variant or "none", "none" if key.seed is None else str(key.seed)


def _label(name: str, seed: int | None) -> str:
    return name if seed is None else f"{name}/seed-{seed}"
