"""A study with taps: scores of several layers in its table, whichever layers are asked for, and in what it exports."""

import csv

import numpy as np
import pyarrow.parquet as pq
import pytest

from cache import FeatureCache
from pipeline.config import RunOptions, load_config
from pipeline.layers import check_layers
from pipeline.workspace import Workspace
from stages.detection import Detector
from stages.errors import InputError
from tests.test_pipeline.command import done, refused
from tests.test_pipeline.tiny import ADAPTERS, draw

SCORES = ["knn", "mm-pp", "knn-layers", "mm-pp+energy"]
STUDY = (
    ADAPTERS.replace("photos.tar", "photos")
    .replace('root = "caches"', 'root = "caches"\ntaps = [5, 6, 7]\npatches = "none"')
    .replace('scores = ["msp", "energy", "knn", "knn+energy"]', f"scores = {SCORES}".replace("'", '"'))
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("taps")
    draw(home / "images" / "train", "sklearn:digits[0-2]/train", 20)
    draw(home / "images" / "test", "sklearn:digits[0-2]/test", 5)
    draw(home / "images" / "threes", "sklearn:digits[3]/test", 4, nested=False)
    draw(home / "images" / "photos", "sklearn:photos", 2)
    (home / "tiny.toml").write_text(STUDY)
    for verb in ("extract", "train"):
        done(verb, home / "tiny.toml")
    (home / "said").write_text(done("score", home / "tiny.toml").out)
    return home


@pytest.fixture(scope="module")
def samples(home):
    (path,) = (home / "work" / "scores" / "samples").glob("pretrained-cls-probe-*.parquet")
    return pq.read_table(path).to_pandas().set_index(["set", "id"]).loc["test"]


def test_scores_of_several_layers_are_of_frozen_features_and_experts_leave_them_out(home, samples):
    with open(home / "work" / "scores" / "table.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if "mm-pp" in row["score"] or row["score"] == "knn-layers"]
    assert {(row["features"], row["score"]) for row in rows} == {("cls", score) for score in SCORES[1:]}
    assert '"layers_used"' in rows[0]["params"]
    assert np.isfinite(samples[SCORES]).all(axis=None)
    needs = "frozen features with tokens after several blocks: cache.taps names them"
    assert f"mm-pp: not of variant default: it needs {needs}" in (home / "said").read_text()


def test_another_choice_of_layers_extracts_and_trains_nothing(home):
    asked = ("--set", "score.params={ mm-pp = { layers = [5, 7] } }")
    said = done("run", home / "tiny.toml", "--dry-run", *asked).out
    lines = {line.partition(":")[0]: line for line in said.splitlines()}
    assert all("fresh" in line for stage, line in lines.items() if stage.startswith(("extract", "train")))
    assert "fresh" not in lines["score"]


def test_taps_that_are_not_cached_are_another_cache_and_layers_must_be_among_them(home):
    plan = done("run", home / "tiny.toml", "--dry-run", "--set", "cache.taps=[6,7]").out
    assert plan.count("would write") > 4  # another fingerprint: all is made anew
    asked = ("--set", "cache.taps=[6,7]", "--set", "score.params={ mm-pp = { layers = [5] } }")
    assert "score.params.mm-pp.layers: 5 given, must be some of cache.taps = [6, 7]" in refused(
        "score", home / "tiny.toml", *asked
    )


def test_layers_of_all_taps_are_refused_before_anything_is_scored(home):
    """Which there are is known of the features alone, where the file says "all"."""
    config = load_config(home / "tiny.toml")
    spec = Workspace(config, RunOptions()).pretrained.known_spec()
    params = {"mm-pp": {"layers": [5, 99]}}
    every = config.model_copy(update={"score": config.score.model_copy(update={"params": params})})
    with pytest.raises(InputError, match=r"^score.params.mm-pp.layers: 99 given, .* after 5, 6, 7: give"):
        check_layers(every, spec)
    check_layers(every, spec.without_taps())  # where none are, that is said otherwise


def test_an_exported_detector_reads_the_same_taps_by_torch_by_onnx_and_from_features(home, samples):
    pytest.importorskip("onnx", reason="needs the extra export")
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    path = home / "mm.ood"
    done("export", home / "tiny.toml", "-o", path, "--variant", "none", "--score", "mm-pp+energy", "--onnx")
    detector = Detector.load(path)
    images = sorted((home / "images" / "test").rglob("*.png"))
    own = samples.loc[[image.relative_to(home / "images" / "test").as_posix() for image in images]]["mm-pp+energy"]
    np.testing.assert_allclose(detector.score(images).score, own, atol=1e-4)
    by_onnx = Detector.load(path, runtime="onnx")
    np.testing.assert_allclose(by_onnx.score(images).score, own, atol=1e-2 * own.std())
    cache = FeatureCache.open(next((home / "caches").glob("test-*")))
    arrays = {name: cache.read(name) for name in ("cls", "taps")}
    np.testing.assert_allclose(detector.score_features(arrays).score, samples.loc[cache.ids]["mm-pp+energy"], atol=1e-4)
    with pytest.raises(Exception, match="taps is missing"):
        detector.score_features(arrays["cls"])


def test_what_needs_no_taps_is_exported_without_them(home):
    done("export", home / "tiny.toml", "-o", home / "knn.ood", "--variant", "none", "--score", "knn")
    assert Detector.load(home / "knn.ood").runtime.reads == {"cls"}
