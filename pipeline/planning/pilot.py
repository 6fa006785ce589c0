"""A pilot: the study itself on some of its rows, in a folder that is thrown away, its stages' own code timed."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cache import FeatureSpec
from pipeline.backbones import StudyBackbone
from pipeline.config import RunConfig, RunOptions, SetConfig
from pipeline.planning.clock import Clock, EnoughError, Spent
from pipeline.planning.pool import Pool, write_cache
from pipeline.planning.sample import PilotSet
from pipeline.planning.size import StudySize, experts_of
from pipeline.record import peak_memory_bytes
from pipeline.sets import Sets
from pipeline.sources import NO_VARIANT, source_to_predict
from pipeline.study import Study
from stages.detection.auto import candidates, scored_folds
from stages.detection.factory import DetectorFactory
from stages.detection.frozen import FrozenFeatures
from stages.inputs.images import SampleTable
from stages.networks.backbone import Backbone
from stages.results.scored_study import ScoredStudy
from stages.scorers import AUTO
from stages.scorers.neighbours.store import NeighbourStore
from stages.train import train_probe

REPLICATES = 100  # of the bootstrap in a pilot
EPOCHS = 2  # of a mixture in a pilot: in the first all kernels are chosen, which a study does once
_LEAST = 1e-3  # seconds that a probe takes, which others are divided by


@dataclass(frozen=True)
class TrainTime:
    """Seconds of the training of one mixture, by what grows alike.

    Attributes:
        steps: of one epoch, over all models of a mixture, judging included.
        refining: of rows through the experts.
        rest: heads above all.
        starting: until steps took what they take, which they do once.
    """

    steps: float
    refining: float
    rest: float
    starting: float = 0.0

    @property
    def seconds(self) -> float:
        """Of the pilot's training, which has `EPOCHS` epochs."""
        return self.starting + self.steps * EPOCHS + self.refining + self.rest


@dataclass(frozen=True)
class ScoreTime:
    """Seconds of the scoring of the backbone's own features and those of one mixture, without what follows apart.

    Attributes:
        refining: of test rows through the experts.
        rest: fits, scores, searches.
        methods: lines of the table, of the backbone's own features and of the mixture's.
    """

    refining: float
    rest: float
    methods: tuple[int, int]


@dataclass
class Timed:
    """What a pilot took.

    Attributes:
        n_train, n_tests, n_classes: how large it was.
        probe: seconds of the linear probe.
        mixtures: by variant.
        tuning: seconds of a row in an epoch of the fine-tune, and until the first; None where it was not run.
        tuned: how much of an epoch was run.
        fold: seconds of fitting and judging single scores on the backbone's own features, in one pair of folds of
            those that ``auto`` chooses by; 0 where rows are too few.
        score: None where it was not run.
        report: seconds; None where it was not run.
        peaks: bytes of the largest memory after each stage, by its verb.
        seconds: of training and scoring.
    """

    n_train: int
    n_tests: int
    n_classes: int
    probe: float = 0.0
    mixtures: dict[str, TrainTime] = field(default_factory=dict)
    tuning: tuple[float, float] | None = None
    tuned: float = 1.0
    fold: float = 0.0
    score: ScoreTime | None = None
    report: float | None = None
    peaks: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Material:
    """What pilots are made of.

    Attributes:
        config: the study.
        size: of its sets.
        tables: images of its sets, where they are looked at by a fine-tune; none where there are none.
        pools: features of rows, by set.
        spec: what these are.
        network: the backbone; None where there is none.
    """

    config: RunConfig
    size: StudySize
    tables: Mapping[str, SampleTable]
    pools: Mapping[str, Pool]
    spec: FeatureSpec
    network: Backbone | None


class _GivenSets(Sets):
    """Sets whose images are known already."""

    def __init__(self, config: RunConfig, tables: Mapping[str, SampleTable]) -> None:
        super().__init__(config)
        self._tables = tables

    def table(self, entry: SetConfig) -> SampleTable:
        return self._tables[entry.name] if entry.name in self._tables else super().table(entry)


@dataclass(frozen=True)
class _LoadedBackbone(StudyBackbone):
    """A backbone whose network is there already.

    Attributes:
        network: with its weights; None where the study has none.
    """

    network: Backbone | None = None

    @cached_property
    def loaded(self) -> Backbone:
        return super().loaded if self.network is None else self.network

    @cached_property
    def architecture(self) -> Backbone:
        return super().architecture if self.network is None else self.network


class Pilot:
    """Runs the stages of a study on some rows: two epochs of each mixture, one seed.

    Args:
        material: what it is made of.
        sets: its rows.
        folder: where it may write.

    Attributes:
        timed: what was measured so far.
    """

    def __init__(self, material: Material, sets: Mapping[str, PilotSet], folder: Path) -> None:
        self._material = material
        self._config = pilot_config(material.config, material.size, folder)
        (train,) = self._config.sets_of("id-train")
        n_train, n_all = len(sets[train.name]), sum(map(len, sets.values()))
        self.timed = Timed(n_train, n_all - n_train, max(1, len(sets[train.name].class_names)))
        self._clock = Clock()
        caches = {
            name: write_cache(folder / "cache", name, own, material.pools[name], material.spec)
            for name, own in sets.items()
        }
        self._study(self._config).workspace.pretrained.link(material.spec, caches, {})

    def _study(self, config: RunConfig, on_trained: Callable[[str, float], None] | None = None) -> Study:
        study = Study(config, RunOptions(), on_trained)
        study.workspace.progress = self._clock
        study.workspace.sets = _GivenSets(config, self._material.tables)
        study.workspace.pretrained = _LoadedBackbone(config, "pretrained", network=self._material.network)
        return study

    def train(self) -> None:
        """Probe and mixtures."""
        timed = self.timed

        def lap(variant: str, seconds: float) -> None:
            spent = self._clock.taken("train", "refine")
            refining = spent["refine"].seconds
            steps = spent["train"].each * spent["train"].total / EPOCHS
            rest = max(0.0, seconds - spent["train"].seconds - refining)
            timed.mixtures[variant] = TrainTime(steps, refining, rest, spent["train"].starting)

        study = self._study(self._config, lap)
        whole = _seconds(lambda: study.do("train", "pretrained"))
        timed.probe = max(_LEAST, whole - sum(own.seconds for own in timed.mixtures.values()))
        timed.peaks["train"] = peak_memory_bytes()
        timed.seconds += whole

    def fit_probe(self) -> None:
        """The linear probe alone."""
        workspace = self._study(self._config).workspace
        data, folder = workspace.pretrained.id_data(), workspace.pretrained.probe_folder
        self.timed.probe = _seconds(lambda: train_probe(data, folder, workspace.context()))

    def fold(self) -> None:
        """One pair of folds, with the linear probe that was fitted."""
        workspace = self._study(self._config).workspace
        source = source_to_predict(workspace, workspace.pretrained, NO_VARIANT)
        neighbours = NeighbourStore(self._config.work / "folds")
        factory = DetectorFactory(FrozenFeatures(source).subject(), self._config.score, neighbours)
        self.timed.fold = _seconds(lambda: next(scored_folds(factory, candidates(factory)), None))

    def score(self) -> None:
        """The backbone's own features and the first mixture's, without ``auto``."""
        study = self._study(self._config.model_copy(update={"variants": ()}))
        self._clock.taken()
        whole = _seconds(lambda: study.do("score", "pretrained"))
        refining = self._clock.taken("refine")["refine"].seconds
        lines = ScoredStudy(self._config.work / "scores").rows
        methods = [line["features"] for line in lines if line["ood"] == lines[0]["ood"]]
        self.timed.score = ScoreTime(refining, whole - refining, (methods.count("cls"), methods.count("mofe")))
        self.timed.peaks["score"] = peak_memory_bytes()
        self.timed.seconds += whole

    def report(self, seconds: float) -> None:
        """The page, or as much of it as these seconds allow."""
        study = self._study(self._config.model_copy(update={"variants": ()}))
        self.timed.report = self._within(seconds, lambda: study.do("report"), "report").whole
        self.timed.peaks["report"] = peak_memory_bytes()

    def finetune(self, seconds: float) -> None:
        """An epoch end to end, or as much of it as these seconds allow."""
        study = self._study(self._config)
        spent = self._within(seconds, lambda: study.do("finetune"), "finetune")
        self.timed.tuning, self.timed.tuned = (spent.each, spent.starting), spent.units / max(1, spent.total)
        self.timed.peaks["finetune"] = peak_memory_bytes()

    def _within(self, seconds: float, work: Callable[[], object], task: str) -> Spent:
        self._clock.taken()
        self._clock.limit = seconds
        with suppress(EnoughError):
            work()
        self._clock.limit = None
        return self._clock.taken(task)[task]


def pilot_config(config: RunConfig, size: StudySize, folder: Path) -> RunConfig:
    """The study as a pilot runs it: as many experts, few epochs, one seed, few replicates, in another folder."""
    experts = {name: experts_of(train, size.n_classes) for name, train in config.variant_configs().items()}
    train: dict[str, object] = {"epochs": EPOCHS, "warmup_epochs": 0.5, "patience": None, "tensorboard": False}
    train |= {"grouping": "balanced"} if config.train.grouping not in ("balanced", "kmeans") else {}
    own = {f"train.{key}": value for key, value in train.items()}
    variants = tuple(
        variant.model_copy(update={"set": variant.set | own | {"train.experts": experts[variant.name]}, "seeds": None})
        for variant in config.variants
    )
    seeds = (config.seeds[0],)
    scores = [score for score in config.score.scores if score != AUTO] or ["knn"]
    changes = {
        "work": folder,
        "seeds": seeds,
        "cache": config.cache.model_copy(update={"root": folder / "cache"}),
        "train": config.train.model_copy(update=train | {"experts": experts["default"]}),
        "variants": variants,
        "finetune": config.finetune and config.finetune.model_copy(update=_TUNING | {"seeds": seeds}),
        "score": config.score.model_copy(update={"scores": scores, "bootstrap": REPLICATES}),
    }
    return config.model_copy(update=changes)


_TUNING = {"epochs": 1, "head_epochs": 0, "warmup_epochs": 0, "patience": None, "tensorboard": False}


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
