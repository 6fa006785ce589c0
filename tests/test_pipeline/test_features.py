"""Studies whose sets are files of features: everything that needs no image works, from the command line."""

import csv
import io
import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.stats import false_discovery_control

from cache import FeatureCache
from stages.scorers.logits.energy import energy_score
from tests.test_pipeline.command import done, pipeline, refused, settings, snapshot

STUDY = """
name = "given"
work = "work"

[[sets]]
name = "train"
role = "id-train"
features = "train.npz"
origin = "lite0@48"

[[sets]]
name = "test"
role = "id-test"
features = "test.npz"
origin = "lite0@48"

[[sets]]
name = "near"
role = "near-ood"
features = "near.npz"
origin = "lite0@48"

[train]
experts = 2
epochs = 1

[score]
scores = ["energy", "knn", "knn+energy"]
k = 5
bootstrap = 100
"""
NETWORK = """
[backbone]
name = "tf_efficientnet_lite0"
weights = "embedded"
image_size = 48
"""
ROWS = {"train": 40, "test": 12, "near": 12}  # of each class


def write(folder, caches, names, more="", logits=False):
    """A study of some rows of the caches, as somebody else might hand them over."""
    folder.mkdir()
    for name, per_class in ROWS.items():
        arrays = arrays_of(caches[name], per_class, names)
        if logits:
            arrays["logits"] = logits_of(arrays["cls"], caches["train"])
        np.savez(folder / f"{name}.npz", **arrays)
    (folder / "study.toml").write_text(STUDY + more)
    return folder


def arrays_of(cache, per_class, names):
    rows = np.concatenate([np.flatnonzero(cache.labels == label)[:per_class] for label in np.unique(cache.labels)])
    labels = np.array(cache.class_names)[cache.labels[rows]].astype(int)
    return {name: cache.read(name, rows) for name in names} | {"label": labels, "id": cache.ids[rows]}


def logits_of(cls, train):
    """A head of one's own: the closer to a class mean, the higher."""
    means = np.stack([train.read("cls", train.labels == label).mean(0, dtype=np.float32) for label in range(4)])
    return -np.linalg.norm(cls.astype(np.float32)[:, None] - means, axis=2)


def replaced(folder, name, **arrays):
    """The same file with other arrays; None takes one away."""
    with np.load(folder / f"{name}.npz") as stored:
        kept = dict(stored) | arrays
    np.savez(folder / f"{name}.npz", **{key: array for key, array in kept.items() if array is not None})


def table(folder):
    with open(folder / "work" / "scores" / "table.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def plain(caches, tmp_path_factory):
    """``cls``, labels, ids and logits; run once. Everybody's: copy what you change."""
    folder = write(tmp_path_factory.mktemp("given") / "plain", caches, ("cls",), logits=True)
    done("run", folder / "study.toml")
    return folder


@pytest.fixture
def study(plain, tmp_path):
    """Arguments that name a copy of the finished study: its work folder may be changed, its files are shared."""
    shutil.copytree(plain / "work", tmp_path / "work")
    return [plain / "study.toml", *settings(f"work={tmp_path / 'work'}")]


@pytest.fixture
def copy(plain, tmp_path):
    """A copy of the files and of what was made of them, which may be changed."""
    return shutil.copytree(plain, tmp_path / "copy", copy_function=shutil.copy2)


def test_a_study_of_features_runs_to_its_report(plain):
    rows = table(plain)
    assert (rows[0]["features"], rows[0]["head"], rows[0]["score"]) == ("cls", "none", "knn")
    assert {(row["features"], row["head"]) for row in rows} == {
        ("cls", "none"), ("cls", "probe"), ("cls", "given"),
        ("mofe", "none"), ("mofe", "trained"), ("mofe", "refit"), ("mofe", "refit-group"),
    }  # fmt: skip
    assert float(rows[0]["auroc"]) > 0.8
    assert "Features of <strong>lite0@48</strong>" in (plain / "work" / "report" / "index.html").read_text()
    about = json.loads((plain / "work" / "model" / "pretrained" / "default" / "seed-0" / "mofe.json").read_text())
    assert (about["settings"]["expert"], about["settings"]["router_input"]) == ("adapter", "cls")


def test_given_logits_are_a_head(plain):
    samples = pq.read_table(plain / "work" / "scores" / "samples" / "pretrained-cls-given-none-none-none.parquet")
    with np.load(plain / "test.npz") as test, np.load(plain / "near.npz") as near:
        logits = np.concatenate([test["logits"], near["logits"]])
        labels = np.concatenate([test["label"], near["label"]])
    np.testing.assert_array_equal(samples["energy"].to_numpy(), energy_score(logits))
    assert samples["prediction"].to_pylist() == logits.argmax(1).astype(str).tolist()
    accuracy = json.loads((plain / "work" / "scores" / "id.json").read_text())["accuracy"]
    (own,) = [entry["accuracy"] for entry in accuracy if entry["head"] == "given"]
    assert own == np.mean(logits[:48].argmax(1) == labels[:48])


def test_scores_that_need_what_was_not_given_are_said(study, tmp_path):
    answer = " ".join(done("score", *study, *settings('score.scores=["knn", "patch-knn", "vim"]')).out.split())
    assert "patch-knn: not of the backbone's own features: it needs patch tokens" in answer
    assert "patch-knn: not of variant default: it needs frozen features, for no patches are kept" in answer
    assert "vim: not of head given of the b" in answer
    heads = {row["head"] for row in table(tmp_path) if row["score"] == "vim"}
    assert "probe" in heads
    assert "given" not in heads  # it reads the weights that make the logits, and these came without


def test_a_second_run_does_nothing(study, tmp_path):
    folders = [tmp_path / "work" / name for name in ("cache", "model", "scores", "report")]
    done("run", *study)  # what was copied is compared with its digests, once
    before = snapshot(*folders)
    assert "extract pretrained: fresh; 232 rows + 0 failures" in " ".join(done("run", *study).out.split())
    assert snapshot(*folders) == before


def test_scoring_opens_no_file_of_features(study, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.sets.list_arrays", lambda path, *_: pytest.fail(f"{path} was opened"))
    done("score", *study, *settings("score.k=3"))
    assert json.loads(table(tmp_path)[0]["params"])["k"] == 3


def test_plan_and_info(study, copy):
    plan = " ".join(done("run", *study, "--dry-run").out.split())
    assert plan.count("fresh, ") == 5
    assert "extract pretrained near: 24 rows, fresh, " in plan
    info = " ".join(done("info", *study).out.split())
    assert "features given, lite0@48" in info
    assert "logits [n, 4]" in info
    replaced(copy, "near", cls=np.ones((24, 1280), np.float16))
    assert "24 rows, 24 changed since" in " ".join(done("extract", copy / "study.toml", "--dry-run").out.split())


def test_new_rows_are_scored_from_a_file(study, plain):
    answer = done("predict", *study, plain / "test.npz")
    rows = list(csv.DictReader(io.StringIO(answer.out)))
    assert len(rows) == 48
    # Eight rows of a class are held out, half of them to calibrate: too few to decide by, and it says so.
    assert {row["decision"] for row in rows} == {"unknown"}
    assert "no threshold, so no decision: 95% of ID needs 19 calibration rows, there are 16" in answer.err
    near = csv.DictReader(io.StringIO(done("predict", *study, plain / "near.npz").out))
    assert np.median([float(row["score"]) for row in rows]) < np.median([float(row["score"]) for row in near])
    assert rows[0]["path"].startswith(str(plain / "test.npz"))


def test_an_exported_detector_says_the_same_of_a_file(study, plain, tmp_path):
    done("export", *study, "-o", tmp_path / "it.ood")
    found, expected = (done("predict", *own, plain / "test.npz").out for own in ((tmp_path / "it.ood",), study))
    assert found == expected
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert "a.png" in refused("predict", tmp_path / "it.ood", tmp_path / "a.png")


def test_new_rows_are_judged_together_at_a_false_discovery_rate(study, plain):
    given = (plain / "near.npz", "--score", "knn", "--fdr", "0.5")
    answer = done("predict", *study, *given, "--format", "json")
    document = json.loads(answer.out)
    assert document["batch"] == {"fdr": 0.5, "images": 24, "n": 16, "fewest": 3, "n_needed": 47}
    assert document["promise"] == {"per": "all", "exact": True}
    images = document["images"]
    adjusted = false_discovery_control([image["p_value"] for image in images])
    assert [image["flagged"] for image in images] == (adjusted <= 0.5).tolist()
    assert any(image["flagged"] for image in images)
    n = sum(image["flagged"] for image in images)
    assert f"{n} of 24 images flagged: of such at most 50% are ID, on average" in answer.err
    assert "needs 47 calibration rows to flag 1 of 24 images, with 16 it flags 3 or more or none" in answer.err
    rows = list(csv.DictReader(io.StringIO(done("predict", *study, *given).out)))
    assert [row["flagged"] == "true" for row in rows] == [image["flagged"] for image in images]
    assert [float(row["p_value"]) for row in rows] == [image["p_value"] for image in images]


def test_what_cannot_be_promised_is_refused(study, plain):
    near = plain / "near.npz"
    assert refused("predict", *study, near, "--fdr", "0.1", "--per", "class").endswith("per class: give one")
    assert "0<x<1" in refused("predict", *study, near, "--fdr", "5")


def test_images_cannot_be_scored(study, tmp_path):
    (tmp_path / "a.jpg").touch()
    assert refused("predict", *study, tmp_path / "a.jpg").endswith(
        "a.jpg: this study's sets have features, and nothing here makes such features of an image: give a file of them "
        "(.npz, .npy, .parquet, .h5, .hdf5, .pt, .pth, .safetensors)"
    )


def test_a_damaged_shard_is_copied_again(study, tmp_path):
    (shard,) = (tmp_path / "work" / "cache").glob("test-*/shard-00000.h5")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    assert pipeline("verify", *study).status == 1
    done("verify", *study, "--repair")
    assert shard.read_bytes() == whole


def test_experts_are_copies_of_the_end_where_tokens_are_given(caches, tmp_path):
    names = ("cls", "tap_cls", "patches")
    folder = write(tmp_path / "tokens", caches, names, NETWORK)
    for verb in ("extract", "train", "score"):
        done(verb, folder / "study.toml", *settings('score.scores=["knn", "patch-knn"]'))
    about = json.loads((folder / "work" / "model" / "pretrained" / "default" / "seed-0" / "mofe.json").read_text())
    assert (about["settings"]["expert"], about["settings"]["router_input"]) == ("end", "cls")
    assert {(row["features"], row["score"]) for row in table(folder)} == {
        ("cls", "knn"), ("cls", "patch-knn"), ("mofe", "knn"),
    }  # fmt: skip
    replaced(folder, "near", patches=np.zeros((24, 4, 192), np.float16))
    answer = pipeline("extract", folder / "study.toml")
    assert answer.status == 2
    assert f"error: sets.near.features: {folder / 'near.npz'}: its tokens do not lead to its cls" in answer.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"near": {"label": None, "cls": np.ones((24, 7), np.float16)}},
            "sets.near.features: {near} has cls [7], logits",
        ),
        (
            {"near": {"logits": None}},
            "sets.near.features: {near} has cls [1280], set train has cls [1280], logits [4]: ",
        ),
        (
            {"test": {"label": np.arange(48) % 5 - 1}},
            "set 'test': 10 of 48 rows (the first: '0/0030.pgm') have no label: give label in the file",
        ),
        (
            {"test": {"label": np.arange(48)}},
            "set 'test' has classes that id-train does not have: '4', '5', '6', …; the first of 44 such rows: '0",
        ),
        (
            {"train": {"label": np.arange(160) % 3}, "test": {"label": np.arange(48) % 3}},
            "sets.train.features: {train}: logits have 4 columns, label names 3 classes: ",
        ),
        ({"near": {"cls": None}}, "sets.near.features: {near}: 'cls' is missing"),
    ],
)
def test_files_refused(copy, change, message):
    for name, arrays in change.items():
        replaced(copy, name, **arrays)
    message = message.format(near=copy / "near.npz", train=copy / "train.npz")
    assert refused("extract", copy / "study.toml").startswith(message)


def test_a_feature_that_is_no_number(copy):
    replaced(copy, "near", cls=np.full((24, 1280), np.nan))
    answer = pipeline("extract", copy / "study.toml")
    assert answer.status == 2
    assert f"error: sets.near.features: {copy / 'near.npz'}: cls of row 0 ('7/" in answer.err


def test_settings_refused(study, copy):
    message = refused("train", *study, *settings("train.expert=end"))
    assert message.startswith('train.expert: "end" is made of copies of a backbone')
    assert refused("train", *study, *settings("train.router_input=tap_cls")).startswith("train.router_input: the ")
    with open(copy / "study.toml", "a", encoding="utf-8") as file:
        file.write(NETWORK)
    message = refused("extract", copy / "study.toml")
    assert message.startswith("backbone: sets.train.features has no patches, so nothing reads it: ")


# ------------------------------------------------------------------------------------------- beside sets with images

MIXED = """
name = "mixed"
work = "work"

[cache]
root = "{root}"

[[sets]]
name = "train"
role = "id-train"
images = "sklearn:digits[0-3]/train"

[[sets]]
name = "test"
role = "id-test"
images = "sklearn:digits[0-3]/test"

[[sets]]
name = "near"
role = "near-ood"
images = "sklearn:digits[7-8]/test"

[[sets]]
name = "mine"
role = "far-ood"
features = "mine.npz"
origin = "{origin}"

[train]
experts = 2
epochs = 1

[score]
scores = ["energy", "knn"]
k = 5
bootstrap = 100
"""


@pytest.fixture(scope="module")
def mixed(caches, tmp_path_factory):
    """Images, and one set of features as a cache of the study's own network has them."""
    folder, near = tmp_path_factory.mktemp("mixed"), caches["near"]
    (origin,) = (line.split()[1] for line in done("info", near.path).out.splitlines() if line.startswith("origin"))
    arrays = {name: near.read(name) for name in near.spec.datasets()}
    np.savez(folder / "mine.npz", **arrays, id=near.ids)
    (folder / "study.toml").write_text(MIXED.format(root=near.path.parent, origin=origin) + NETWORK)
    return folder


def test_features_beside_images_are_scored_as_the_images_that_they_are_of(mixed):
    """The same digits once as images and once as what the study's own network made of them."""
    done("extract", mixed / "study.toml")
    done("train", mixed / "study.toml")
    done("score", mixed / "study.toml")
    rows = list(csv.DictReader(io.StringIO((mixed / "work" / "scores" / "table.csv").read_text())))
    naming = ("features", "head", "variant", "routing", "score", "calibrated", "auroc", "fpr95")
    near, mine = (
        {tuple(row[name] for name in naming) for row in rows if row["ood"] == ood} for ood in ("near", "mine")
    )
    assert {row[0] for row in mine} == {"cls", "mofe"}
    assert near == mine
    assert "extract pretrained: fresh" in done("extract", mixed / "study.toml").out
    other = settings(f"sets.mine.origin={'a' * 64}")
    assert "but the features of this study's images have" in refused("run", mixed / "study.toml", *other, "--dry-run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"origin": "my network"}, 'sets.mine.origin: "my network" given, but set train has images: to show that both'),
        ({"origin": "a" * 64}, f"sets.mine.origin: {'a' * 64} given, but the features of this study's images have "),
        ({"drop": "patches"}, "has patches missing, the features of this study's images [4, 192]: give the arrays"),
    ],
)
def test_features_beside_images_of_another_network_are_refused(mixed, tmp_path, change, message):
    shutil.copy(mixed / "mine.npz", tmp_path)
    replaced(tmp_path, "mine", **{name: None for name in change.values() if name == "patches"})
    text = (mixed / "study.toml").read_text()
    if "origin" in change:
        text = re.sub('origin = ".*"', f'origin = "{change["origin"]}"', text)
    (tmp_path / "study.toml").write_text(text)
    assert message in refused("extract", tmp_path / "study.toml")


# ------------------------------------------------------------------------------------------ as people have them


HEAD = [f"other {i}" for i in range(3)] + ["three", "one", "two", "zero"]


@pytest.fixture
def elsewhere(plain, tmp_path):
    """The same features in parts, under other names, with logits of a larger head and its numbers as labels."""
    for name in ROWS:
        with np.load(plain / f"{name}.npz") as stored:
            logits = np.concatenate(
                [np.full((len(stored["cls"]), 3), 99, np.float32), stored["logits"][:, [3, 1, 2, 0]]], 1
            )
            (tmp_path / name).mkdir()
            for part, rows in enumerate(np.array_split(np.arange(len(logits)), 3)):
                arrays = {"emb": stored["cls"][rows], "logits": logits[rows], "url": stored["id"][rows]}
                numbers = {0: 6, 1: 4, 2: 5, 3: 3}
                labels = np.array([numbers.get(label, 0) for label in stored["label"][rows].tolist()], np.uint8)
                np.savez(tmp_path / name / f"part-{part}.npz", **arrays, y=labels)
    text = re.sub(r'features = "(.*)\.npz"', r'features = "\1"\ncolumns = { cls = "emb", label = "y" }', STUDY)
    (tmp_path / "study.toml").write_text(
        text.replace('label = "y" }', f'label = "y" }}\nclasses = {json.dumps(HEAD)}', 1)
    )
    return tmp_path


def test_parts_names_and_a_larger_head(elsewhere, plain):
    said = done("extract", elsewhere / "study.toml").err
    assert "left out: 'url': columns that no key names" in said
    assert "3 of 7 columns of logits are of no ID class and left out" in said
    (path,) = (elsewhere / "work" / "cache").glob("test-*")
    cache = FeatureCache.open(path)
    with np.load(plain / "test.npz") as stored:
        assert cache.class_names == ("one", "three", "two", "zero")
        assert [cache.class_names[label] for label in cache.labels] == [
            ("zero", "one", "two", "three")[label] for label in stored["label"]
        ]
        np.testing.assert_array_equal(cache.read("logits"), stored["logits"][:, [1, 3, 2, 0]])
        np.testing.assert_array_equal(cache.read("cls"), stored["cls"])
    assert "fresh" in done("extract", elsewhere / "study.toml").out


def test_predict_takes_every_kind_of_file(study, plain, tmp_path):
    with np.load(plain / "test.npz") as stored:
        rows = {name: torch.from_numpy(stored[name][:3]) for name in ("cls", "logits")}
    torch.save(rows, tmp_path / "new.pt")
    (tmp_path / "parts").mkdir()
    for row in range(3):
        np.savez(tmp_path / "parts" / f"{row}.npz", **{name: array[row : row + 1] for name, array in rows.items()})
    one, many = (done("predict", *study, tmp_path / name).out for name in ("new.pt", "parts"))
    assert one.replace("new.pt", "parts") == many
    assert len(one.splitlines()) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('columns = { cls = "emb", lable = "y" }', "sets.train.columns.lable: unknown key; did you mean 'label'?"),
        ("classes = []", "sets.train.classes: [] given, must be names or the path of a file"),
        ('columns = { cls = "emd" }', "columns.cls: 'emd' is not there"),
        ('classes = ["a", "b"]', "logits have 4 columns, classes names 2"),
        ('classes = "no.txt"', "no.txt: cannot be read"),
    ],
)
def test_names_that_do_not_fit_are_refused(copy, text, said):
    (copy / "study.toml").write_text(STUDY.replace('features = "train.npz"', f'features = "train.npz"\n{text}'))
    assert said in refused("extract", copy / "study.toml")


def test_columns_are_for_features(copy):
    text = STUDY.replace(
        'features = "near.npz"\norigin = "lite0@48"', 'images = "sklearn:photos"\ncolumns = { cls = "x" }'
    )
    (copy / "study.toml").write_text(text)
    assert "sets.near.columns: is for features; of images it is path_column and label_column" in refused(
        "extract", copy / "study.toml"
    )
