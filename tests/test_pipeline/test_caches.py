"""A cache without a study: images in, a sealed cache out, found by studies that ask for the same features."""

import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache import FeatureCache
from stages.config import BackboneConfig
from stages.errors import InputError
from stages.extract import extract_features
from stages.inputs.images import list_images
from stages.networks.backbone import load_backbone
from tests.test_pipeline.command import done, pipeline, refused
from tests.test_pipeline.tiny import STUDY, draw

NETWORK = ("--backbone", "tf_efficientnet_lite0", "--weights", "embedded", "--size", 32)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    draw(home / "images" / "train", "sklearn:digits[0-2]/train", 12)
    draw(home / "images" / "test", "sklearn:digits[0-2]/test", 4)
    draw(home / "images" / "threes", "sklearn:digits[3]/test", 4, nested=False)
    draw(home / "images" / "photos", "sklearn:photos", 4)
    with tarfile.open(home / "images" / "photos.tar", "w") as tar:
        tar.add(home / "images" / "photos", arcname=".")
    (home / "tiny.toml").write_text(STUDY)
    return home


def test_a_study_finds_what_was_cached_without_it_whatever_the_set_is_called(home, tmp_path):
    shutil.copytree(home, tmp_path / "own")
    home, images = tmp_path / "own", tmp_path / "own" / "images"
    (images / "train" / "digit 0" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    sources = [images / "train", images / "threes", images / "photos.tar"]
    answer = done("cache", *sources, *NETWORK, "--out", tmp_path / "out", "--max-failures", 0.1)
    lines = dict(line.split(": ") for line in answer.out.splitlines())
    assert list(lines.values()) == [
        "36 rows + 1 failures = 37 inputs",
        "4 rows + 0 failures = 4 inputs",
        "8 rows + 0 failures = 8 inputs",
    ]
    assert [re.sub("-[0-9a-f]{8}$", "", Path(path).name) for path in lines] == ["train", "threes", "photos"]
    train = FeatureCache.open(next(iter(lines)))
    assert train.class_names == ("digit 0", "digit 1", "digit 2")
    assert [failure.id for failure in train.failures()] == ["digit 0/damaged.png"]
    again = done("cache", *sources, *NETWORK, "--out", tmp_path / "out")
    assert again.out == answer.out

    renamed = STUDY.replace('name = "train"', 'name = "mine"').replace('root = "caches"', f'root = "{tmp_path}/out"')
    (home / "renamed.toml").write_text(renamed)
    extracted = done("extract", home / "renamed.toml", "--max-failures", 0.1)
    assert "1 of 4 sets extracted; 60 rows + 1 failures" in extracted.out  # the test set alone
    assert len(list((tmp_path / "out").glob("*-????????"))) == 4


def test_image_files_given_by_themselves_are_one_set_and_a_name_may_be_given(home, tmp_path):
    files = sorted((home / "images" / "threes").iterdir())
    line = done("cache", *files, *NETWORK, "--patches", "none", "--out", tmp_path, "--name", "mine").out
    cache = FeatureCache.open(line.partition(":")[0])
    assert cache.manifest.dataset == "mine"
    assert cache.ids.tolist() == sorted(map(str, files))
    assert "patches" not in cache.spec.datasets()


def test_taps_are_kept_beside_all_else_and_a_study_that_asks_for_them_finds_the_cache(home, tmp_path):
    shutil.copytree(home, tmp_path / "own")
    home, asked = tmp_path / "own", ("--set", "cache.taps=[5,7]", "--set", f"cache.root={tmp_path / 'out'}")
    planned = done("extract", home / "tiny.toml", "--dry-run", *asked).out
    done("cache", home / "images" / "test", *NETWORK, "--taps", "7,5", "--out", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("test-????????")
    cache = FeatureCache.open(path)
    assert cache.read("taps").shape == (12, 2, 320)
    assert f"test: 12 images, would write {12 * cache.spec.row_bytes / 2**20:.1f} MiB" in planned
    said = done("info", path).out
    assert "taps [n, 2, 320]" in said
    assert "taps       after blocks or stages 5, 7: the mean" in said
    assert "3 of 4 sets extracted" in done("extract", home / "tiny.toml", *asked).out
    assert "extract pretrained: fresh; " in done("extract", home / "tiny.toml", *asked).out
    assert "would write" in done("extract", home / "tiny.toml", "--dry-run").out  # without taps it is another cache


def test_shards_are_one_set_and_what_is_said_of_them_is_said(home, tmp_path):
    for number in range(2):
        with tarfile.open(tmp_path / f"s-{number}.tar", "w") as tar:
            for _ in range(number + 1):  # the second has its files twice
                tar.add(home / "images" / "photos", arcname=".")
    (tmp_path / "s-1.json").write_text("{}")
    done_once = done("cache", f"{tmp_path}/s-*", *NETWORK, "--patches", "none", "--out", tmp_path / "out")
    assert done_once.out.endswith("16 rows + 0 failures = 16 inputs; left out: 1 file: 1 .json\n")
    assert "s-1.tar: members that stand there twice, the later counts: 8 (" in done_once.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["HOME/images/train"], "Missing option '--backbone'."),
        ([*NETWORK], "Missing argument 'IMAGES"),
        (["HOME/images/nothing", *NETWORK], "HOME/images/nothing': no such file or folder"),
        (["HOME/images/train", "HOME/images/photos/../train", *NETWORK], "all would be called 'train'"),
        (
            ["HOME/images/train", "HOME/images/test", *NETWORK, "--name", "mine"],
            "--name mine: is for one set, 2 are given",
        ),
        (["HOME/images/train", *NETWORK, "--name", "a/b"], "Invalid value for '--name'"),
        (["HOME/images/train", *NETWORK, "--patches", "all"], "cache.patches: \"all\" given, must be 'full', 'none'"),
        (
            ["HOME/images/train", *NETWORK, "--taps", "last"],
            "Invalid value for '--taps': 'last' given, must be numbers",
        ),
        (["HOME/images/train", *NETWORK, "--taps", "8"], "cache.taps: [8] given, tf_efficientnet_lite0 has 7 blocks"),
        (["HOME/images/train", "--backbone", "tf_efficientnet_lite0", "--size", 4], "backbone.image_size: 4 given"),
        (["HOME/images/train", *NETWORK, "--set", "backbone.presision=1"], "backbone.presision: unknown key"),
        (["HOME/images/train", *NETWORK, "--set", "train.epochs=1"], "train: unknown key"),
        (["HOME/images/train", "--backbone", "no_such_net"], "no_such_net"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(home, tmp_path, arguments, message):
    given = [str(argument).replace("HOME", str(home)) for argument in arguments]
    assert message.replace("HOME", str(home)) in refused("cache", *given, "--out", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_file_is_no_folder_for_caches(home, tmp_path):
    (tmp_path / "file").touch()
    line = refused("cache", home / "images" / "test", *NETWORK, "--out", tmp_path / "file")
    assert line == f"--out: {tmp_path / 'file'} is a file, a folder is needed"


def test_more_failures_than_allowed_end_with_one_line_and_keep_what_was_done(home, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"no image")
    answer = pipeline("cache", home / "images" / "test", tmp_path / "bad", *NETWORK, "--out", tmp_path / "cache")
    assert answer.status == 1
    assert "bad: 1 of 1 images cannot be used" in answer.err
    assert "12 rows + 0 failures" in answer.out  # the first set is sealed, and said


def test_from_python_any_images_and_any_way_to_name_the_network(home, tmp_path):
    folder = home / "images" / "test"
    files = sorted(folder.rglob("*.png"))
    options = {"patches": "none", "dtype": "float32", "out": tmp_path}
    network = BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=32)
    by_folder = extract_features(folder, network, **options)
    assert by_folder.path == tmp_path / f"test-{by_folder.fingerprint[:8]}"
    assert by_folder.read("cls").shape == (12, 1280)
    assert [by_folder.class_names[label] for label in by_folder.labels] == [path.parent.name for path in files]
    by_paths = extract_features(list(map(str, files)), load_backbone(network), **options)
    by_images = extract_features([Image.open(path) for path in files], network, **options, name="opened")
    by_table = extract_features(list_images(str(folder)), network, **options, name="listed")
    for other in (by_paths, by_images, by_table):
        np.testing.assert_array_equal(other.read("cls"), by_folder.read("cls"))
    assert by_table.path == by_folder.path  # found by what it is


def test_from_python_what_cannot_be_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"backbone\.name: .*'tf_efficientnet_lit'"):
        extract_features("sklearn:photos", "tf_efficientnet_lit", out=tmp_path)
    with pytest.raises(InputError, match=r"backbone\.weights: no file nowhere\.pth"):
        extract_features("sklearn:photos", BackboneConfig(weights="nowhere.pth"), out=tmp_path)
    with pytest.raises(InputError, match="no length"):
        extract_features(iter(()), BackboneConfig(weights="embedded"), out=tmp_path)
