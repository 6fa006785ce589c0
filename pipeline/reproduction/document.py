"""The study file: runs of experiment files with other backbones, and the numbers that they must reproduce.

A run is an experiment file with some keys set otherwise, as ``--set`` would; the study file names both. Nothing here is
a setting of its own: what a run does is in its experiment file.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.config import ConfigError, RunConfig, load_config
from pipeline.config.explain import as_given, first_problem, score_problem
from pipeline.config.load import read_toml
from pipeline.config.tables import FolderName, Several
from pipeline.reproduction.selection import Selection
from stages.config import Positive, StageConfig, nearest
from stages.metrics.ranking import METRICS
from stages.metrics.selective import SELECTIVE
from stages.scorers import SCORERS, needs_of

KNN_ACCURACY = "knn-accuracy"  # the measure that needs features alone, and so comes first
EVERY = "every"  # as score.scores: all that are of a frozen backbone's class token, or of its linear probe
_MEASURES = (KNN_ACCURACY, *METRICS, *(f"fsood_{name}" for name in METRICS), *SELECTIVE)
_NOT_OF_FROZEN = {"patches", "others", "other", "taps"}
_SUMS = ("knn+energy", "ncm+energy", "mahalanobis-pp+energy")
Verdict = Literal["pass", "fail", "not run"]


class ReproducedRun(StageConfig):
    """An experiment file with other settings.

    Attributes:
        name: of the run, and of its folder.
        experiment: file that it is, relative to the study file; the study's where nothing is given.
        set: keys of it that are otherwise, dotted. Paths of images, features and weights are relative to DATA.
        training: how the network was trained, as OpenOOD's leaderboard has it.
        arch: the network, as OpenOOD's leaderboard has it; its name in timm where nothing is given.
    """

    name: FolderName
    experiment: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    training: str = "CrossEntropy"
    arch: str | None = None


class Target(StageConfig):
    """A published number.

    Attributes:
        run: that must reproduce it.
        measure: ``knn-accuracy``, or a metric's column of the table.
        score: of the frozen backbone, whose row it is; none of ``knn-accuracy``.
        of: ``near``, ``far`` or ``all``, or the name of a set.
        value: per cent.
        tolerance: percentage points by which it may be missed, either way.
        source: where it was published, and in what that differs.
    """

    run: str
    measure: str
    score: str | None = None
    of: str | None = None
    value: float = Field(ge=0, le=100)
    tolerance: Positive
    source: str = Field(min_length=1)

    @property
    def needs_features_alone(self) -> bool:
        """Whether it can be measured before anything is trained."""
        return self.measure == KNN_ACCURACY

    def problems(self) -> Iterator[str]:
        """What is wrong with it, beginning with its key."""
        if self.measure not in _MEASURES:
            yield f"measure: {as_given(self.measure)} is not known{nearest(self.measure, _MEASURES)}"
        for key in ("score", "of"):
            if self.needs_features_alone and getattr(self, key) is not None:
                yield f"{key}: is for metrics of the table; {KNN_ACCURACY} has none"
            if not self.needs_features_alone and getattr(self, key) is None:
                yield f"{key}: missing"
        if self.score is not None and (problem := score_problem(self.score)) is not None:
            yield f"score: {problem}"


class StudyDocument(StageConfig):
    """A study file.

    Attributes:
        name: of the study, for people.
        experiment: file of the runs that name none, relative to the study file.
        set: keys that are otherwise in every run; a run's own go over them.
        runs: in the order in which they run.
        targets: what they must reproduce.
    """

    name: str = Field(min_length=1)
    experiment: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    runs: Several[ReproducedRun]
    targets: Several[Target] = ()

    def targets_of(self, run: str) -> list[Target]:
        """What a run must reproduce, in the order of the file."""
        return [target for target in self.targets if target.run == run]

    @model_validator(mode="after")
    def _check(self) -> "StudyDocument":
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        names = [run.name for run in self.runs]
        if not names:
            yield "runs: missing; add one under [[runs]]"
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            yield f"runs.{name}: two runs have this name"
        for run in self.runs:
            if run.experiment is None and self.experiment is None:
                yield f"runs.{run.name}.experiment: missing, and there is none for all"
        for number, target in enumerate(self.targets, 1):
            if target.run not in names:
                yield f"targets #{number}.run: {as_given(target.run)} is no run{nearest(target.run, names)}"
            yield from (f"targets #{number}.{problem}" for problem in target.problems())


def load_study(path: Path) -> StudyDocument:
    """Read a study file.

    Raises:
        ConfigError: with the first problem and the number of the others.
    """
    document = read_toml(path)
    try:
        return StudyDocument.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error, document, StudyDocument)}") from error


def run_configs(study: StudyDocument, path: Path, data: Path, work: Path, selection: Selection) -> dict[str, RunConfig]:
    """The experiment of each run that was asked for, by its name.

    Args:
        study: as it was loaded.
        path: of the study file.
        data: folder that the paths of sets and of weights are relative to.
        work: folder of all runs and of their caches.
        selection: what of the study is asked for.

    Raises:
        ConfigError: an experiment file or a setting cannot be used, or a run that is asked for is none.
    """
    names = [run.name for run in study.runs]
    asked = names if selection.only is None else list(selection.only)
    if unknown := [name for name in asked if name not in names]:
        raise ConfigError(f"--only: {path} has no run {unknown[0]!r}{nearest(unknown[0], names)}")
    configs = {run.name: _config(study, run, path, data, work, selection) for run in study.runs if run.name in asked}
    for config in configs.values():
        config.require_roles("run")
    return configs


def _config(
    study: StudyDocument, run: ReproducedRun, path: Path, data: Path, work: Path, selection: Selection
) -> RunConfig:
    experiment = path.parent / str(run.experiment or study.experiment)
    own = [f"work={work / run.name}", f"cache.root={work / 'cache'}", f"name={json.dumps(run.name)}"]
    overrides = [f"data={data.absolute()}", *own, *_as_overrides(study.set | run.set, data), *selection.overrides]
    config = load_config(experiment, overrides)
    backbone = config.backbone
    if backbone is not None and backbone.weights == "hub":
        places = [data / "weights" / f"{backbone.name}{ending}" for ending in (".safetensors", ".pth")]
        if found := next((place for place in places if place.is_file()), None):
            return load_config(experiment, [*overrides, f"backbone.weights={found.absolute()}"])
    return config


def _as_overrides(given: Mapping[str, Any], data: Path) -> Iterator[str]:
    """Keys as ``--set`` takes them, paths below DATA absolute."""
    for key, value in given.items():
        is_weights = key == "backbone.weights" and value not in ("hub", "embedded")
        is_source = re.fullmatch(r"sets\..+\.(images|features|root)", key) and not str(value).startswith("sklearn:")
        if is_weights or is_source:
            yield f"{key}={(data / str(value)).absolute()}"
        elif key == "score.scores" and value == EVERY:
            yield f"{key}={json.dumps(every_score())}"
        else:
            yield f"{key}={json.dumps(value, ensure_ascii=False)}"


def every_score() -> list[str]:
    """All scores of a frozen backbone's class token or of its linear probe's logits, and the usual sums."""
    return [name for name in SCORERS if not needs_of(name) & _NOT_OF_FROZEN] + list(_SUMS)
