"""The benchmark's images: where they are in a folder, and whether they are those of its list."""

import csv
import gzip
import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cache.fingerprint import fingerprint
from stages.errors import InputError
from stages.inputs.images import ImageError, list_images

LISTED = Path(__file__).parents[1] / "experiments" / "benchmark.csv.gz"

_Digests = dict[str, dict[str, str]]  # SHA-256 of each image, by set and id


@dataclass(frozen=True)
class BenchmarkImages:
    """Images of a folder beside those of the benchmark's list.

    Attributes:
        digest: of all sets, ids and bytes.
        difference: how they differ from the list, in one line; None where they do not.
    """

    digest: str
    difference: str | None


def image_source(data: Path, images: str) -> Path:
    """Where a set's images are in DATA: the file of the same name, or a folder of that name without ``.tar``."""
    name = Path(images).name
    folder = data / name.removesuffix(".tar")
    return folder if folder.is_dir() else data / name


def compare_images(data: Path, listed: Path, sets: Collection[str] | None = None) -> BenchmarkImages:
    """The images of DATA beside those of the benchmark's list, by the bytes of each.

    Args:
        data: folder of a tar or a folder per set.
        listed: gzipped CSV with columns ``set``, ``id`` and ``sha256``.
        sets: names of those that are looked at; by default all of the list.

    Raises:
        InputError: DATA is no folder, or a set of it cannot be listed.
    """
    if not data.is_dir():
        raise InputError(f"{data}: no such folder; give the one that holds the benchmark's images")
    expected = {name: own for name, own in listed_images(listed).items() if sets is None or name in sets}
    found: _Digests = {}
    for name in expected:
        source = image_source(data, f"{name}.tar")
        found[name] = _digests(source) if source.exists() else {}
    return BenchmarkImages(images_digest(found), _difference(expected, found))


def listed_images(listed: Path) -> _Digests:
    """SHA-256 of each image of the list, by set and id."""
    expected: _Digests = {}
    with gzip.open(listed, "rt", encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            expected.setdefault(line["set"], {})[line["id"]] = line["sha256"]
    return expected


def images_digest(images: _Digests) -> str:
    """Digest of all sets, ids and bytes, in whatever order they come."""
    return fingerprint(images)


def _difference(expected: _Digests, actual: _Digests) -> str | None:
    found: dict[str, list[str]] = {"missing": [], "with other bytes": [], "not in the list": []}
    for name, digests in expected.items():
        own = actual[name]
        found["missing"] += [f"{name}/{id_}" for id_ in digests if id_ not in own]
        found["with other bytes"] += [f"{name}/{id_}" for id_ in digests if id_ in own and own[id_] != digests[id_]]
        found["not in the list"] += [f"{name}/{id_}" for id_ in own if id_ not in digests]
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
