"""A set of role ``cs-id``, other images of the ID classes, from the experiment file to the report: drawn features."""

import csv
import json

import numpy as np
import pytest

from tests.test_pipeline.command import done, refused, settings
from tests.test_pipeline.test_report import page_of

CLASSES = np.array(["cat", "dog", "owl"])
STUDY = """
name = "shifted"
work = "work"
train = { experts = 1, expert = "adapter", epochs = 1 }
score = { scores = ["msp", "knn", "knn+energy"], bootstrap = 100, k = 3 }
sets = [
  { name = "train", role = "id-train", features = "train.npz", origin = "drawn" },
  { name = "sketches", role = "cs-id", features = "sketches.npz", origin = "drawn" },
  { name = "test", role = "id-test", features = "test.npz", origin = "drawn" },
  { name = "cars", role = "near-ood", features = "cars.npz", origin = "drawn" },
]
"""


def write(path, shift, n, seed, labels=CLASSES):
    """Rows around one centre a class, all of them moved alike; as many of each of the classes, or of none."""
    rng = np.random.default_rng(seed)
    number = np.arange(n) % 3
    features = 3 * np.eye(8)[number] + shift * np.eye(8)[5] + rng.normal(size=(n, 8))
    given = {} if labels is None else {"label": labels[number]}
    np.savez(path, cls=features.astype(np.float32), **given)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("shifted")
    for seed, (name, shift, n) in enumerate([("train", 0, 90), ("test", 0, 60), ("sketches", 2, 60), ("cars", 5, 60)]):
        write(home / f"{name}.npz", shift, n, seed, labels=None if name == "cars" else CLASSES)
    (home / "shifted.toml").write_text(STUDY)
    done("run", home / "shifted.toml")
    return home


def test_it_has_rows_of_its_own_and_counts_as_id_in_the_full_spectrum(home):
    with (home / "work" / "scores" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["ood"], row["group"]) for row in rows} == {
        ("cars", "near"),
        ("sketches", "cs-id"),
        ("average", "near"),
        ("average", "all"),
    }
    average = next(row for row in rows if row["ood"] == "average")
    assert (average["n_id"], average["fsood_n_id"]) == ("60", "120")
    assert float(average["fsood_auroc"]) < float(average["auroc"])  # a shift looks like OOD
    energy = next(row for row in rows if row["score"] == "knn+energy")
    assert 0 <= float(energy["augrc"]) <= float(energy["aurc"])
    assert {row["aurc"] for row in rows if row["head"] == "none"} == {""}


def test_the_report_shows_it_apart(home):
    page = page_of(home / "work")
    entries = json.loads((home / "work" / "scores" / "id.json").read_text())["shifted_accuracy"]
    probe = next(entry for entry in entries if entry["head"] == "probe")
    assert (probe["set"], probe["n"]) == ("sketches", 60)
    told, spectrum = page.body("shifted")[:3], page.body("shifted")[3:]
    assert [row["name"] for row in told] == [row["name"] for row in spectrum]
    assert [row["cells"][2] for row in told][:2] == ["–", f"{100 * probe['accuracy']:.1f}"]  # kNN alone has no head
    assert "Selective classification" in page.text
    assert "sketches" not in "".join(row["name"] for row in page.body("sets"))


def test_labels_may_be_missing(home, tmp_path):
    write(tmp_path / "unlabelled.npz", 2, 60, 2, labels=None)
    work = tmp_path / "work"
    study = settings(f"work={work}", f"sets.sketches.features={tmp_path / 'unlabelled.npz'}")
    done("run", home / "shifted.toml", *study)
    assert json.loads((work / "scores" / "id.json").read_text())["shifted_accuracy"] == []
    rows = json.loads((work / "scores" / "table.json").read_text())
    average = next(row for row in rows if row["score"] == "knn+energy" and row["ood"] == "average")
    assert average["augrc"] is not None
    assert (average["fsood_n_id"], average["fsood_augrc"]) == (120, None)


def test_a_class_that_id_train_does_not_have_is_refused(home, tmp_path):
    write(tmp_path / "birds.npz", 2, 60, 2, labels=np.array(["cat", "dog", "owls"]))
    study = settings(f"work={tmp_path / 'new'}", f"sets.sketches.features={tmp_path / 'birds.npz'}")
    line = refused("run", home / "shifted.toml", *study)
    assert line.startswith("set 'sketches' has classes that id-train does not have: 'owls'")
    assert not (tmp_path / "new").exists()


def test_its_name_is_no_word_of_the_table(home):
    line = refused("run", home / "shifted.toml", *settings("sets.sketches.name=average"))
    assert "this name is a word of the table's own" in line
