"""Settings of stage two compared without any OOD set and without id-test. ``make pseudo-ood DATA=folder``.

Of each benchmark of ``make results`` the id-train images alone are read; of many classes only where it is named. In
each of three folds, or of those that are given,

    id-train   four of five images of three quarters of the classes
    id-test    their other images
    near-ood   all images of the classes that were left out
    far-ood    another benchmark's id-train images; and the id-test images cut into 4 x 4 tiles and shuffled

A fold is an ordinary study: it goes on where it was killed, and its report can be looked at. Prints a table of means
over the folds for each benchmark. A training takes about a minute.
"""

import argparse
import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from pipeline.benchmark.cells import order_key
from pipeline.benchmark.images import image_source
from pipeline.benchmark.run import STUDIES
from pipeline.config import RunOptions, load_config
from pipeline.study import Study
from stages.inputs.images import list_images

FOLDS = (0, 1, 2)
PARTS = 4  # classes are dealt into parts; fold f leaves part f out
TEST_EVERY = 5
TILES = 4
SCORES = ("energy", "knn", "knn+energy")
SMALL = ("results-caltech", "results-tinyimagenet")  # a fold of many classes takes as long as all of theirs
VARIANTS = {
    "lr-3e-5": "train.lr = 3e-5",
    "lr-3e-6": "train.lr = 3e-6",
    "heads-1e-3": "train.head_lr = 1e-3, train.router_lr = 1e-3",
    "one-expert": "train.experts = 1",
    "groups-alone": 'train.expert = "frozen"',
}


@dataclass(frozen=True)
class Size:
    """How much of the data is used, to see where more experts help: None takes all."""

    classes: int | None = None
    per_class: int | None = None

    @property
    def folder(self) -> str:
        """Name of the folder of studies of this size."""
        return f"{self.classes or 'all'}-classes-{self.per_class or 'all'}-images"


@dataclass(frozen=True)
class Asked:
    """What is compared: settings of variants as TOML, and scores."""

    variants: dict[str, str]
    scores: Sequence[str]
    size: Size


def shuffle_tiles(content: bytes, seed: int) -> bytes:
    """An image cut into tiles that are put together in another order, as PNG."""
    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert("RGB")
    width, height = image.width // TILES, image.height // TILES
    corners = [(x * width, y * height) for y in range(TILES) for x in range(TILES)]
    shuffled = Image.new("RGB", (width * TILES, height * TILES))
    for (left, top), place in zip(np.random.default_rng(seed).permutation(corners).tolist(), corners, strict=True):
        shuffled.paste(image.crop((left, top, left + width, top + height)), place)
    out = io.BytesIO()
    shuffled.save(out, "png")
    return out.getvalue()


def write_images(id_train: Path, fold: int, size: Size, folder: Path) -> None:
    """Unpack a benchmark's id-train images into the sets of one fold."""
    if (folder / "done").exists():
        return
    table = list_images(str(id_train))
    reader = table.reader()
    by_class: dict[str, list[bytes]] = defaultdict(list)
    for row, label in enumerate(table.labels):
        by_class[table.class_names[label]].append(reader.read(row))
    known = 0
    for place, name in enumerate(sorted(by_class, key=order_key)):
        left_out = place % PARTS == fold
        known += not left_out
        if not left_out and size.classes is not None and known > size.classes:
            continue
        trained = 0
        for number, content in enumerate(sorted(by_class[name], key=order_key)):
            if left_out:
                _write(folder / "left-out" / name / f"{number:03}.jpg", content)
            elif number % TEST_EVERY == 0:
                _write(folder / "test" / name / f"{number:03}.jpg", content)
                _write(folder / "tiles" / name / f"{number:03}.png", shuffle_tiles(content, number))
            elif size.per_class is None or trained < size.per_class:
                _write(folder / "train" / name / f"{number:03}.jpg", content)
                trained += 1
    (folder / "done").touch()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_experiment(study: Path, data: Path, work: Path, fold: int, asked: Asked) -> Path:
    """The experiment file of one fold, with its images."""
    configs = {path: load_config(path) for path in STUDIES}
    id_train = {
        path: image_source(data, config.sets_of("id-train")[0].images or "") for path, config in configs.items()
    }
    name, backbone = configs[study].name, configs[study].backbone
    assert backbone is not None
    folder = work / name / asked.size.folder / f"fold-{fold}"
    write_images(id_train[study], fold, asked.size, folder)
    other = next(source for path, source in id_train.items() if path != study)
    sets = [
        ("train", "id-train", folder / "train"),
        ("test", "id-test", folder / "test"),
        ("left-out", "near-ood", folder / "left-out"),
        ("other-benchmark", "far-ood", other),
        ("tiles", "far-ood", folder / "tiles"),
    ]
    lines = [
        f"name = {_toml(f'{name}-{fold}')}",
        f"work = {_toml(folder / 'work')}",
        "[backbone]",
        f"name = {_toml(backbone.name)}",
        f"weights = {_toml(backbone.weights)}",
        f"image_size = {backbone.image_size}",
        *(f"[[sets]]\nname = {_toml(name)}\nrole = {_toml(role)}\nimages = {_toml(at)}" for name, role, at in sets),
        *(f"[[variants]]\nname = {_toml(name)}\nset = {{ {given} }}" for name, given in asked.variants.items()),
        f"[score]\nscores = {json.dumps(asked.scores)}\nbootstrap = 100",
    ]
    path = folder / "study.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _toml(value: object) -> str:
    """A basic string; JSON escapes the same characters in the same way."""
    return json.dumps(str(value))


def run_fold(path: Path) -> Iterator[str]:
    """Run a fold as far as it is not fresh."""
    study = Study(load_config(path), RunOptions())
    try:
        for verb in ("extract", "train", "score"):
            yield from (line for line in study.do(verb) if isinstance(line, str))
    finally:
        study.progress.close()


Cells = dict[str, list[tuple[float, float]]]  # OOD set to (FPR95, AUROC) of each fold


def read_tables(paths: Sequence[Path]) -> dict[str, Cells]:
    """Rows of the folds' ``table.csv``: refitted heads, uncalibrated, routed by the router."""
    methods: dict[str, Cells] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                usable = row["routing"] in ("none", "predicted") and row["head"] in ("none", "probe", "refit")
                if usable and row["calibrated"] == "false":
                    name = f"{row['variant'] or 'frozen'}: {row['score']}"
                    methods[name][row["ood"]].append((float(row["fpr95"]), float(row["auroc"])))
    return methods


def show(title: str, paths: Sequence[Path]) -> Table:
    """Means over folds; the last column is the mean over all three OOD sets, which settings are compared by."""
    sets = ("left-out", "other-benchmark", "tiles")
    title = f"{title}, means over {len(paths)} folds, FPR95 / AUROC, per cent"
    table = Table("features: score", *sets, "mean", title=title)
    for name, cells in read_tables(paths).items():
        means = np.array([np.mean(cells[ood], axis=0) for ood in sets]) * 100
        table.add_row(name, *(f"{fpr95:.1f} / {auroc:.1f}" for fpr95, auroc in (*means, means.mean(axis=0))))
    return table


def main() -> None:
    """Run what is asked for; print a table a benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the benchmark's images")
    parser.add_argument("--work", type=Path, required=True, help="folder for the folds' images and studies")
    parser.add_argument("--benchmarks", nargs="*", default=SMALL, help="names of studies")
    parser.add_argument("--variants", type=json.loads, default=VARIANTS, help="JSON object of name and settings, TOML")
    parser.add_argument("--scores", nargs="*", default=SCORES, help="names of scores")
    parser.add_argument("--folds", type=int, nargs="*", choices=FOLDS, default=FOLDS, help="some of them")
    parser.add_argument("--classes", type=int, help="ID classes; all but the left-out ones by default")
    parser.add_argument("--per-class", type=int, help="training images a class; all by default")
    args = parser.parse_args()
    console = Console(width=140)
    asked = Asked(args.variants, args.scores, Size(args.classes, args.per_class))
    for study in (path for path in STUDIES if path.stem in args.benchmarks):
        paths = [write_experiment(study, args.data.resolve(), args.work.resolve(), fold, asked) for fold in args.folds]
        for path in paths:
            for line in run_fold(path):
                console.print(line)
        console.print(show(study.stem, [path.parent / "work" / "scores" / "table.csv" for path in paths]))


if __name__ == "__main__":
    main()
