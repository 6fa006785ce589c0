"""`predict`: what it needs, what it leaves on the disk, and that a block of images is like any other."""

import csv
import io
import json
import os
import signal
import tempfile

import pytest
import torch

from tests.test_pipeline.command import Running, done, pipeline, settings
from tests.test_pipeline.tiny import STUDY, draw
from tests.test_stages.drawn import as_dinov3s_files, create

DENSE = """
[[variants]]
name = "dense"
set = { "train.experts" = 1 }
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A study of adapters, which read no patches: extracted and its default variant trained, but nothing scored."""
    home = tmp_path_factory.mktemp("home")
    draw(home / "images" / "train", "sklearn:digits[0-2]/train", 24)
    draw(home / "images" / "test", "sklearn:digits[0-2]/test", 4)
    draw(home / "many", "sklearn:digits[0-5]/test", 50)
    draw(home / "images" / "threes", "sklearn:digits[3]/test", 4, nested=False)
    draw(home / "images" / "photos", "sklearn:photos", 4)
    study = STUDY.replace("photos.tar", "photos").replace("[train]\n", '[train]\nexpert = "adapter"\n')
    (home / "tiny.toml").write_text(study)
    (home / "two.toml").write_text(study + DENSE)
    done("extract", home / "tiny.toml")
    done("train", home / "tiny.toml")
    return home


def lines(answer):
    return list(csv.DictReader(io.StringIO(answer.out)))


def test_only_the_detector_that_decides_need_be_there(home):
    """Another variant is not trained, and a set to be scored is not there any more."""
    image = next((home / "images" / "test").rglob("*.png"))
    (alone,) = lines(done("predict", home / "tiny.toml", image))
    moved = settings(f"sets.photos.images={home / 'images' / 'threes'}")
    (among,) = lines(done("predict", home / "two.toml", image, *moved))
    assert among == alone
    assert pipeline("score", home / "two.toml").status == 2


def test_it_leaves_nothing_on_the_disk_killed_or_not(home, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    killed = Running("predict", home / "tiny.toml", home / "many")
    assert "predict" in killed.err.read(10)  # its progress
    killed.send(signal.SIGKILL)
    assert killed.finish().status == -signal.SIGKILL
    done("predict", home / "tiny.toml", next((home / "images" / "test").rglob("*.png")))
    assert os.listdir(tmp_path) == []
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


def test_many_images_go_by_blocks_and_are_scored_as_each_alone(home, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    answer = done("predict", home / "tiny.toml", home / "many")
    many = lines(answer)
    files = sorted((home / "many").rglob("*.png"))
    assert [line["path"] for line in many] == list(map(str, files))
    assert f"{len(many)}/{len(many)}" in answer.err  # progress, since it takes a while
    for index in (0, 255, 256, 299):
        (one,) = lines(done("predict", home / "tiny.toml", files[index]))
        assert float(one["score"]) == pytest.approx(float(many[index]["score"]), abs=1e-5)
        assert one["nearest_1"] == many[index]["nearest_1"]


def test_json_is_json_whatever_timm_prints(home, tmp_path):
    """Of DINOv3's own file it prints a line for each block."""
    torch.save(as_dinov3s_files(create("vit_small_patch16_dinov3_qkvb").state_dict(), 0.0), tmp_path / "dinov3.pth")
    network = ("name=vit_small_patch16_dinov3", f"weights={tmp_path / 'dinov3.pth'}")
    changed = settings(*(f"backbone.{each}" for each in network), f"work={tmp_path}", "cache.patches=none")
    image = next((home / "images" / "test").rglob("*.png"))
    for verb in ("extract", "train"):
        done(verb, home / "tiny.toml", *changed)
    answer = done("predict", home / "tiny.toml", image, "--format", "json", *changed)
    assert str(image) in json.dumps(json.loads(answer.out))
