"""A pilot: the study itself on some of its rows, in a folder that is thrown away, its stages' own code timed."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cache import FeatureSpec
from pipeline.backbones import StudyBackbone
from pipeline.config import RunConfig, RunOptions, SetConfig
from pipeline.planning.clock import Clock
from pipeline.planning.pool import Pool, write_cache
from pipeline.planning.sample import PilotSet
from pipeline.planning.size import StudySize
from pipeline.record import peak_memory_bytes
from pipeline.sets import Sets
from pipeline.study import Study
from stages.inputs.images import SampleTable
from stages.mixture.grouping import experts_for
from stages.networks.backbone import Backbone


@dataclass(frozen=True)
class Parts:
    """Seconds of one training, or of one scoring, by what scales alike.

    Attributes:
        steps: of one epoch, over all models of a mixture, judging included.
        refining: of rows through the experts.
        rest: all else: heads above all in stage two, in stage three fits, searches, metrics.
    """

    steps: float = 0.0
    refining: float = 0.0
    rest: float = 0.0


@dataclass
class Timed:
    """What a pilot took.

    Attributes:
        n_train, n_tests, n_classes: how large it was.
        probe: seconds of the linear probe.
        mixtures: by variant.
        tuning: seconds of one epoch of the fine-tune; None where none is asked for.
        score, report: None where it was not run.
        peaks: bytes of the largest memory after each stage, by its verb.
        seconds: of all of it.
    """

    n_train: int
    n_tests: int
    n_classes: int
    probe: float = 0.0
    mixtures: dict[str, Parts] = field(default_factory=dict)
    tuning: float | None = None
    score: Parts | None = None
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


def run_pilot(material: Material, sets: Mapping[str, PilotSet], folder: Path, verbs: set[str]) -> Timed:
    """Run the stages of a study on some rows, one epoch of each training, one seed.

    Args:
        material: what it is made of.
        sets: its rows.
        folder: where it may write.
        verbs: stages to run: some of ``train``, ``finetune``, ``score``, ``report``.
    """
    began = time.perf_counter()
    config = pilot_config(material.config, material.size, folder)
    (train,) = config.sets_of("id-train")
    n_train, n_all = len(sets[train.name]), sum(map(len, sets.values()))
    timed = Timed(n_train, n_all - n_train, max(1, len(sets[train.name].class_names)))
    clock = Clock()
    laps: dict[str, Parts] = {}

    def lap(variant: str, seconds: float) -> None:
        laps[variant] = _parts(clock, seconds)

    study = Study(config, RunOptions(), on_trained=lap)
    study.workspace.progress = clock
    study.workspace.sets = _GivenSets(config, material.tables)
    backbone = _LoadedBackbone(config, "pretrained", network=material.network)
    study.workspace.pretrained = backbone
    caches = {
        name: write_cache(folder / "cache", name, own, material.pools[name], material.spec)
        for name, own in sets.items()
    }
    backbone.link(material.spec, caches, {})
    if "train" in verbs:
        whole = _seconds(lambda: study.do("train", "pretrained"))
        timed.mixtures = laps
        timed.probe = max(0.0, whole - sum(own.steps + own.refining + own.rest for own in laps.values()))
        timed.peaks["train"] = peak_memory_bytes()
    if "finetune" in verbs:
        study.do("finetune")
        timed.tuning = clock.taken("finetune")["finetune"].seconds
        timed.peaks["finetune"] = peak_memory_bytes()
    clock.taken()
    if "score" in verbs:
        timed.score = _parts(clock, _seconds(lambda: study.do("score", "pretrained")))
        timed.peaks["score"] = peak_memory_bytes()
    if "report" in verbs:
        timed.report = _seconds(lambda: study.do("report"))
        timed.peaks["report"] = peak_memory_bytes()
    timed.seconds = time.perf_counter() - began
    return timed


def pilot_config(config: RunConfig, size: StudySize, folder: Path) -> RunConfig:
    """The study as a pilot runs it: as many experts, one epoch, one seed, in another folder."""
    own = {variant.name: variant for variant in config.variants}
    experts = {name: _experts(train.experts, size) for name, train in config.variant_configs().items()}
    train = {"epochs": 1, "warmup_epochs": 0.5, "patience": None, "tensorboard": False, "experts": experts["default"]}
    grouped = {"grouping": "balanced"} if config.train.grouping not in ("balanced", "kmeans") else {}
    seed = config.seeds[0]
    variants = tuple(
        variant.model_copy(
            update={
                "set": variant.set
                | {f"train.{key}": value for key, value in (train | grouped).items()}
                | {"train.experts": experts[name]},
                "seeds": None,
            }
        )
        for name, variant in own.items()
    )
    changes = {
        "work": folder,
        "seeds": (seed,),
        "cache": config.cache.model_copy(update={"root": folder / "cache"}),
        "train": config.train.model_copy(update=train | grouped),
        "variants": variants,
        "finetune": config.finetune and config.finetune.model_copy(update=_TUNING | {"seeds": (seed,)}),
    }
    return config.model_copy(update=changes)


_TUNING = {"epochs": 1, "head_epochs": 0, "warmup_epochs": 0, "patience": None, "tensorboard": False}


def _experts(asked: int | str, size: StudySize) -> int:
    return asked if isinstance(asked, int) else experts_for(max(size.n_classes, 2))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _parts(clock: Clock, seconds: float) -> Parts:
    """Where the seconds of a stage went."""
    spent = clock.taken("train", "refine")
    steps, refining = spent["train"].seconds, spent["refine"].seconds
    return Parts(steps, refining, max(0.0, seconds - steps - refining))
