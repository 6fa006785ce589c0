"""``plan`` as it is used: on a small study, before anything of it runs."""

import json
import signal
import tempfile

import pytest

from tests.test_pipeline.command import Running, pipeline, settings
from tests.test_pipeline.tiny import ADAPTERS, draw

N_IMAGES = {"train": 96, "test": 21, "threes": 12, "photos": 16}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    draw(folder / "images/train", "sklearn:digits[0-2]/train", 32)
    draw(folder / "images/test", "sklearn:digits[0-2]/test", 7)
    draw(folder / "images/threes", "sklearn:digits[3]", 12, nested=False)
    draw(folder / "images/photos", "sklearn:photos", 8, nested=False)
    (folder / "tiny.toml").write_text(ADAPTERS.replace("photos.tar", "photos").replace('"energy", "knn", ', ""))
    return folder / "tiny.toml"


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left(scratch):
    """What is left there, but for what torch compiles for the next time."""
    return [path.name for path in scratch.iterdir() if not path.name.startswith("torchinductor")]


def test_a_study_is_planned_and_nothing_is_left(study, scratch):
    done = pipeline("plan", study, *settings('score.scores=["auto", "knn"]'), "--workers", 3, "--seconds", 5, "--json")
    assert done.status == 0, done.err
    plan = json.loads(done.out)
    assert plan["images"] == N_IMAGES
    assert plan["pseudo_ood"] == 0  # of three classes none can be left out, and no image is made to play OOD
    assert plan["workers"] == [1, 2, 3]
    assert [stage["stage"] for stage in plan["stages"]] == ["extract pretrained", "train pretrained", "score", "report"]
    assert all(seconds > 0 for stage in plan["stages"] for seconds in stage["seconds"].values())
    assert plan["kept"][0]["patches"] == "full"
    assert plan["kept"][0]["bytes"] == plan["kept"][0]["row_bytes"] * sum(plan["images"].values())
    assert sorted(path.name for path in study.parent.iterdir()) == ["images", "tiny.toml"]
    assert left(scratch) == []


def test_an_interrupt_leaves_nothing(study, scratch):
    running = Running("plan", study)
    assert "calibrate" in running.err.readline()
    running.send(signal.SIGINT)
    assert running.finish().status == 130
    assert sorted(path.name for path in study.parent.iterdir()) == ["images", "tiny.toml"]
    assert left(scratch) == []


@pytest.mark.parametrize("changed", ["sets.train.images=nothing-here", "sets.train.images={empty}"])
def test_sets_that_are_not_there_are_one_line(study, scratch, changed):
    done = pipeline("plan", study, "--set", changed.format(empty=scratch))
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("stated", [["--classes", 3], ["--images", 100], ["--images", 3, "--classes", 2]])
def test_images_that_are_stated_in_part_are_refused(study, stated):
    done = pipeline("plan", study, *stated)
    assert done.status == 2
    assert done.err.startswith("error: --images") or "give --images as well" in done.err
    assert done.err.count("\n") == 1
