"""The steps after extraction, each as what is made ready before it is measured, and the work that is."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.config import ScoreConfig
from stages.detection.detectors import score_together
from stages.detection.factory import DetectorFactory
from stages.detection.frozen import FrozenFeatures
from stages.detection.handing import Handing
from stages.detection.routing import set_key
from stages.detection.selection import SearchFold, choose_k
from stages.detection.subject import NO_HEAD
from stages.id_data.overlap import find_overlaps
from stages.id_data.rows import id_data
from stages.id_data.split import split_rows
from stages.mixture.config import MixtureConfig
from stages.mixture.grouping import group_training_classes
from stages.mixture.model import build_mixture
from stages.mixture.refine import refine_to
from stages.results.method import Method
from stages.results.table import Evaluator, MethodRun
from stages.scorers import SCORERS, reads_head
from stages.scorers.neighbours.bank import FeatureBank
from stages.scorers.shared.moments import FeatureMoments
from stages.train import train_probe
from tests.bench.scale.drawn import CLASSES, DIM, OODS, DrawnStudy
from tests.bench.scale.measured import Cost, cost_of

K, EXPERTS = 50, 7  # a number for k where it is not what is measured; experts of the paper's study
GIVEN = {"features", "logits", "head", "bank", "select", "labels"}  # what scores may need here
OF_MOMENTS = (
    *("mahalanobis", "mahalanobis-pp", "relative-mahalanobis", "relative-mahalanobis-pp", "wdiscood", "ssd"),
    *("vim", "residual", "neco", "pnml"),
)
SCORED = tuple(name for name, scorer in SCORERS.items() if scorer.needs <= GIVEN)

Work = Callable[[], object]


@dataclass(frozen=True)
class Step:
    """One step: what gives its work, when all that it needs is ready."""

    prepared: Callable[[DrawnStudy], Work]

    def cost_of(self, folder: Path, rows: int) -> Cost:
        """Make ready what it needs, and measure it."""
        study = DrawnStudy(folder, rows)
        for cache in study.caches.values():
            assert len(cache.image_hashes) == cache.n_rows  # known to every step that was before
        return cost_of(self.prepared(study))


def _hold_out(study: DrawnStudy) -> Work:
    train = study.caches["train"]
    labels, hashes = np.asarray(train.labels), np.asarray(train.image_hashes)
    return lambda: split_rows(labels, hashes, 0.2)


def _split(study: DrawnStudy) -> Work:
    train, val = study.caches["train"], study.caches["val"]
    return lambda: id_data(train, val, 0.2)


def _overlap(study: DrawnStudy) -> Work:
    sets = list(study.caches.items())
    return lambda: find_overlaps(sets)


def _grouping(study: DrawnStudy) -> Work:
    data = study.data
    return lambda: group_training_classes(data, data.split.final_train, EXPERTS, "balanced", 0)


def _probe(study: DrawnStudy) -> Work:
    data, folder = study.data, study.folder / "probe"
    shutil.rmtree(folder, ignore_errors=True)
    return lambda: train_probe(data, folder)


def _refine(study: DrawnStudy) -> Work:
    groups = tuple((np.arange(CLASSES) % EXPERTS).tolist())
    mixture = build_mixture(MixtureConfig(DIM, DIM, groups, kind="adapter", router_input="cls"), None)
    path = study.folder / "refined" / "id-train.safetensors"
    cache = study.caches["train"]
    shutil.rmtree(path.parent, ignore_errors=True)
    return lambda: refine_to(path, {"of": "a bench"}, mixture, cache)


def _moments(study: DrawnStudy) -> Work:
    bank = FrozenFeatures(study.source).subject().bank.inputs(NO_HEAD)

    def work() -> None:
        moments = FeatureMoments()
        for block in bank.blocks():
            moments.add(block.need("features", "moments"), block.labels)

    return work


def _bank(study: DrawnStudy) -> Work:
    features = FrozenFeatures(study.source).subject().bank.features

    def work() -> None:
        bank = FeatureBank(features)
        assert bank.digest
        bank.prepare()

    return work


def _k(study: DrawnStudy) -> Work:
    (run,) = FrozenFeatures(study.source).subject().runs
    return lambda: choose_k([SearchFold(run.bank.inputs(NO_HEAD), run.select.inputs(NO_HEAD))])


def _of_score(name: str) -> Step:
    """Its fit, and its scores of all test rows and of those that calibrate."""

    def prepared(study: DrawnStudy) -> Work:
        frozen = FrozenFeatures(study.source)
        factory = DetectorFactory(frozen.subject(), ScoreConfig(scores=[name], k=K))
        labels = {test.name: np.full(test.cache.n_rows, -1, np.int32) for test in study.source.tests}
        sets = [frozen.rows(test.cache, labels[test.name]) for test in study.source.tests]

        def work() -> None:
            detector = factory.detector("probe" if reads_head(name) else NO_HEAD, name)
            for rows in sets:
                score_together([detector], rows)

        return work

    return Step(prepared)


def _of_moments(together: bool) -> Step:
    """The fits of ten scores, which share what they gather of the rows, or do not."""

    def prepared(study: DrawnStudy) -> Work:
        factory = DetectorFactory(FrozenFeatures(study.source).subject(), ScoreConfig(scores=[*OF_MOMENTS], k=K))
        (run,) = factory.subject.runs
        asked = [("probe" if reads_head(name) else NO_HEAD, name) for name in OF_MOMENTS]

        def work() -> None:
            scorers = [(factory.scorer(head, name), head) for head, name in asked]
            for some in [scorers] if together else [[one] for one in scorers]:
                Handing().fit(some, run.bank, run.select)

        return work

    return Step(prepared)


def _metrics(study: DrawnStudy) -> Work:
    """Of one score: metrics, intervals and 1,000 bootstrap replicates."""
    rng = np.random.default_rng(0)
    sizes = {set_key(test): test.cache.n_rows for test in study.source.tests}
    scores = {name: rng.standard_normal(n, dtype=np.float32) for name, n in sizes.items()}
    run = MethodRun(Method("pretrained", "cls", NO_HEAD, "", "none", "knn"), None, "{}", "paper")
    ood = [(f"ood-{number}", "far") for number in range(OODS)]
    return lambda: Evaluator(ood, sizes, 1000).rows(run, scores["id"], scores)


STEPS: dict[str, Step] = {
    "hold rows out": Step(_hold_out),
    "split": Step(_split),
    "overlap": Step(_overlap),
    "grouping": Step(_grouping),
    "probe": Step(_probe),
    "refine": Step(_refine),
    "moments": Step(_moments),
    "bank": Step(_bank),
    "k = auto": Step(_k),
    **{f"score {name}": _of_score(name) for name in SCORED},
    "ten fits together": _of_moments(together=True),
    "ten fits apart": _of_moments(together=False),
    "metrics": Step(_metrics),
}
