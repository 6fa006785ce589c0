"""Studies whose ID images have no labels, or one class: clusters stand for classes, and every verb works."""

import csv
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from cache import FeatureCache
from stages.detection.detector import Detector
from tests.test_pipeline.command import done, refused, settings, snapshot
from tests.test_pipeline.tiny import ADAPTERS, draw

STUDY = """
name = "unlabelled"
work = "work"

[[sets]]
name = "train"
role = "id-train"
features = "train.npz"
origin = "drawn"

[[sets]]
name = "test"
role = "id-test"
features = "test.npz"
origin = "drawn"

[[sets]]
name = "near"
role = "near-ood"
features = "near.npz"
origin = "drawn"

[train]
epochs = 1

[score]
scores = ["knn", "ssd", "ncm", "energy", "knn+energy"]
k = 5
bootstrap = 100
"""
VAL = """
[[sets]]
name = "val"
role = "id-val"
features = "test.npz"
origin = "drawn"
"""
OF_NONE = {"knn", "ssd"}  # scores that ask for no class


def rows(n, classes, seed):
    """Features ``[n, 16]`` of rows around some of six directions, and whose they are."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(classes, n)
    return (np.eye(6, 16)[truth] + rng.normal(scale=0.15, size=(n, 16))).astype(np.float32), truth


def write(folder, labels=False, more="", classes=(0, 1, 2, 3)):
    """A study of features of some classes, with their labels or without."""
    folder.mkdir(parents=True)
    for seed, (name, n, own) in enumerate((("train", 240, classes), ("test", 80, classes), ("near", 60, (4, 5)))):
        cls, truth = rows(n, own, seed)
        np.savez(folder / f"{name}.npz", cls=cls, **({"label": truth} if labels else {}))
    (folder / "study.toml").write_text(STUDY + more)
    return folder / "study.toml"


def table(folder):
    with open(folder / "work" / "scores" / "table.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def metrics(lines, score):
    """What frozen features make of a score."""
    return [
        {name: line[name] for name in ("ood", "group", "n_id", "n_ood", "auroc", "fpr95", "auroc_lo", "fpr95_hi")}
        for line in lines
        if (line["features"], line["head"], line["score"]) == ("cls", "none", score)
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A study without a label, run once; everybody's: copy what you change."""
    study = write(tmp_path_factory.mktemp("unlabelled") / "plain")
    said = done("run", study)
    assert "4 clusters of cls stand for them" in said.out
    assert "id-train has no classes to tell apart: 4 clusters of its features stand for them" in said.out + said.err
    return study


@pytest.fixture
def copy(plain, tmp_path):
    return shutil.copytree(plain.parent, tmp_path / "copy", copy_function=shutil.copy2) / plain.name


def test_the_table_says_what_depends_on_clusters(plain):
    lines = table(plain.parent)
    assert (lines[0]["features"], lines[0]["head"], lines[0]["score"]) == ("cls", "none", "knn")
    for line in lines:
        asks_none = line["features"] == "cls" and line["score"] in OF_NONE
        assert line["labels"] == ("none" if asks_none else "clusters")
    assert {line["score"] for line in lines} == {"knn", "ssd", "ncm", "energy", "knn+energy"}
    assert {line["routing"] for line in lines} == {"none", "predicted"}  # nobody knows an image's true expert
    assert float(lines[0]["auroc"]) > 0.9
    header, _, first, *_ = (plain.parent / "work" / "scores" / "summary.md").read_text().splitlines()
    assert header.startswith("| backbone | features | head | variant | routing | labels | score | ")
    assert first.startswith("| pretrained | cls | none |  | none | none | knn | ")


def test_nobody_is_right_of_classes_that_nobody_knows(plain):
    record = json.loads((plain.parent / "work" / "scores" / "id.json").read_text())
    assert record["split"]["pretrained"] == (
        "held-out split: 0.2 of id-train by image hash, halved into select and calibrate; no classes to tell apart, "
        "4 clusters of cls stand for them"
    )
    assert record["accuracy"]
    assert {line["accuracy"] for line in record["accuracy"]} == {None}
    (router,) = record["router"]
    assert router["accuracy"] is None
    assert set(router["id_accuracy"]["predicted"].values()) == {None}
    assert sum(router["load"]["id"]) == 80
    samples = pq.read_table(
        plain.parent / "work" / "scores" / "samples" / "pretrained-cls-probe-none-none-none.parquet"
    )
    assert set(samples["label"].to_pylist()) == {""}
    predicted = np.array(samples["prediction"].to_pylist())[np.array(samples["set"].to_pylist()) == "test"]
    truth = rows(80, (0, 1, 2, 3), 1)[1]
    assert all(len(set(truth[predicted == name])) == 1 for name in np.unique(predicted))  # planted, and found
    page = (plain.parent / "work" / "report" / "index.html").read_text()
    assert "ID test rows have no labels that a head could be right of" in page


def test_knn_is_that_of_the_rows_that_train_whatever_their_labels(tmp_path):
    """All of id-train trains where there is an id-val set, with labels or without."""
    asked = settings('score.scores=["knn", "ssd", "knn-mean"]')
    found = []
    for labels in (True, False):
        study = write(tmp_path / str(labels), labels, VAL)
        done("extract", study), done("train", study), done("score", study, *asked)
        found.append(table(study.parent))
    for score in ("knn", "ssd", "knn-mean"):
        assert metrics(found[0], score) == metrics(found[1], score) != []
    assert {line["labels"] for line in found[0]} == {"given"}
    bank, test, near = (
        rows(*asked)[0].astype(float) for asked in ((240, (0, 1, 2, 3), 0), (80, (0, 1, 2, 3), 1), (60, (4, 5), 2))
    )
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (bank, test, near)]
    plain = [np.sort(np.sqrt(np.maximum(2 - 2 * each @ unit[0].T, 0)), axis=1)[:, 4] for each in unit[1:]]
    expected = roc_auc_score(np.repeat([0, 1], [80, 60]), np.concatenate(plain))
    assert float(metrics(found[1], "knn")[0]["auroc"]) == pytest.approx(expected, abs=1e-5)


def test_what_was_made_stays_fresh_and_other_rows_are_another_study(copy):
    before = snapshot(copy.parent / "work" / "scores")
    assert "train pretrained default seed 0: fresh" in done("run", copy).out
    assert snapshot(copy.parent / "work" / "scores") == before
    assert "would" not in done("run", copy, "--dry-run").out
    cls, truth = rows(240, (0, 1, 2, 3), 0)
    np.savez(copy.parent / "train.npz", cls=cls, label=truth)
    done("run", copy)
    assert {line["labels"] for line in table(copy.parent)} == {"given"}


def test_k_is_chosen_by_left_out_clusters(copy):
    done("score", copy, *settings("score.k=auto"))
    record = json.loads((copy.parent / "work" / "scores" / "id.json").read_text())
    assert record["k"][0]["classes"] == 4
    assert record["k"][0]["auroc"]


def test_what_asks_for_no_class_decides_unless_another_is_asked(copy, tmp_path):
    new = tmp_path / "new.npz"
    np.savez(new, cls=np.concatenate([rows(9, (0, 1, 2, 3), 7)[0], rows(9, (4, 5), 7)[0]]))
    found = json.loads(done("predict", copy, new, "--format", "json").out)
    assert [found["detector"][name] for name in ("features", "score")] == ["cls", "knn"]
    decisions = [image["decision"] for image in found["images"]]
    assert decisions.count("ID") == 9 - decisions[:9].count("OOD")
    assert {image["prediction"] for image in found["images"]} <= {f"cluster-{number}" for number in range(4)}
    other = json.loads(done("predict", copy, new, "--format", "json", "--score", "knn+energy").out)
    assert other["detector"]["score"] == "knn+energy"

    bundle = tmp_path / "detector.ood"
    done("export", copy, "-o", bundle)
    said = done("info", bundle).out
    assert "unlabelled: knn by head probe, pretrained, cls features" in said
    assert ", 4 clusters that stand for classes\n" in said
    scores = Detector.load(bundle).score_features(np.load(new)["cls"]).score
    np.testing.assert_allclose(scores, [image["score"] for image in found["images"]], rtol=1e-5)
    done("export", copy, "-o", bundle, "--variant", "default", "--score", "energy")
    assert "mofe features, default" in done("info", bundle).out
    done("info", copy), done("verify", copy), done("report", copy)


def test_one_class_is_the_same_case(tmp_path):
    """Industrial inspection: what is normal is all that there is, and has a name."""
    study = write(tmp_path / "one", labels=True, classes=(0,))
    done("run", study)
    lines = table(study.parent)
    assert {line["labels"] for line in lines} == {"none", "clusters"}
    assert float(metrics(lines, "knn")[0]["auroc"]) > 0.95
    record = json.loads((study.parent / "work" / "scores" / "id.json").read_text())
    assert {line["accuracy"] for line in record["accuracy"]} == {None}


def test_a_test_set_may_have_no_label_where_id_train_has(tmp_path):
    study = write(tmp_path / "some", labels=True)
    np.savez(study.parent / "test.npz", cls=rows(80, (0, 1, 2, 3), 1)[0])
    done("run", study)
    assert {line["labels"] for line in table(study.parent)} == {"given"}
    assert "oracle" not in {line["routing"] for line in table(study.parent)}
    record = json.loads((study.parent / "work" / "scores" / "id.json").read_text())
    assert {line["accuracy"] for line in record["accuracy"]} == {None}


def some_without(folder):
    cls, truth = rows(240, (0, 1, 2, 3), 0)
    np.savez(folder / "train.npz", cls=cls, label=np.where(np.arange(240) % 3, truth, -1))


def with_logits(folder):
    cls, _ = rows(240, (0, 1, 2, 3), 0)
    for name in ("train", "test", "near"):
        np.savez(folder / f"{name}.npz", cls=cls, logits=cls[:, :4])


def with_groups(folder):
    (folder / "groups.json").write_text('{"a": 0}')


def alike(folder):
    np.savez(folder / "train.npz", cls=np.ones((240, 16), np.float32) + np.arange(240)[:, None].astype(np.float32))


REFUSED = {
    "some rows without a label": (
        some_without,
        "extract",
        (),
        "set 'train': 80 of 240 rows (the first: '0') have no label: give label in the file",
    ),
    "logits of nobody knows which classes": (
        with_logits,
        "extract",
        (),
        "{folder}/train.npz: has logits, and no label that says which class a column is: give label, or save the file",
    ),
    "groups of classes that are not there": (
        with_groups,
        "extract",
        ("train.grouping={folder}/groups.json",),
        "train.grouping: {folder}/groups.json names the classes of each group, and id-train has none to tell apart",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_work(tmp_path, what):
    change, verb, asked, message = REFUSED[what]
    study = write(tmp_path / "refused")
    change(study.parent)
    said = refused(verb, study, *settings(*(each.format(folder=study.parent) for each in asked)))
    assert message.format(folder=study.parent) in said
    assert not (study.parent / "work").exists()


def test_rows_that_are_all_alike_make_no_clusters(tmp_path):
    study = write(tmp_path / "alike")
    alike(study.parent)
    done("extract", study)
    assert "its 240 rows have no classes to tell apart, and are too few or too much alike" in refused("train", study)


def test_images_in_one_flat_folder(tmp_path):
    """Real images: what a user has who never sorted them."""
    images = tmp_path / "images"
    draw(images / "train", "sklearn:digits[0-2]/train", 20, nested=False)
    draw(images / "test", "sklearn:digits[0-2]/test", 6, nested=False)
    draw(images / "threes", "sklearn:digits[3]/test", 6, nested=False)
    draw(images / "photos", "sklearn:photos", 2, nested=False)
    study = tmp_path / "study.toml"
    study.write_text(ADAPTERS.replace("photos.tar", "photos").replace("experts = 2\n", ""))
    done("run", study)
    with open(tmp_path / "work" / "scores" / "table.csv", encoding="utf-8") as file:
        assert {line["labels"] for line in csv.DictReader(file)} == {"none", "clusters"}
    (link,) = (tmp_path / "work" / "extract").glob("*.json")
    caches = {name: own["path"] for name, own in json.loads(link.read_text())["sets"].items()}
    assert set(FeatureCache.open(tmp_path / "work" / caches["train"]).labels.tolist()) == {-1}
    predicted = json.loads(done("predict", study, images / "threes", "--format", "json").out)
    assert len(predicted["images"]) == 6
