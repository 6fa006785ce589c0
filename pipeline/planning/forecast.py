"""From what pilots took to what the study will take: arithmetic from the size of the data.

Steps, refined rows and images are proportional to their number. All else of a stage is a line a + b·x through a small
and a larger pilot; x counts multiplications of linear heads (rows x classes) in stage two, numbers that are read (rows
x (features + classes)) in stage three. Searches grow with bank x queries, and are timed apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from cache import FeatureSpec, plan_shards
from pipeline.config import JOINT, RunConfig
from pipeline.planning.pilot import Timed
from pipeline.planning.size import StudySize
from pipeline.report.maps import MOST_DOTS
from stages.training.recipes import resolve_recipe, resolve_settings

_SHARD_BYTES = 64 << 20  # of two shards: one that fills, one that is written
_ROW_BYTES = 1 << 10  # that a scored row takes in memory, about
_SEARCHES = frozenset({"knn", "knn-mean", "nnguide", "relation"})


@dataclass(frozen=True)
class StageCost:
    """What a stage of one backbone takes.

    Attributes:
        name: of the stage, as the record has it.
        seconds: with one worker; 0 where it is fresh.
        shared: of these, those that workers share: seconds of each part, and into how many pieces it falls.
        memory: bytes, at most, of a process; 0 where it is fresh.
        about: what is done, or that it is fresh.
    """

    name: str
    seconds: float
    shared: tuple[tuple[float, int], ...]
    memory: int
    about: str

    def with_workers(self, n: int) -> float:
        """Seconds with n workers, each on such a machine."""
        return self.seconds - sum(own * (1 - ceil(pieces / n) / pieces) for own, pieces in self.shared)


@dataclass(frozen=True)
class ToDo:
    """What of a study is not fresh.

    Attributes:
        images: to extract, by set, of each backbone by its name.
        mixtures: to train, (variant, seed) of each backbone by its name.
        probes: backbones whose linear probe is not there.
        finetunes: seeds of backbones to make.
        score, report: whether they are to be made.
        subjects: choices of features to score: those of each backbone and of each mixture.
    """

    images: dict[str, dict[str, int]]
    mixtures: dict[str, list[tuple[str, int]]]
    probes: set[str]
    finetunes: dict[str, int]
    score: bool
    report: bool
    subjects: int


@dataclass(frozen=True)
class Calibration:
    """What was measured of this machine.

    Attributes:
        loading: seconds until the network is there, libraries included.
        image: seconds of an image's extraction; 0 where none is to be extracted.
        search: seconds of a query times a row of the bank.
        extracting: bytes of memory that an extraction has taken.
        pilots: a small one and a larger one.
    """

    loading: float
    image: float
    search: float
    extracting: int
    pilots: Sequence[Timed]


class Forecast:
    """What the stages of a study take.

    Args:
        config: the study.
        size: of its sets.
        spec: of its features.
        measured: on this machine.
    """

    def __init__(self, config: RunConfig, size: StudySize, spec: FeatureSpec, measured: Calibration) -> None:
        self._config, self._size, self._spec, self._measured = config, size, spec, measured
        self._n_train = size.of_roles(config, "id-train")
        self._n_tests = size.total - self._n_train

    @property
    def _last(self) -> Timed:
        return self._measured.pilots[-1]

    @property
    def _classes(self) -> int:
        return self._size.n_classes or self._last.n_classes

    def extract(self, backbone: str, images: Mapping[str, int]) -> StageCost:
        """The caches of one backbone, of so many images of each set."""
        name, n = f"extract {backbone}", sum(images.values())
        if not n:
            return _fresh(name)
        row_bytes, second = self._spec.row_bytes, self._measured.image
        # One set after the other, the shards of each side by side.
        shared = tuple((own * second, len(plan_shards(own, row_bytes))) for own in images.values() if own)
        memory = self._measured.extracting + min(2 * _SHARD_BYTES, n * row_bytes)
        return StageCost(name, self._measured.loading + n * second, shared, memory, f"{n:,} rows")

    def finetune(self, seed: int, todo: bool) -> StageCost:
        """One backbone end to end."""
        name = f"finetune seed {seed}"
        if not todo:
            return _fresh(name)
        assert self._config.finetune is not None
        epochs = resolve_recipe(self._config.finetune, self._n_train).epochs
        seconds = (self._last.tuning or 0.0) * epochs * self._ratio
        return StageCost(name, seconds, (), self._last.peaks.get("finetune", 0), f"{epochs} epochs")

    @property
    def _ratio(self) -> float:
        return self._n_train / self._last.n_train

    def train(self, backbone: str, mixtures: Sequence[tuple[str, int]], probe: bool) -> StageCost:
        """Probe and mixtures on the features of one backbone."""
        name = f"train {backbone}"
        if not mixtures and not probe:
            return _fresh(name)
        seconds = self._line([(timed, timed.probe) for timed in self._measured.pilots], _fits) if probe else 0.0
        configs = self._config.variant_configs()
        total = 0
        for variant, _ in mixtures:
            known = "default" if variant == JOINT else variant
            own = [(timed, parts) for timed in self._measured.pilots if (parts := timed.mixtures.get(known))]
            epochs = resolve_settings(configs[known], max(self._classes, 2), self._spec).epochs
            epochs = 0 if variant == JOINT else epochs  # its experts were trained with the backbone
            total += epochs
            parts = own[-1][1]
            seconds += (parts.steps * epochs + parts.refining) * self._ratio
            seconds += self._line([(timed, parts.rest) for timed, parts in own], _fits)
        memory = self._last.peaks.get("train", 0)
        return StageCost(name, seconds, (), memory, f"{len(mixtures)} mixtures, {total} epochs")

    def score(self, todo: ToDo) -> StageCost:
        """All scores."""
        if not todo.score:
            return _fresh("score")
        pilots = [(timed, timed.score) for timed in self._measured.pilots if timed.score is not None]
        if not pilots:
            return StageCost("score", 0.0, (), 0, "no ID test set or no OOD set")
        own = 1 + len(self._last.mixtures)  # choices of features that the pilot has scored
        mixtures = max(1, own - 1)
        rest = self._line([(timed, parts.rest) for timed, parts in pilots], self._reads) / own * todo.subjects
        rest += self._searches() * todo.subjects
        refining = pilots[-1][1].refining * self._n_tests / self._last.n_tests / mixtures
        refining *= max(0, todo.subjects - len(todo.images))
        held = 4 * self._n_train * self._spec.cls_dim + _ROW_BYTES * self._size.total
        memory = self._last.peaks["score"] + held
        about = f"{self._n_tests:,} test rows, {todo.subjects} choices of features"
        return StageCost("score", rest + refining, (), memory, about)

    def report(self, todo: ToDo) -> StageCost:
        """The page."""
        if not todo.report or self._last.report is None:
            return _fresh("report")
        pilots = [(timed, timed.report) for timed in self._measured.pilots if timed.report is not None]
        dots = [float(min(MOST_DOTS, timed.n_tests)) for timed, _ in pilots]
        seconds = line(dots, [taken for _, taken in pilots], float(min(MOST_DOTS, self._n_tests)))
        return StageCost("report", seconds, (), self._last.peaks["report"], "one page")

    def _searches(self) -> float:
        """Seconds of all searches of a choice of features: test rows and those that calibrate, in a bank of all."""
        names = {part for score in self._config.score.scores for part in score.split("+")}
        if not names & (_SEARCHES | {"auto"}):
            return 0.0
        return self._measured.search * self._n_train * self._size.total

    def _reads(self, timed: Timed | None) -> float:
        width = self._spec.cls_dim + (self._classes if timed is None else timed.n_classes)
        return (self._size.total if timed is None else timed.n_train + timed.n_tests) * float(width)

    def _line(self, points: Sequence[tuple[Timed, float]], size: Any) -> float:
        """What a line through the pilots says of the study, neither part below 0."""
        x = self._n_train * float(self._classes) if size is _fits else self._reads(None)
        at = [size(timed) for timed, _ in points]
        seconds = [taken for _, taken in points]
        return line(at, seconds, x)


def line(at: Sequence[float], seconds: Sequence[float], x: float) -> float:
    """Seconds at x by a line through two points, whose slope and beginning are not below 0.

    >>> line([1, 2], [3, 4], 10), line([1, 2], [1, 3], 10), line([2, 2], [3, 2], 4), line([1, 2], [3, 2], 10)
    (12.0, 15.0, 4.0, 3)
    """
    if at[0] == at[1]:
        return seconds[1] * x / at[1]
    slope = (seconds[1] - seconds[0]) / (at[1] - at[0])
    begin = seconds[0] - slope * at[0]
    if slope <= 0:
        return max(seconds)
    return seconds[1] * x / at[1] if begin < 0 else begin + slope * x


def _fits(timed: Timed) -> float:
    """Multiplications of a step of a linear head, a feature."""
    return float(timed.n_train) * timed.n_classes


def _fresh(name: str) -> StageCost:
    return StageCost(name, 0.0, (), 0, "fresh")
