"""A benchmark of a few digits and photographs: its tars, the list of their images, and what its studies have made."""

import csv
import gzip
import hashlib
import tarfile

from tests.test_pipeline.command import snapshot
from tests.test_pipeline.tiny import draw


def pack(home):
    """Write ``data/{train,test,threes,photos}.tar`` and ``listed.csv.gz``: three ID classes, one near, photographs."""
    draw(home / "train", "sklearn:digits[0-2]/train", 32)
    draw(home / "test", "sklearn:digits[0-2]/test", 8)
    draw(home / "threes", "sklearn:digits[3]/test", 16, nested=False)
    draw(home / "photos", "sklearn:photos", 8)
    (home / "data").mkdir()
    with gzip.open(home / "listed.csv.gz", "wt", newline="") as listed:
        writer = csv.writer(listed)
        writer.writerow(["set", "id", "sha256"])
        for name in ("train", "test", "threes", "photos"):
            with tarfile.open(home / "data" / f"{name}.tar", "w") as tar:
                tar.add(home / name, arcname=".")
            for path in sorted((home / name).rglob("*.png")):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                writer.writerow([name, path.relative_to(home / name), digest])


def in_tars(study):
    """The text of a study of `tests.test_pipeline.tiny` with the images of these tars."""
    study = study.replace("images/", "")
    for entry in ("train", "test", "threes"):
        study = study.replace(f'images = "{entry}"', f'images = "{entry}.tar"')
    return study


def made_by(*folders):
    """Every file of finished studies with its size and time; of the record, which every run writes, nothing."""
    return {path: state for path, state in snapshot(*folders).items() if not path.endswith("record.json")}
