"""A choice of features with the rows to score, by each way to send them to experts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from stages.config import ScoreConfig
from stages.context import Context
from stages.detection.auto import AutoScore, head_of
from stages.detection.detectors import FittedDetector, combined, gate_share, gate_weighted, summands
from stages.detection.factory import DetectorFactory
from stages.detection.frozen import FrozenFeatures
from stages.detection.handing import Handing
from stages.detection.refined import RefinedFeatures
from stages.detection.sources import CS_ID, BackboneSource, ScoredSet
from stages.detection.subject import NO_HEAD, SetRows
from stages.id_data.rows import IdData, labels_of_test
from stages.scorers.neighbours.store import NeighbourStore

Scores = dict[str, NDArray[np.float32]]  # of each set
Predictions = dict[str, dict[str, NDArray[np.int32]]]  # class of each row, by set and head


def set_key(test: ScoredSet) -> str:
    """Name of a set among the rows of a subject: ``"id"`` is the ID test set, whatever it is called."""
    return "id" if test.group == "id" else test.name


@dataclass(frozen=True, eq=False)
class RoutedSubject:
    """One choice of features with the rows to score; the ID test set's stand under ``"id"``.

    Attributes:
        factory: of its detectors.
        sets: rows of each set, routed where there are experts.
        oracle: ID test rows routed by their true label; None without experts, or labels.
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
        more = {"top2": self.second, "oracle": self.oracle}
        return ("predicted", *(name for name, rows in more.items() if rows is not None))

    def scores(self, detectors: Sequence[FittedDetector]) -> list[dict[str, Scores]]:
        """Of each detector: scores of each set by each routing that it depends on."""
        routed = [detector for detector in detectors if detector.is_routed]
        plain = self._scores(detectors, self.sets)
        second = dict(zip(routed, self._scores(routed, self.second or {}), strict=True))
        own_experts = {} if self.oracle is None else {"id": self.oracle}
        oracle = dict(zip(routed, self._scores(routed, own_experts), strict=True))
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

    def _scores(self, detectors: Sequence[FittedDetector], sets: Mapping[str, SetRows]) -> list[Scores]:
        """Of each detector: scores of each set, which is read once for all of them."""
        raw = self.factory.handing.raw_scores(summands(detectors), sets, self.factory.subject.key.slug)
        by_set = {name: combined(detectors, raw[name], rows) for name, rows in sets.items()}
        return [{name: scores[index] for name, scores in by_set.items()} for index in range(len(detectors))]

    def rows(self, routing: str) -> dict[str, SetRows]:
        """Rows of each set as a routing sends them; top-2's as the first choice has them."""
        return self.sets | {"id": self.oracle} if routing == "oracle" and self.oracle is not None else self.sets

    def predictions(self, routing: str) -> Predictions:
        """``[n]`` class of each row of each set, by each head."""
        if routing == "top2" and self.second is not None:
            return {name: _top2_predictions(rows, self.second[name]) for name, rows in self.sets.items()}
        return {name: rows.predictions() for name, rows in self.rows(routing).items()}


def _top2_predictions(rows: SetRows, twins: SetRows) -> dict[str, NDArray[np.int32]]:
    """``[n]`` class by each head, of what two experts make of the rows: the gate-weighted mean of their softmaxes."""
    found = {head: np.empty(len(rows), dtype=np.int32) for head in rows.logits}
    for (some, first), (_, second) in zip(rows.blocks(), twins.blocks(), strict=True):
        share = gate_share(first, second)[:, None]
        for head, logits in first.logits.items():
            one, other = (softmax(np.asarray(values), axis=1) for values in (logits, second.logits[head]))
            found[head][some] = gate_weighted(one, other, share).argmax(axis=1)
    return found


def _labels(test: ScoredSet, data: IdData) -> NDArray[np.int32]:
    """Class of each row of a set, -1 where it has none: OOD rows, and ID rows that came without a label."""
    if test.group not in ("id", CS_ID):
        return np.full(test.cache.n_rows, -1, np.int32)
    return labels_of_test(test.cache, data, partly=test.group == CS_ID)


def routed_subjects(
    source: BackboneSource,
    config: ScoreConfig,
    neighbours: NeighbourStore,
    context: Context,
    handing: Handing = Handing(),
) -> Iterator[RoutedSubject]:
    """Every choice of features of one backbone, one at a time: only one is in memory."""
    labels = {test.name: _labels(test, source.data) for test in source.tests}
    frozen = FrozenFeatures(source)
    # The frozen kNN is what everything is compared with, asked for or not.
    asked = config.scores if "knn" in config.scores else ["knn", *config.scores]
    first = sorted(asked, key=lambda score: score != "knn")
    sets = {set_key(test): frozen.rows(test.cache, labels[test.name]) for test in source.tests}
    factory = DetectorFactory(frozen.subject(), config.model_copy(update={"scores": first}), neighbours, handing)
    yield RoutedSubject(factory, sets)
    for folder in source.mixtures:
        refined = RefinedFeatures(source, folder, context)
        sets = {set_key(test): refined.rows(test.name, test.cache, labels[test.name]) for test in source.tests}
        id_test = next(test for test in source.tests if test.group == "id")
        oracle = None
        if (labels[id_test.name] >= 0).all():
            oracle = refined.rows(id_test.name, id_test.cache, labels[id_test.name], oracle=True)
        second = None
        if top2 := config.top2 and refined.n_experts > 1:
            second = {set_key(test): refined.second(test.name, test.cache, labels[test.name]) for test in source.tests}
        own = config if folder.scores is None else config.model_copy(update={"scores": list(folder.scores)})
        factory = DetectorFactory(refined.subject(top2), own, neighbours, handing)
        yield RoutedSubject(factory, sets, oracle, second, refined)


class ChosenScores:
    """Scores by what ``auto`` is for the subjects of one backbone, its own features first of all.

    Args:
        auto: chooses.
        config: k and temperature.
        neighbours: remembers what kNN searched.
    """

    def __init__(self, auto: AutoScore, config: ScoreConfig, neighbours: NeighbourStore) -> None:
        self._auto = auto
        self._config = config
        self._neighbours = neighbours
        self._frozen: RoutedSubject | None = None

    def of(self, subject: RoutedSubject) -> tuple[FittedDetector, dict[str, Scores]]:
        """The chosen detector under the subject's name, with its scores as the router sends rows.

        Of a mixture, whose choice may be one of the backbone's own features.
        """
        own = subject.factory.subject
        if self._frozen is None:  # with no fitted part: those of the table's other scores need not stay in memory
            factory = DetectorFactory(own, self._config, self._neighbours, subject.factory.handing)
            self._frozen = replace(subject, factory=factory)
        detector = self._auto.detector(subject.factory, self._frozen.factory)
        scored = subject if detector.subject is own else self._frozen
        (routes,) = scored.scores([detector])
        if scored is not subject:
            head = head_of(subject.factory) or NO_HEAD
            detector = replace(detector, subject=replace(detector.subject, key=own.key), head=head)
        return detector, {subject.routings[0]: next(iter(routes.values()))}
