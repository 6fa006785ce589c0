"""``make map``: what mixtures gain on frozen features, by ID classes, training images a class, and experts.

experiments/map-manyclasses.toml ── a study a cell (`cells`) ── extract, train, score in WORK/cells/<cell>/
scores of all cells              ── paired differences, judged together (`map_page`) ── WORK/map.md, map.svg, map.csv
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.benchmark.cells import OrderedImages, cell_study, cells_of, check_experts
from pipeline.benchmark.choice import MapChoice
from pipeline.benchmark.map_page import write_map
from pipeline.benchmark.run import EXPERIMENTS, Benchmark, checked_images, run_studies, study_on
from pipeline.config import RunOptions

MAPPED = EXPERIMENTS / "map-manyclasses.toml"


def run_map(
    data: Path,
    work: Path,
    choice: MapChoice | None = None,
    options: RunOptions | None = None,
    *,
    dry_run: bool = False,
    page: Path | None = None,
    benchmark: Benchmark | None = None,
) -> Iterator[Any]:
    """Run every cell as far as it is not fresh; lines and tables as they come.

    Args:
        data: folder with the benchmark's images.
        work: folder of the cells' studies and of ``map.md``, ``map.svg`` and ``map.csv``.
        choice: which cells.
        options: how to run.
        dry_run: say what would run; nothing but the cells' images and lists is written.
        page: where else the page goes, the picture beside it.
        benchmark: a study and its list of images, where they are not the project's own.

    Raises:
        InputError: a setting is wrong, or the images are not those of the list.
    """
    choice, benchmark = choice or MapChoice(), benchmark or Benchmark([MAPPED])
    whole = study_on(benchmark.studies[0], data, work, choice.overrides)
    whole.require_roles("run")
    check_experts(choice.classes, whole)
    images = checked_images(whole, data, benchmark.listed, choice.unchecked)
    train, test = (
        OrderedImages.unpack(whole.sets_of(role)[0].images or "", work / "images" / role, images.digest)
        for role in ("id-train", "id-test")
    )
    configs = {
        cell: cell_study(whole, cell, work, train, test)
        for cell in cells_of(choice.classes, choice.images, whole, train)
    }
    yield from run_studies(list(configs.values()), options, dry_run)
    if not dry_run:
        yield from write_map(configs, work, images, page)
