"""``make results``: the benchmark's studies one after the other.

images of DATA  ── SHA-256 of each against experiments/benchmark.csv.gz
experiments/results-*.toml  ── extract, train, score, report in WORK/<benchmark>/, whatever is not fresh
WORK/<benchmark>/scores/  ── WORK/results.md, WORK/results.csv (`pipeline.benchmark.comparison`)
"""

import csv
import gzip
import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.benchmark.comparison import JUDGED_AGAINST, check_comparable, write_results
from pipeline.config import ConfigError, RunConfig, RunOptions, load_config
from pipeline.progress import TqdmProgress
from pipeline.report.wording import duration
from pipeline.study import Study
from stages.config import nearest
from stages.errors import InputError
from stages.inputs.images import ImageError, list_images
from stages.progress import Progress

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
STUDIES = (EXPERIMENTS / "results-caltech.toml", EXPERIMENTS / "results-tinyimagenet.toml")
LISTED = EXPERIMENTS / "benchmark.csv.gz"


def image_source(data: Path, images: str) -> Path:
    """Where a set's images are in DATA: the file of the same name, or a folder of that name without ``.tar``."""
    name = Path(images).name
    folder = data / name.removesuffix(".tar")
    return folder if folder.is_dir() else data / name


def compare_images(data: Path, listed: Path) -> str | None:
    """How the images of DATA differ from the benchmark's list, in one line; None where they do not.

    Args:
        data: folder of a tar or a folder per set.
        listed: gzipped CSV with columns ``set``, ``id`` and ``sha256``.

    Raises:
        InputError: DATA is no folder, or a set of it cannot be listed.
    """
    if not data.is_dir():
        raise InputError(f"{data}: no such folder; give the one that holds the benchmark's images")
    expected: dict[str, dict[str, str]] = {}
    with gzip.open(listed, "rt", encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            expected.setdefault(line["set"], {})[line["id"]] = line["sha256"]
    found: dict[str, list[str]] = {"missing": [], "with other bytes": [], "not in the list": []}
    for name, digests in expected.items():
        source = image_source(data, f"{name}.tar")
        actual = _digests(source) if source.exists() else {}
        found["missing"] += [f"{name}/{id_}" for id_ in digests if id_ not in actual]
        found["with other bytes"] += [
            f"{name}/{id_}" for id_ in digests if id_ in actual and actual[id_] != digests[id_]
        ]
        found["not in the list"] += [f"{name}/{id_}" for id_ in actual if id_ not in digests]
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in found.items()
        if names
    ]
    return "; ".join(parts) or None


def _digests(source: Path) -> dict[str, str]:
    table = list_images(str(source))
    reader = table.reader()

    def digest(row: int) -> str:
        try:
            return hashlib.sha256(reader.read(row)).hexdigest()
        except ImageError:  # as good as other bytes
            return ""

    return {id_: digest(row) for row, id_ in enumerate(table.ids)}


def run_results(
    data: Path,
    work: Path,
    overrides: Sequence[str] = (),
    options: RunOptions | None = None,
    *,
    controls: Sequence[str] | None = None,
    finetune: bool = False,
    unchecked: bool = False,
    dry_run: bool = False,
    studies: Sequence[Path] = STUDIES,
    listed: Path = LISTED,
) -> Iterator[Any]:
    """Run every study of the benchmark as far as it is not fresh; lines and tables as they come.

    Args:
        data: folder with the benchmark's images.
        work: folder of the studies and of ``results.md`` and ``results.csv``.
        overrides: ``a.b=value`` for every study.
        options: how to run.
        controls: names of the variants to run beside the default and the baselines'; by default all.
        finetune: run the end-to-end fine-tunes as well, and what follows from their features.
        unchecked: run on other images than the listed ones as well; the results say so.
        dry_run: say what would run, and no more.
        studies: experiment files; ``images`` of their sets are looked for in `data` by file name.
        listed: see `compare_images`.

    Raises:
        InputError: a setting is wrong, or the images are not those of the list.
    """
    configs = [_config(path, data, work, overrides, controls, finetune) for path in studies]
    difference = compare_images(data, listed)
    if difference is not None and not unchecked:
        raise InputError(
            f"{data} does not hold the benchmark's images: {difference}; see pipeline/benchmark/README.md, "
            "or give --unchecked to run on them all the same"
        )
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
            study.progress.close()
    yield from write_results(configs, work, difference)


def _config(
    path: Path,
    data: Path,
    work: Path,
    overrides: Sequence[str],
    controls: Sequence[str] | None = None,
    finetune: bool = False,
) -> RunConfig:
    plain = load_config(path)
    images = [f"sets.{entry.name}.images={image_source(data, entry.images or '')}" for entry in plain.sets]
    config = load_config(path, [f"work={work / plain.name}", *images, *overrides])
    if controls is not None:
        config = _with_controls(config, controls)
    if not finetune:
        config = config.model_copy(update={"finetune": None})
    config.require_roles("run")
    check_comparable(config)
    return config


def _with_controls(config: RunConfig, controls: Sequence[str]) -> RunConfig:
    """The same study with some of its variants; those of the baselines always stay."""
    known = [variant.name for variant in config.variants]
    if unknown := [name for name in controls if name not in known]:
        raise ConfigError(f"--controls: {config.name} has no variant {unknown[0]!r}{nearest(unknown[0], known)}")
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
