"""Cells of the map: the same study with fewer ID classes and fewer training images of each.

Which they are follows from names and bytes alone: classes in the order of the SHA-256 of their names, a class's images
in that of their bytes. So a smaller cell is a part of every larger one. Near and far sets are the same for all.
"""

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import ConfigError, RunConfig
from stages.errors import InputError
from stages.files.documents import read_document, write_document, write_text
from stages.inputs.images import list_images

_LISTED = ("path", "label")  # columns of a list of images
_MARK = "images.json"  # stands in a folder of images that is whole


@dataclass(frozen=True)
class Cell:
    """A size of ID data.

    Attributes:
        classes: how many ID classes.
        images: how many training images a class, at most.
    """

    classes: int
    images: int

    @property
    def name(self) -> str:
        """Of its study, and of the folder that it works in."""
        return f"{self.classes}x{self.images}"


@dataclass(frozen=True)
class OrderedImages:
    """A set's images as files, in the order in which cells take them.

    Attributes:
        folder: that paths are relative to.
        paths: of each class, by its name; classes and images in their order.
    """

    folder: Path
    paths: dict[str, list[str]]

    @classmethod
    def unpack(cls, source: str, folder: Path, digest: str) -> "OrderedImages":
        """Write each image of a set as a file, unless a folder has them already.

        Args:
            source: as `stages.inputs.images.list_images` takes it.
            folder: where to.
            digest: of the images; what was unpacked of others is unpacked anew.

        Raises:
            InputError: the set cannot be listed, has images without a class, or an image cannot be read.
        """
        if (stored := read_document(folder / _MARK)) is not None and stored["images"] == digest:
            return cls(folder, stored["paths"])
        table = list_images(source)
        if not table.class_names or min(table.labels) < 0:
            raise InputError(f"{source}: has images without a class; a map of classes needs the class of each")
        reader = table.reader()
        digests = [order_key(reader.read(row)) for row in range(len(table))]
        paths: dict[str, list[str]] = {}
        for name in sorted(table.class_names, key=order_key):
            inside, paths[name] = f"{len(paths):04}", []
            (folder / inside).mkdir(parents=True, exist_ok=True)
            rows = np.flatnonzero(table.labels == table.class_names.index(name)).tolist()
            for place, row in enumerate(sorted(rows, key=digests.__getitem__)):
                paths[name].append(f"{inside}/{place:05}{Path(table.ids[row]).suffix}")
                (folder / paths[name][-1]).write_bytes(reader.read(row))
        write_document(folder / _MARK, {"images": digest, "paths": paths})
        return cls(folder, paths)

    def write_list(self, path: Path, classes: Sequence[str], images: int | None = None) -> None:
        """A list of the first images of some classes; all of them by default."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(_LISTED)
        for name in classes:
            writer.writerows([image, name] for image in self.paths.get(name, ())[:images])
        write_text(path, out.getvalue())


def order_key(content: bytes | str) -> str:
    """What images and classes are ordered by, so that neither names nor files decide."""
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()


def cells_of(classes: Sequence[int], images: Sequence[int], config: RunConfig, found: OrderedImages) -> list[Cell]:
    """Every cell, small ones first.

    Raises:
        ConfigError: a number of classes or images that the set does not have.
    """
    most = {"--classes": len(found.paths), "--images": max(map(len, found.paths.values()))}
    for option, given in (("--classes", classes), ("--images", images)):
        if not given or len(set(given)) < len(given) or min(given) < 1 or max(given) > most[option]:
            raise ConfigError(
                f"{option}: {','.join(map(str, given))} given, must be one or more different numbers from 1 to "
                f"{most[option]}, which is what {config.sets_of('id-train')[0].source} has"
            )
    return [Cell(of_classes, of_images) for of_classes in sorted(classes) for of_images in sorted(images)]


def check_experts(classes: Sequence[int], config: RunConfig) -> None:
    """Refuse what can be known without an image.

    Raises:
        ConfigError: fewer classes than experts, or a variant that leaves their number to be chosen.
    """
    experts = max(number_of_experts(config).values())
    if min(classes, default=experts) < experts:
        raise ConfigError(f"--classes: {min(classes)} given, fewer than the {experts} experts of a variant")


def number_of_experts(config: RunConfig) -> dict[str, int]:
    """By variant, in ascending order.

    Raises:
        ConfigError: a variant leaves it to be chosen.
    """
    found = {name: settings.experts for name, settings in config.variant_configs().items()}
    if chosen := [name for name, experts in found.items() if experts == "auto"]:
        raise ConfigError(f"{config.name}: a map needs train.experts as a number; variant {chosen[0]} has none")
    return dict(sorted(((name, int(experts)) for name, experts in found.items()), key=lambda pair: pair[1]))


def cell_study(config: RunConfig, cell: Cell, work: Path, train: OrderedImages, test: OrderedImages) -> RunConfig:
    """The study of a cell; its lists of images are written.

    Args:
        config: the study of all classes and images.
        cell: how many of them.
        work: folder of the map.
        train: images of id-train.
        test: of id-test, where the same classes are taken, with all images of each.
    """
    folder = work / "cells" / cell.name
    lists = {"id-train": folder / "train.csv", "id-test": folder / "test.csv"}
    classes = list(train.paths)[: cell.classes]
    train.write_list(lists["id-train"], classes, cell.images)
    test.write_list(lists["id-test"], classes)
    roots = {"id-train": train.folder, "id-test": test.folder}
    sets = tuple(
        entry.model_copy(update={"images": str(lists[entry.role]), "root": str(roots[entry.role])})
        if entry.role in lists
        else entry
        for entry in config.sets
    )
    cache = config.cache.model_copy(update={"root": work / "cache"})  # sets that cells share are extracted once
    return config.model_copy(update={"name": cell.name, "work": folder, "sets": sets, "cache": cache})
