"""`predict`: what it needs, what it leaves on the disk, and that a block of images is like any other."""

import csv
import io
import json
import os
import shutil
import signal
import tempfile

import pytest
import torch

from tests.test_pipeline.command import Running, done, pipeline, refused, settings
from tests.test_pipeline.tiny import ADAPTERS, by_network, draw
from tests.test_stages.drawn import as_dinov3s_files, create

DENSE = """
[[variants]]
name = "dense"
set = { "train.experts" = 1 }
"""


@pytest.fixture(scope="module")
def home(vit, tmp_path_factory):
    """A study of adapters, which read no patches: extracted and its default variant trained, but nothing scored."""
    home = tmp_path_factory.mktemp("home")
    draw(home / "images" / "train", "sklearn:digits[0-2]/train", 24)
    draw(home / "images" / "test", "sklearn:digits[0-2]/test", 4)
    draw(home / "many", "sklearn:digits[0-5]/test", 50)
    draw(home / "images" / "threes", "sklearn:digits[3]/test", 4, nested=False)
    draw(home / "images" / "photos", "sklearn:photos", 4)
    study = by_network(vit, ADAPTERS.replace("photos.tar", "photos"))
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


@pytest.fixture(scope="module")
def sealed(home):
    """Its detector as one file."""
    done("export", home / "tiny.toml", "-o", home / "tiny.ood")
    return home / "tiny.ood"


def test_a_folder_is_watched_and_a_watch_goes_on_where_it_ended(home, sealed, tmp_path):
    """Images of before, one that cannot be used, and later ones: as all of them at once, and with predict's scores."""
    incoming, later, files = tmp_path / "incoming", tmp_path / "later", sorted((home / "many").rglob("*.png"))[:12]
    for folder in (incoming, later):
        folder.mkdir()
    for index, file in enumerate(files):
        shutil.copy(file, incoming / f"{index:02d}.png")
    (incoming / "05.png").write_bytes(files[5].read_bytes()[:90])
    whole = done("watch", sealed, incoming).out.splitlines()
    for image in sorted(incoming.iterdir())[7:]:
        image.rename(later / image.name)
    state = ("--state", tmp_path / "state.json")
    found = done("watch", sealed, incoming, *state).out.splitlines()
    for image in list(later.iterdir()):
        image.rename(incoming / image.name)
    found += done("watch", sealed, incoming, *state).out.splitlines()
    rows = [json.loads(line) for line in found]
    assert [row["id"] for row in rows] == [f"{index:02d}.png" for index in range(12)]
    assert "unusable" in rows[5]
    for row, expected in zip(rows, map(json.loads, whole), strict=True):
        assert row == pytest.approx(expected, abs=1e-5) if "score" in row else row == expected
    predicted = {line["path"]: line for line in lines(done("predict", home / "tiny.toml", incoming))}
    for row in rows:
        if "score" in row:
            assert row["score"] == pytest.approx(float(predicted[str(incoming / row["id"])]["score"]), abs=1e-5)
    assert done("watch", sealed, incoming, *state).out == ""


def test_images_none_of_which_can_be_used_are_each_listed(home, sealed, tmp_path):
    incoming, file = tmp_path / "incoming", next((home / "many").rglob("*.png"))
    incoming.mkdir()
    for name, data in (("a.png", b"no image"), ("b.png", file.read_bytes()[:90]), ("c.jpg", b"")):
        (incoming / name).write_bytes(data)
    asked = ("--state", tmp_path / "state.json", "--prometheus", tmp_path / "watch.prom")
    watched = done("watch", sealed, incoming, *asked)
    rows = [json.loads(line) for line in watched.out.splitlines()]
    assert [row["id"] for row in rows] == ["a.png", "b.png", "c.jpg"]
    assert all(row["unusable"] for row in rows)
    assert watched.err.endswith("\nwatch: 3 of 3 images cannot be used, and count for nothing\n")
    assert "\nood_watch_unusable_total 3\n" in (tmp_path / "watch.prom").read_text()
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["last"], state["unusable"], state["stream"]["steps"]) == ("c.jpg", 3, 0)
    shutil.copy(file, incoming / "d.png")
    (row,) = map(json.loads, done("watch", sealed, incoming, *asked).out.splitlines())
    assert (row["id"], row["step"]) == ("d.png", 1)
    (incoming / "d.png").unlink()
    predicted = pipeline("predict", sealed, incoming)
    assert (predicted.status, predicted.out) == (2, "")
    *listed, last = predicted.err.splitlines()
    assert [line.partition(": cannot be used: ")[0] for line in listed] == [str(incoming / row["id"]) for row in rows]
    assert last == "error: none of the given images can be used"


def test_scores_are_watched_from_standard_input(sealed, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('0.5\ncat\n{"id": "b", "score": 900}\n'))
    answer = done("watch", sealed, "-")
    first, second, third = map(json.loads, answer.out.splitlines())
    assert (first["score"], third["id"], third["step"]) == (0.5, "b", 2)
    assert second == {"id": "line 2", "unusable": "'cat' is no score"}
    assert third["decision"] == "OOD"
    assert ", nearly: " in answer.err  # three classes of few images: they are cross-fitted


def test_what_cannot_be_watched_is_refused(home, sealed):
    assert "tiny.toml" in refused("watch", home / "tiny.toml", "-")
    assert "no such file or folder" in refused("watch", sealed, home / "nowhere")
    assert "0<x<1" in refused("watch", sealed, "-", "--alpha", "2")
    for option in ("--state", "--prometheus"):
        assert "give a file in a folder that is there" in refused("watch", sealed, "-", option, home / "no" / "it")
