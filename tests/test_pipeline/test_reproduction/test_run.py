"""``make study`` on a tiny network and a few digits, with targets that it meets and targets that it does not."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from cache import FeatureCache
from pipeline.reproduction.leaderboard import LEADERBOARD_COLUMNS
from tests.test_pipeline.command import done, pipeline, refused
from tests.test_pipeline.tiny import ADAPTERS, draw

SHIFTED = """
[[sets]]
name = "more"
role = "cs-id"
images = "images/more"

[train]
"""
STUDY = """
name = "tiny study"
experiment = "tiny.toml"
set = { "score.scores" = ["energy", "knn"], "score.k" = 3 }

[[runs]]
name = "lite0"
training = "Noisy"
arch = "Lite0"

[[runs]]
name = "larger"
set = { "backbone.image_size" = 48, "sets.photos.images" = "images/more-photos.tar" }
"""
TARGET = """
[[targets]]
run = "{run}"
measure = "{measure}"
{more}
value = {value}
tolerance = 0.01
source = "a test"
"""


def target(measure, value, run="lite0", **more):
    return TARGET.format(
        run=run, measure=measure, value=value, more="\n".join(f"{key} = {json.dumps(own)}" for key, own in more.items())
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """DATA, an experiment file, and the run ``lite0`` finished, which has no targets yet."""
    home = tmp_path_factory.mktemp("home")
    draw(home / "images" / "train", "sklearn:digits[0-2]/train", 32)
    draw(home / "images" / "test", "sklearn:digits[0-2]/test", 8)
    draw(home / "images" / "more", "sklearn:digits[0-2]/train", 8, start=40)
    draw(home / "images" / "threes", "sklearn:digits[3]/test", 8, nested=False)
    draw(home / "images" / "photos", "sklearn:photos", 4)
    (home / "tiny.toml").write_text(ADAPTERS.replace("photos.tar", "photos").replace("[train]\n", SHIFTED))
    (home / "study.toml").write_text(STUDY)
    done("study", home / "study.toml", home, "--work", home / "work", "--only", "lite0")
    return home


def study(home, *targets, work=None):
    """Arguments that name the study with these targets."""
    path = home / "targets.toml"
    path.write_text(STUDY + "".join(targets))
    return ["study", path, home, "--work", work or home / "work", "--only", "lite0"]


@pytest.fixture(scope="module")
def published(home):
    """What the finished run has, found in other ways than the command's."""
    (train,) = (home / "work" / "cache").glob("train-*")
    (test,) = (home / "work" / "cache").glob("test-*")
    train, test = FeatureCache.open(train), FeatureCache.open(test)
    vote = KNeighborsClassifier(
        n_neighbors=20, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
    ).fit(train.read("cls").astype(np.float64), train.labels)
    with (home / "work" / "lite0" / "scores" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    near, far = (
        next(row for row in rows if (row["ood"], row["group"]) == ("average", group)) for group in ("near", "far")
    )
    return {
        "knn-accuracy": 100 * vote.score(test.read("cls").astype(np.float64), test.labels),
        "fpr95": 100 * float(near["fpr95"]),
        "fsood_auroc": 100 * float(far["fsood_auroc"]),
    }


def verdicts(work):
    with (work / "study.csv").open(newline="") as file:
        return [line["verdict"] for line in csv.DictReader(file)]


def test_numbers_that_are_reproduced_pass(home, published):
    said = done(
        *study(
            home,
            target("knn-accuracy", published["knn-accuracy"]),
            target("fpr95", published["fpr95"], score="knn", of="near"),
            target("fsood_auroc", published["fsood_auroc"], score="knn", of="far"),
        )
    ).out
    assert verdicts(home / "work") == ["pass"] * 3
    assert len(re.findall(r"^pass: lite0 ", said, re.MULTILINE)) == 3
    assert "tiny study: 3 pass, 0 fail, 0 not run: " in said
    page = (home / "work" / "study.md").read_text()
    assert f"{published['knn-accuracy']:.2f}" in page
    assert "a test" in page


def test_a_number_that_is_not_reproduced_fails_with_status_1(home, published):
    off = (published["fpr95"] + 50) % 100
    targets = [
        target("fpr95", off, score="knn", of="threes"),
        target("auroc", 100, score="energy", of="nowhere"),
        target("auroc", 100, score="gen", of="near"),
    ]
    answer = pipeline(*study(home, *targets))
    assert answer.status == 1
    assert re.fullmatch(
        r"error: 1 of 3 numbers were not reproduced, the first fail: lite0 knn threes fpr95: .*\n", answer.err
    )
    assert verdicts(home / "work") == [
        "fail",
        "not run: the table has no auroc of nowhere",
        "not run: gen was not scored",
    ]


def test_features_that_are_not_those_published_are_not_scored(home, published, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(home / "work" / "cache", work / "cache")
    wrong = [target("knn-accuracy", abs(published["knn-accuracy"] - 40)), target("auroc", 90, score="knn", of="near")]
    answer = pipeline(*study(home, *wrong, work=work))
    assert answer.status == 1
    assert "lite0: not trained and not scored: the features are not those that were published" in answer.out
    assert verdicts(work) == ["fail", "not run: the features are not those that were published"]
    assert not (work / "lite0" / "scores").exists()


def test_rows_are_those_of_openoods_leaderboard(home):
    for name, column in (("leaderboard", "auroc"), ("leaderboard-fsood", "fsood_auroc")):
        with (home / "work" / f"{name}.csv").open(newline="") as file:
            reader = csv.DictReader(file)
            lines = list(reader)
        assert tuple(reader.fieldnames) == LEADERBOARD_COLUMNS
        frozen = next(line for line in lines if line["Additional_Description"] == "lite0, frozen: knn")
        table = json.loads((home / "work" / "lite0" / "scores" / "table.json").read_text())
        near = next(row for row in table if (row["ood"], row["group"]) == ("average", "near"))
        assert (frozen["Training"], frozen["Postprocessor"], frozen["Arch"]) == ("Noisy", "kNN", "Lite0")
        assert frozen["Near-OOD_AUROC"] == f"{100 * near[column]:.2f}"
    found = json.loads((home / "work" / "lite0" / "scores" / "id.json").read_text())
    right = [entry for key in ("accuracy", "shifted_accuracy") for entry in found[key] if entry["head"] == "probe"]
    total = sum(entry["n"] for entry in right)
    assert frozen["ID_Accuracy"] == f"{100 * sum(entry['accuracy'] * entry['n'] for entry in right) / total:.2f}"


# ----------------------------------------------------------------------------------------------- what is not there


def test_what_is_missing_is_said_before_any_work_a_line_each(home, tmp_path):
    path = home / "missing.toml"
    more = '[[runs]]\nname = "other"\nset = { "backbone.weights" = "weights/none.pth", "cache.dtype" = "float32" }\n'
    path.write_text(STUDY + more)
    answer = pipeline("study", path, home, "--work", tmp_path / "work")
    assert answer.status == 2
    assert [line.split(": needed by")[0] for line in answer.out.splitlines()] == [
        f"missing: {home}/images/more-photos.tar",
        "missing: weights of tf_efficientnet_lite0: "
        f'backbone.weights: no file {home}/weights/none.pth: give "hub", "embedded" or a .safetensors or .pth file',
    ]
    assert "2 of the things that it needs are missing" in answer.err
    assert not (tmp_path / "work").exists()


def test_runs_that_have_everything_can_go_on_without_the_others(home):
    path = home / "some.toml"
    path.write_text(STUDY + target("knn-accuracy", 50, run="larger"))
    said = done("study", path, home, "--work", home / "work", "--available").out
    assert f"missing: {home}/images/more-photos.tar: needed by larger\n" in said
    assert verdicts(home / "work") == ["not run: images or weights are missing"]


def test_a_dry_run_says_what_would_run(home, tmp_path):
    said = done("study", home / "study.toml", home, "--work", tmp_path / "new", "--only", "lite0", "--dry-run").out
    assert re.search(r"^extract pretrained more: 24 images, would write ", said, re.MULTILINE)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("runs = []", "runs: missing; add one under [[runs]]"),
        ('[[runs]]\nname = "a"\nruns = 3', "runs.a.runs: unknown key"),
        ('[[runs]]\nname = "a"\n[[runs]]\nname = "a"', "runs.a: two runs have this name"),
        ('[[runs]]\nname = "a"' + target("auroc", 1, run="b", score="knn", of="near"), 'targets #1.run: "b" is no run'),
        ('[[runs]]\nname = "a"' + target("aurok", 1, run="a", score="knn", of="near"), "did you mean 'auroc'?"),
        ('[[runs]]\nname = "a"' + target("auroc", 1, run="a", score="nnk", of="near"), 'score: "nnk" is not a known'),
        ('[[runs]]\nname = "a"' + target("auroc", 1, run="a", score="knn"), "targets #1.of: missing"),
        ('[[runs]]\nname = "a"' + target("knn-accuracy", 101, run="a"), "value: 101 given, must be less than or equal"),
        ('[[runs]]\nname = "a"' + target("knn-accuracy", 10, run="a", of="far"), "targets #1.of: is for metrics"),
    ],
)
def test_a_study_file_that_cannot_be_used_is_refused_in_one_line(text, said, tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(f'name = "s"\nexperiment = "tiny.toml"\n{text}')
    assert said in refused("study", path, tmp_path)


def test_a_run_that_is_asked_for_must_be_one(home):
    assert "has no run 'lite'; did you mean 'lite0'?" in refused("study", home / "study.toml", home, "--only", "lite")
