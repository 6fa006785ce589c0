"""Sets made to be awkward, extracted by the command: what a person counts by hand is counted everywhere.

A folder has all that a folder can have; what excludes it stands in other sets of the same study: WebDataset shards, a
tar of a tree with links and odd names, a list.
"""

import json
import tarfile
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from cache import FeatureCache
from tests.test_pipeline.command import done, refused, settings
from tests.test_pipeline.tiny import STUDY
from tests.test_stages.awkward import FAILURES, JPEG, LINKED_FAILURES, LINKED_ROWS, PNG, ROWS, make_folder, png_with
from tests.test_stages.tars import png, write_folder, write_tar

SETS = {"train": "images/train", "test": "test-{0000..0001}.tar", "threes": "tree.tar", "photos": "list.csv"}
DECOMPOSED, COMPOSED = (
    unicodedata.normalize(form, "caf\N{LATIN SMALL LETTER E WITH ACUTE}") for form in ("NFD", "NFC")
)
TRAIN = {  # beside what the awkward folder has
    f"{DECOMPOSED}/1.png": png(1),
    f"{COMPOSED}/2.png": png(2),
    "dog/same-bytes-as-cats.jpg": JPEG,
    "dog/1.png": png(3),
}
TRAIN_LEFT_OUT = {
    "cat/plain.cls": b"dog",
    "cat/plain.json": b"{}",
    "shards.TAR.GZ": b"\x1f\x8b",
    "old.tar": b"never read",
}
SHARD_0 = {
    "a/22.jpg": JPEG,
    "a/22.cls": b"cat",
    "a/22.05.jpg": JPEG,  # has its own class, not that of 22
    "a/22.05.cls": b" dog\n",
    "a/22.txt": b"a caption",
    "./b/7.left.png": png(7),  # takes the class of its key
    "./b/7.json": json.dumps({"label": COMPOSED}).encode(),
    "__MACOSX/b/._7.left.png": PNG,
    "README.md": b"",
}
SHARD_1 = {"0001.png": png(8), "0001.cls": b"cat", "0002.png": PNG[:40], "0002.cls": b"dog"}
JOINED = {"0003": png(9), "0003.cls": b"dog", "/0004.png": png_with(b"tEXt", b"a\0b"), "/0004.cls": b"cat"}
TREE = {"../1.png": png(1), "/etc/2.png": png(2), "a//3.png": png(3), "a/notes.txt": b"", "a/hard.png": "a//3.png"}
LINKS = {"a/soft.png": "3.png", "a/round": "..", "a/outside.png": "../../../etc/hostname", "a/gone": "nowhere"}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_folder(home / "images" / "train", home / "elsewhere")
    write_folder(home / "images" / "train", TRAIN | TRAIN_LEFT_OUT)
    write_tar(home / "test-0000.tar", SHARD_0)
    parts = [write_tar(home / name, files) for name, files in (("one", SHARD_1), ("two", JOINED))]
    (home / "test-0001.tar").write_bytes(b"".join(Path(part).read_bytes() for part in parts))
    write_tar(home / "tree.tar", TREE)
    with tarfile.open(home / "tree.tar", "a") as tar:
        for name, target in LINKS.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    write_folder(home, {"faces/1.png": png(4), "faces/2": JPEG, "faces/3.jpg": b"no image"})
    (home / "list.csv").write_text("\ufeffwidth; Image Path ;label\n4;faces/1.png;9\n4;faces/2;09\n4;faces/3.jpg;9.0\n")
    text = STUDY
    for name, images in SETS.items():
        old = "photos.tar" if name == "photos" else name
        text = text.replace(f'images = "images/{old}"', f'images = "{images}"')
    (home / "study.toml").write_text(text)
    return home


class Extracted(NamedTuple):
    """What the commands said before, while and after the sets were extracted, and the cache of each."""

    plan: str
    said: str
    info: str
    caches: dict[str, FeatureCache]


@pytest.fixture(scope="module")
def extracted(study):
    plan = done("extract", study / "study.toml", "--dry-run").out
    said = done("extract", study / "study.toml", "--max-failures", "1").out
    caches = {path.name.rpartition("-")[0]: FeatureCache.open(path) for path in (study / "caches").iterdir()}
    return Extracted(plan, said, done("info", study / "study.toml").out, caches)


# set: (rows, failures, what is left out)
EXPECTED = {
    "train": (
        len(ROWS) + len(LINKED_ROWS) + len(TRAIN),
        len(FAILURES) + len(LINKED_FAILURES),
        "left out: 16 files: 3 without extension, 2 .json, 2 .md, 2 .txt, 2 special file, "
        "1 .cls, 1 .db, 1 .gz, 2 of 2 other kinds",  # .mp4 and .tar: the most frequent are named
    ),
    "test": (6, 1, "left out: 2 files: 1 .md, 1 .txt"),
    "threes": (5, 2, "left out: 1 file: 1 .txt"),
    "photos": (2, 1, ""),
}


def test_the_counts_are_those_of_a_person_everywhere(extracted):
    plan, said, info, caches = extracted
    rows, failures, left_out = map(list, zip(*EXPECTED.values(), strict=True))
    assert f"extract pretrained: 4 of 4 sets extracted; {sum(rows)} rows + {sum(failures)} failures in" in said
    for name, (n_rows, n_failures, left) in EXPECTED.items():
        n_inputs = n_rows + n_failures
        assert f"extract pretrained {name}: {n_inputs} images, would write" in plan
        assert f"set        {name}: {n_rows} rows + {n_failures} failures = {n_inputs} inputs" in info
        counted = [line for line in plan.splitlines() if line.startswith(f"extract pretrained {name}:")]
        assert [line.partition("; ")[2] for line in counted] == [left]
        assert (f"{name}: {left}\n" in said) == bool(left)
        manifest = caches[name].manifest
        assert (manifest.n_rows, manifest.n_failures, manifest.n_inputs) == (n_rows, n_failures, n_inputs)
        assert len(caches[name].failures()) == n_failures
        assert left.startswith(f"left out: {sum(manifest.left_out.values())} file") or not left
    assert [line for line in info.splitlines() if line.startswith("left out")] == list(filter(None, left_out))


def test_classes_are_those_of_a_person(extracted):
    caches = extracted.caches
    found = {
        name: {str(i): cache.class_names[label] for i, label in zip(cache.ids, cache.labels, strict=True) if label >= 0}
        for name, cache in caches.items()
    }
    assert caches["train"].class_names == (COMPOSED, "cat", "dog", "linked")
    assert np.bincount(caches["train"].labels).tolist() == [2, len(ROWS), 2, len(LINKED_ROWS)]
    assert found["test"] == {
        "test-0000.tar/a/22.jpg": "cat",
        "test-0000.tar/a/22.05.jpg": "dog",
        "test-0000.tar/b/7.left.png": COMPOSED,
        "test-0001.tar/0001.png": "cat",
        "test-0001.tar/0003": "dog",
        "test-0001.tar/0004.png": "cat",
    }
    assert set(map(str, caches["threes"].ids)) == {"../1.png", "etc/2.png", "a/3.png", "a/hard.png", "a/soft.png"}
    assert found["photos"] == {"faces/1.png": "9", "faces/2": "9"}


def test_equal_bytes_with_two_labels_are_listed_with_both(study, extracted):
    listed = [json.loads(line) for line in (study / "work/extract/train-same-bytes.jsonl").read_text().splitlines()]
    conflicts = {
        (row["id"], row["label"], row["same_as"], row["same_as_label"])
        for row in listed
        if row["label"] != row["same_as_label"]
    }
    first = "cat/CAPITALS.JPEG"  # by name, of all that have these bytes
    assert conflicts == {
        ("dog/same-bytes-as-cats.jpg", "dog", first, "cat"),
        ("linked/photo", "linked", first, "cat"),
        ("linked/photo.jpg", "linked", first, "cat"),
        ("linked/more/1.png", "linked", "cat/backup.png~", "cat"),
    }


@pytest.mark.parametrize(
    ("name", "cut", "message"),
    [("cut.tar", 1200, "damaged: it ends within"), ("set.tar.gz", None, "unpacks it, give that")],
)
def test_what_cannot_be_read_whole_is_refused_and_says_how_to_go_on(study, name, cut, message):
    path = study / name
    if cut is None:
        write_tar(path, SHARD_1, "w:gz")
    else:
        path.write_bytes((study / "test-0001.tar").read_bytes()[:cut])
    for more in ([], ["--dry-run"]):
        assert message in refused("extract", study / "study.toml", *settings(f"sets.threes.images={path}"), *more)
