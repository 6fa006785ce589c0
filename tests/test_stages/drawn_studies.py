"""Studies on features drawn from a distribution that is known, so that what a threshold admits can be counted.

Each class has a mean and a covariance of its own, of which a few directions carry most; features are bent as a leaky
ReLU bends them. New rows are drawn from the same distribution, as many as one likes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache import FeatureCache
from stages.config import ScoreConfig, TrainConfig
from stages.detection.conformal import ThresholdEstimate, threshold_at
from stages.detection.factory import DetectorFactory
from stages.detection.frozen import FrozenFeatures
from stages.detection.refined import RefinedFeatures
from stages.detection.sources import BackboneSource, MixtureFolder
from stages.extract import import_set
from stages.id_data.rows import id_data
from stages.inputs.arrays import list_arrays
from stages.scorers import SCORERS
from stages.train import train_mofe, train_probe

# What frozen features without patch tokens have; DICE keeps a tenth of the weights, which here would be a handful.
OF_FEATURES = [
    *(name for name in SCORERS if name not in ("mos", "other", "patch-knn", "mm-pp", "knn-layers")),
    "knn+energy",
]
OF_MIXTURES = ["msp", "energy", "knn", "knn+energy", "ncm", "mos", "other"]  # of frozen experts
PARAMS = {"dice": {"percentile": 50.0}, "corp": {"features": 128}}


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


class Judged(NamedTuple):
    """A detector's threshold, and its scores of new ID rows."""

    estimate: ThresholdEstimate
    fresh: NDArray[np.floating]

    @property
    def admitted(self) -> float:
        """Share of the new rows that the threshold admits."""
        assert self.estimate.threshold is not None, self.estimate.too_few
        return float(np.mean(self.fresh <= self.estimate.threshold))

    @property
    def interval_holds(self) -> bool:
        """Whether the interval holds the threshold that admits the share of all new rows; open ends hold all."""
        quantile = np.quantile(self.fresh, self.estimate.admit)
        lo, hi = self.estimate.lo, self.estimate.hi
        return (lo is None or lo <= quantile) and (hi is None or quantile <= hi)


Key = tuple[str, str, bool]  # score, head, whether it is calibrated over experts


@dataclass(frozen=True)
class Study:
    """A backbone's features of ID rows, and new ID rows that took part in nothing."""

    source: BackboneSource
    fresh: FeatureCache

    def refined(self, config: TrainConfig, seed: int, folder: Path) -> RefinedFeatures:
        """What a mixture makes of them; trained here, into `folder`."""

        def no_end():
            raise AssertionError("features that came alone have no backbone")

        train_mofe(self.source.data, config, no_end, seed, folder)
        return RefinedFeatures(self.source, MixtureFolder("default", seed, folder))

    def judged(self, features: FrozenFeatures | RefinedFeatures, config: ScoreConfig) -> dict[Key, Judged]:
        """Every detector, by the whole way that its thresholds come."""
        labels = np.full(self.fresh.n_rows, -1, np.int32)
        if isinstance(features, FrozenFeatures):
            rows = features.rows(self.fresh, labels)
        else:
            rows = features.rows("fresh", self.fresh, labels)
        return {
            (detector.score, detector.head, detector.calibrated): Judged(
                threshold_at(detector.calibration_scores), detector.score_rows(rows)
            )
            for detector in DetectorFactory(features.subject(), config).detectors()
        }


def make_study(world: World, per_class: int, folder: Path, fresh: int = 500) -> Study:
    """A study of so many rows a class, with as many new ones as asked for each class; files go to `folder`."""

    def cached(name: str, per_class: int, seed: int) -> FeatureCache:
        features, labels = world.draw(per_class, seed)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"{name}.npz", cls=features, label=labels)
        arrays = list_arrays(str(folder / f"{name}.npz"))
        return import_set(name, arrays, arrays.spec("drawn", "float32"), folder / "cache")

    data = id_data(cached("train", per_class, 0), None, val_share=0.2)
    probe = train_probe(data, folder / "probe")

    def no_network():
        raise AssertionError("features that came alone have no backbone")

    source = BackboneSource("pretrained", None, data, probe, None, (), (), no_network)
    return Study(source, cached("fresh", fresh, 1))


@cache
def band(calibrated: int, fresh: int, studies: int, admit: float = 0.95) -> tuple[float, float]:
    """Where the mean share admitted in some studies lies in 99 of 100 cases, if scores are exchangeable.

    Beta-binomial: a threshold of rank r of n rows admits Beta(r, n + 1 − r) of all new rows, of which some are counted.
    """
    rank, rng = math.ceil((calibrated + 1) * admit), np.random.default_rng(0)
    shares = rng.beta(rank, calibrated + 1 - rank, size=(20_000, studies))
    low, high = np.quantile((rng.binomial(fresh, shares) / fresh).mean(axis=1), [0.005, 0.995])
    return float(low), float(high)


def outside(found: Iterable[dict[Key, Judged]], admit: float = 0.95) -> dict[Key, float]:
    """Mean share admitted by every detector that is not within its `band` over some studies."""
    found = list(found)
    missed = {}
    for key in found[0]:
        judged = [study[key] for study in found]
        share = float(np.mean([each.admitted for each in judged]))
        low, high = band(judged[0].estimate.n, len(judged[0].fresh), len(judged), admit)
        if not low <= share <= high:
            missed[key] = share
    return missed
