"""``make results``: the benchmark's studies one after the other.

images of DATA  ── SHA-256 of each against experiments/benchmark.csv.gz (`pipeline.benchmark.images`)
experiments/results-*.toml  ── extract, train, score, report in WORK/<benchmark>/, whatever is not fresh
WORK/<benchmark>/scores/  ── WORK/results.csv (`comparison`), WORK/results.md (`tables`, `page`)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.benchmark.choice import Choice
from pipeline.benchmark.comparison import JUDGED_AGAINST, check_comparable
from pipeline.benchmark.images import LISTED, BenchmarkImages, compare_images, image_source
from pipeline.benchmark.page import write_results
from pipeline.config import ConfigError, RunConfig, RunOptions, load_config
from pipeline.progress import TqdmProgress
from pipeline.report.wording import duration
from pipeline.study import Study
from stages.config import nearest
from stages.errors import InputError
from stages.progress import Progress

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
STUDIES = tuple(EXPERIMENTS / f"results-{name}.toml" for name in ("caltech", "tinyimagenet", "manyclasses"))

_OTHERS = "--benchmarks to leave others out, or "


@dataclass(frozen=True)
class Benchmark:
    """What is run.

    Attributes:
        studies: experiment files; ``images`` of their sets are looked for in a folder by file name.
        listed: list of the images, see `compare_images`.
    """

    studies: Sequence[Path] = STUDIES
    listed: Path = LISTED


def run_results(
    data: Path,
    work: Path,
    choice: Choice | None = None,
    options: RunOptions | None = None,
    *,
    dry_run: bool = False,
    page: Path | None = None,
    benchmark: Benchmark | None = None,
) -> Iterator[Any]:
    """Run every study of the benchmark as far as it is not fresh; lines and tables as they come.

    Args:
        data: folder with the benchmark's images.
        work: folder of the studies and of ``results.md`` and ``results.csv``.
        choice: what of it to run; by default all but the fine-tunes.
        options: how to run.
        dry_run: say what would run, and no more.
        page: where else the page goes, beside ``results.md``.
        benchmark: what to run, where it is not the project's own.

    Raises:
        InputError: a setting is wrong, or the images are not those of the list.
    """
    choice, benchmark = choice or Choice(), benchmark or Benchmark()
    configs = _configs(benchmark.studies, data, work, choice)
    images = [checked_images(config, data, benchmark.listed, choice.unchecked, _OTHERS) for config in configs]
    yield from run_studies(configs, options, dry_run)
    if not dry_run:
        yield from write_results(configs, work, images, page)


def run_studies(configs: Sequence[RunConfig], options: RunOptions | None, dry_run: bool) -> Iterator[Any]:
    """Run studies as far as they are not fresh, a stage of all before the next; says how long training will take.

    Args:
        configs: the studies.
        options: how to run.
        dry_run: say what would run, and no more.
    """
    remaining = Remaining(TqdmProgress())
    opened = [
        Study(config, options or RunOptions(), partial(remaining.trained, number))
        for number, config in enumerate(configs)
    ]
    yield from [study.outline() for study in opened]
    if dry_run:
        for study in opened:
            yield from study.plan("run")
        return
    try:
        for number, study in enumerate(opened):
            yield from study.do("extract", "pretrained")
            for variant, _ in study.to_train():
                remaining.expect(number, variant, study.training_cost(variant))
        for study in opened:
            yield from study.do("train", "pretrained")
            if study.config.finetune is not None:
                yield from study.do("finetune")
                yield from study.do("extract", "finetuned")
                yield from study.do("train", "finetuned")
            # Its table has hundreds of rows and stands in its summary.md; here only what it says beside.
            yield from (line for line in study.do("score") if isinstance(line, str))
            yield from study.do("report")
    finally:
        for study in opened:
            study.workspace.close()


def _configs(studies: Sequence[Path], data: Path, work: Path, choice: Choice) -> list[RunConfig]:
    """The studies that are asked for, as they are asked for.

    Raises:
        ConfigError: a benchmark that there is not, or a variant that none of them has; see `_config` for the rest.
    """
    plain = {load_config(path).name: path for path in studies}
    for name in choice.benchmarks or ():
        if name not in plain:
            raise ConfigError(f"--benchmarks: there is no {name!r}{nearest(name, plain)}")
    wanted = [path for name, path in plain.items() if choice.benchmarks is None or name in choice.benchmarks]
    if not wanted:
        raise ConfigError(f"--benchmarks: none is named; known: {', '.join(plain)}")
    known = dict.fromkeys(variant.name for path in wanted for variant in load_config(path).variants)
    for name in choice.controls or ():
        if name not in known:
            raise ConfigError(f"--controls: no variant is called {name!r}{nearest(name, known)}")
    return [_config(path, data, work, choice) for path in wanted]


def checked_images(
    config: RunConfig, data: Path, listed: Path, unchecked: bool, otherwise: str = ""
) -> BenchmarkImages:
    """The images of one study, which are to be those of the list.

    Args:
        config: of the study.
        data: folder of the images.
        listed: list of the images, see `compare_images`.
        unchecked: whether others will do as well.
        otherwise: what else can be done where they are others.

    Raises:
        InputError: they are others, and that was not asked for.
    """
    found = compare_images(data, listed, {Path(entry.images or "").name.removesuffix(".tar") for entry in config.sets})
    if found.difference is not None and not unchecked:
        raise InputError(
            f"{data} does not hold the benchmark's images: {found.difference}; see pipeline/benchmark/README.md, give "
            f"{otherwise}--unchecked to run on these all the same"
        )
    return found


def study_on(path: Path, data: Path, work: Path, overrides: Sequence[str]) -> RunConfig:
    """A study of the benchmark, its images in ``data``, its folder below ``work``.

    Raises:
        ConfigError: an override is wrong.
    """
    plain = load_config(path)
    images = [f"sets.{entry.name}.images={image_source(data, entry.images or '')}" for entry in plain.sets]
    return load_config(path, [f"work={work / plain.name}", *images, *overrides])


def _config(path: Path, data: Path, work: Path, choice: Choice) -> RunConfig:
    config = study_on(path, data, work, choice.overrides)
    if choice.controls is not None:
        config = _with_controls(config, choice.controls)
    if not choice.finetune:
        config = config.model_copy(update={"finetune": None})
    config.require_roles("run")
    check_comparable(config)
    return config


def _with_controls(config: RunConfig, controls: Sequence[str]) -> RunConfig:
    """The same study with those of its variants that are named; the baselines' always stay."""
    kept = {*controls, *(baseline.variant for baseline in JUDGED_AGAINST)}
    return config.model_copy(update={"variants": tuple(v for v in config.variants if v.name in kept)})


class Remaining:
    """Says after every training how long the others will take.

    Variants cost more or less than their epochs, rows and tokens say: an expected training takes the rate of its own
    variant where one was trained, and the mean rate until then.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._left: list[tuple[int, str, float]] = []  # study, variant, cost
        self._done: list[tuple[str, float, float]] = []  # variant, cost, seconds
        self._total = 0

    def expect(self, study: int, variant: str, cost: float) -> None:
        """A mixture that is to be trained."""
        self._left.append((study, variant, cost))
        self._total += 1

    def trained(self, study: int, variant: str, seconds: float) -> None:
        """It was trained."""
        index = next(index for index, (*name, _) in enumerate(self._left) if name == [study, variant])
        self._done.append((variant, self._left.pop(index)[2], seconds))
        done = f"{self._total - len(self._left)} of {self._total} trained"
        self._progress.note(f"{done}, about {duration(self.seconds_left())} of training to go")

    def seconds_left(self) -> float:
        """Estimate."""
        return sum(cost * self._rate(variant) for _, variant, cost in self._left)

    def _rate(self, variant: str) -> float:
        own = [(cost, seconds) for name, cost, seconds in self._done if name == variant]
        costs, seconds = zip(*(own or [(cost, seconds) for _, cost, seconds in self._done]), strict=True)
        return float(sum(seconds) / sum(costs))
