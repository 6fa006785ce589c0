"""Studies on features drawn from a distribution that is known, so that what a threshold admits can be counted.

Each class has a mean and a covariance of its own, of which a few directions carry most; features are bent as a leaky
ReLU bends them. New rows are drawn from the same distribution: as many as one likes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache import FeatureCache
from stages.arrays import list_arrays
from stages.config import ScoreConfig, TrainConfig
from stages.dataset import id_data
from stages.detectors import Detector, DetectorFactory, Subject
from stages.extract import import_set
from stages.progress import NullProgress
from stages.scorers import SCORERS, threshold_at
from stages.subjects import BackboneSource, FrozenFeatures, MixtureFolder, RefinedFeatures
from stages.train import train_mofe, train_probe

# All that frozen features without patch tokens have; and what only a mixture on frozen features has.
OF_FEATURES = [name for name in SCORERS if name not in ("mos", "other", "patch-knn")]
OF_MIXTURES = ["msp", "energy", "knn", "knn+energy", "ncm", "mos", "other"]


@dataclass(frozen=True)
class World:
    """Where rows come from.

    Attributes:
        seed: of means and covariances.
        classes: C.
        dim: D.
    """

    seed: int
    classes: int = 8
    dim: int = 8

    def draw(self, per_class: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Features ``[n, D]`` and labels ``[n]`` of rows, the same for the same seed."""
        world, rng = np.random.default_rng(self.seed), np.random.default_rng((self.seed, seed))
        means = world.normal(size=(self.classes, self.dim))
        mixing = world.normal(size=(self.classes, self.dim, self.dim // 4))
        labels = np.repeat(np.arange(self.classes), per_class)
        along = rng.normal(size=(len(labels), self.dim // 4))
        features = means[labels] + 0.6 * np.einsum("ndk,nk->nd", mixing[labels], along)
        features += 0.3 * rng.normal(size=features.shape)
        return np.float32(np.maximum(features, 0.05 * features)), labels


@dataclass(frozen=True)
class Study:
    """A backbone's features of ID rows, and new ID rows that took part in nothing."""

    source: BackboneSource
    fresh: FeatureCache

    def frozen(self) -> FrozenFeatures:
        """The features as they are."""
        return FrozenFeatures(self.source)

    def refined(self, config: TrainConfig, seed: int, folder: Path) -> RefinedFeatures:
        """What a mixture makes of them; trained here, into `folder`."""

        def no_end():
            raise AssertionError("features that came alone have no backbone")

        train_mofe(self.source.data, config, no_end, seed, folder)
        return RefinedFeatures(self.source, MixtureFolder("default", seed, folder), NullProgress())

    def admitted(
        self, features: FrozenFeatures | RefinedFeatures, config: ScoreConfig, admit: float = 0.95
    ) -> dict[tuple[str, str, bool], tuple[float, int]]:
        """Share of the new rows at or below each detector's threshold, and how many rows calibrated it.

        Detectors by score, head and whether they are calibrated over experts.
        """
        labels = np.full(self.fresh.n_rows, -1, np.int32)
        subject: Subject = features.subject()
        rows = features.rows("fresh", self.fresh, labels) if subject.n_experts else features.rows(self.fresh, labels)
        return {
            (detector.score, detector.head, detector.calibrated): _admitted(detector, rows, admit)
            for detector in DetectorFactory(subject, config).detectors()
        }


def _admitted(detector: Detector, rows, admit: float) -> tuple[float, int]:
    estimate = threshold_at(detector.calibration_scores, admit)
    assert estimate.threshold is not None, estimate.too_few
    return float(np.mean(detector.score_rows(rows) <= estimate.threshold)), estimate.n


def make_study(world: World, per_class: int, folder: Path, fresh: int = 500, draw: int = 1) -> Study:
    """A study of so many rows a class, with as many new ones as asked for each class; files go to `folder`."""

    def cached(name: str, per_class: int, draw: int) -> FeatureCache:
        features, labels = world.draw(per_class, draw)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"{name}.npz", cls=features, label=labels)
        arrays = list_arrays(str(folder / f"{name}.npz"))
        return import_set(name, arrays, arrays.spec("drawn", "float32"), folder / "cache")

    data = id_data(cached("train", per_class, 2 * draw), None, val_share=0.2)
    probe = train_probe(data, folder / "probe")

    def no_network():
        raise AssertionError("features that came alone have no backbone")

    source = BackboneSource("pretrained", None, data, probe, None, (), (), no_network)
    return Study(source, cached("fresh", fresh, 2 * draw + 1))
