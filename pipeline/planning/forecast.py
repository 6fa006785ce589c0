"""From what pilots took to what the study will take: arithmetic from the size of the data.

Steps, refined rows and images are proportional to their number; lines of the table and folds of ``auto`` are counted.
Heads are as much more than a pilot's as the linear probe is, fits and scores, where ``auto`` is asked for, as one fold
is: by lines a + b·x through a small and a larger pilot, where x counts multiplications of heads (rows x classes), and
numbers that are read (rows x (features + classes)). Searches grow with bank x queries, and are timed apart, as are
heads of many more rows and classes than a pilot has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

from cache import FeatureSpec, plan_shards
from pipeline.config import JOINT, RunConfig
from pipeline.planning.pilot import Timed
from pipeline.planning.shared import pieces_of_heads, pieces_of_refining, pieces_of_search
from pipeline.planning.size import StudySize, experts_of
from stages.detection.pseudo import FITTED_ROWS, n_folds
from stages.scorers import AUTO, FROZEN
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
        finetunes: backbones to make.
        score, report: whether they are to be made.
        scored: variant of each mixture that is scored, over all backbones.
    """

    images: dict[str, dict[str, int]]
    mixtures: dict[str, list[tuple[str, int]]]
    probes: set[str]
    finetunes: set[str]
    score: bool
    report: bool
    scored: Sequence[str]


@dataclass
class Calibration:
    """What was measured of this machine.

    Attributes:
        loading: seconds until the network is there, libraries included.
        image: seconds of an image's extraction; 0 where none is to be extracted.
        extracting: bytes of memory that an extraction has taken.
        pilots: a small one and a larger one, without mixtures where they take too long; or one; or none, where all is
            fresh. The last is fine-tuned.
        search: seconds of a query times a row of the bank.
        method: seconds of a line of the table.
        head: seconds of a row times a class, where pilots are too small to tell; or 0.
        seconds: that all of it took.
    """

    loading: float
    image: float
    extracting: int
    pilots: list[Timed] = field(default_factory=list)
    search: float = 0.0
    method: float = 0.0
    head: float = 0.0
    seconds: float = 0.0

    @property
    def peaks(self) -> Mapping[str, int]:
        """Bytes of the largest memory after each stage, by its verb."""
        return {verb: peak for timed in self.pilots for verb, peak in timed.peaks.items()}


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
        self._n_tests = size.of_roles(config, "id-test", "near-ood", "far-ood", "cs-id")

    @property
    def _first(self) -> Timed:
        return self._measured.pilots[0]

    @property
    def _classes(self) -> int:
        return self._size.n_classes or self._measured.pilots[-1].n_classes

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
        each, starting = self._measured.pilots[-1].tuning or (0.0, 0.0)
        rows = self._n_train * (1 - (0 if self._config.sets_of("id-val") else self._config.split.val))
        seconds = starting + each * epochs * rows
        return StageCost(name, seconds, (), self._measured.peaks.get("finetune", 0), f"{epochs} epochs")

    def train(self, backbone: str, mixtures: Sequence[tuple[str, int]], probe: bool) -> StageCost:
        """Probe and mixtures on the features of one backbone."""
        name = f"train {backbone}"
        if not mixtures and not probe:
            return _fresh(name)
        pilot = next(timed for timed in reversed(self._measured.pilots) if timed.mixtures)
        heads, refining = self._heads(pilot.probe, pilot, 1.0) if probe else 0.0, 0.0
        seconds, grown = 0.0, self._n_train / pilot.n_train
        configs = self._config.variant_configs()
        total = 0
        for variant, _ in mixtures:
            known = "default" if variant == JOINT else variant
            own = pilot.mixtures[known]
            # Those of a fine-tune were trained with the backbone.
            settings = resolve_settings(configs[known], max(self._classes, 2), self._spec)
            epochs = 0 if variant == JOINT else settings.epochs
            total += epochs
            seconds += own.steps * epochs * grown + own.starting
            refining += own.refining * grown
            # A head of all classes, and one a group, which has as small a part of the rows as of the classes.
            heads += self._heads(own.rest, pilot, 1.0 + 1.0 / experts_of(configs[known], self._size.n_classes))
        about = f"{len(mixtures)} mixtures, {total} epochs"
        shared = (
            (heads, pieces_of_heads(self._n_train, self._spec.cls_dim)),
            (refining, pieces_of_refining(self._n_train)),
        )
        return StageCost(name, seconds + heads + refining, shared, self._measured.peaks.get("train", 0), about)

    def _heads(self, seconds: float, pilot: Timed, heads: float) -> float:
        """What linear heads take of all rows: as much more than those of a pilot as the probe does.

        Args:
            seconds: that they took in the pilot.
            pilot: this one.
            heads: how many they are, each as large as the probe.
        """
        products = float(self._n_train) * self._classes
        if self._measured.head:
            return seconds + heads * self._measured.head * products
        pilots = self._measured.pilots
        at = [float(timed.n_train) * timed.n_classes for timed in pilots]
        return seconds * line(at, [timed.probe for timed in pilots], products) / pilot.probe

    def score(self, todo: ToDo) -> StageCost:
        """All scores."""
        if not todo.score:
            return _fresh("score")
        first = self._first
        if first.score is None:
            return StageCost("score", 0.0, (), 0, "no ID test set or no OOD set")
        n_backbones, own = len(todo.images), first.score
        scores = [tuple(self._config.score.scores)] * n_backbones + [*map(self._config.scores_of, todo.scored)]
        subjects, auto = len(scores), sum(AUTO in own for own in scores)
        fold = self._fold()
        rest = own.rest * fold / first.fold if auto and first.fold else self._rest()
        seconds = rest / 2 * subjects
        last, parts = next((timed, timed.score) for timed in reversed(self._measured.pilots) if timed.score)
        refining = parts.refining * self._n_tests / last.n_tests * len(todo.scored)
        shares = [len(judged) / len(self._config.score.scores) for judged in scores[n_backbones:]]
        methods = own.methods[0] * n_backbones + own.methods[1] * sum(shares) + auto
        seconds += methods * self._measured.method
        seconds += auto * fold * n_folds(self._classes)
        searches, queries = self._searches() * subjects, self._n_tests + self._n_calibrate
        shared = (
            (refining, pieces_of_refining(self._n_tests)),
            (searches, pieces_of_search(queries, self._n_train)),
        )
        held = 4 * self._n_train * self._spec.cls_dim + _ROW_BYTES * self._size.total
        about = f"{self._n_tests:,} test rows, {subjects} choices of features"
        return StageCost("score", seconds + refining + searches, shared, self._measured.peaks["score"] + held, about)

    def _rest(self) -> float:
        """Seconds of fits and scores, by the pilots that were scored."""
        pilots = [(timed, timed.score.rest) for timed in self._measured.pilots if timed.score]
        at = [self._reads(timed.n_train + timed.n_tests, timed.n_classes) for timed, _ in pilots]
        return line(at, [rest for _, rest in pilots], self._reads(self._size.total, self._classes))

    def _fold(self) -> float:
        """Seconds of a pair of folds, of which there are so many rows at most."""
        pilots = self._measured.pilots
        at = [self._reads(min(FITTED_ROWS, timed.n_train), timed.n_classes) for timed in pilots]
        x = self._reads(min(FITTED_ROWS, self._n_train), self._classes)
        return line(at, [timed.fold for timed in pilots], x)

    def _reads(self, rows: int, n_classes: int) -> float:
        return rows * float(self._spec.cls_dim + n_classes)

    def _searches(self) -> float:
        """Seconds of all searches of a choice of features: test rows and those that calibrate, in a bank of all."""
        names = {part.removeprefix(FROZEN) for score in self._config.score.scores for part in score.split("+")}
        if not names & (_SEARCHES | {AUTO}):
            return 0.0
        return self._measured.search * self._n_train * (self._n_tests + self._n_calibrate)

    @property
    def _n_calibrate(self) -> int:
        """Rows that are held out, or that take turns at it."""
        if self._size.is_cross_fitted(self._config):
            return self._n_train
        return self._size.of_roles(self._config, "id-val") or round(self._n_train * self._config.split.val)

    def report(self, todo: ToDo) -> StageCost:
        """The page."""
        seconds = self._first.report if todo.report else None
        if seconds is None:
            return _fresh("report")
        return StageCost("report", seconds, (), self._measured.peaks["report"], "one page")


def line(at: Sequence[float], seconds: Sequence[float], x: float) -> float:
    """Seconds at x by a line through one or two points, whose slope and beginning are not below 0.

    >>> line([1, 2], [3, 4], 10), line([1, 2], [1, 3], 10), line([2], [3], 4), line([1, 2], [3, 2], 10)
    (12.0, 15.0, 6.0, 3)
    """
    if len(at) == 1:
        return seconds[0] * x / at[0]
    slope = (seconds[1] - seconds[0]) / (at[1] - at[0])
    begin = seconds[0] - slope * at[0]
    if slope <= 0:
        return max(seconds)
    return seconds[1] * x / at[1] if begin < 0 else begin + slope * x


def _fresh(name: str) -> StageCost:
    return StageCost(name, 0.0, (), 0, "fresh")
