"""`export --onnx`: the same file says the same of an image where there is no torch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stages.detection import Detector
from stages.detection.bundle import read_bundle, write_bundle
from stages.errors import InputError
from tests.test_pipeline.command import done, refused
from tests.test_pipeline.tiny import STUDY, draw

pytest.importorskip("onnx", reason="needs the extra export")
pytest.importorskip("onnxruntime", reason="needs the extra export")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A study of two experts that are copies of the network's end; and its detector."""
    home = tmp_path_factory.mktemp("onnx")
    draw(home / "images" / "train", "sklearn:digits[0-2]/train", 24)
    draw(home / "images" / "test", "sklearn:digits[0-2]/test", 8)
    draw(home / "images" / "threes", "sklearn:digits[3]/test", 6, nested=False)
    draw(home / "images" / "photos", "sklearn:photos", 4)
    (home / "tiny.toml").write_text(STUDY.replace("photos.tar", "photos"))
    for verb in ("extract", "train"):
        done(verb, home / "tiny.toml")
    done("export", home / "tiny.toml", "-o", home / "tiny.ood", "--onnx")
    return home


@pytest.fixture(scope="module")
def images(home):
    return sorted((home / "images" / "test").rglob("*.png")) + sorted((home / "images" / "photos").rglob("*.png"))


@pytest.fixture(scope="module")
def by_torch(home):
    return Detector.load(home / "tiny.ood")


WITHOUT_TORCH = """
import sys
from stages.detection import Detector
found = Detector.load(sys.argv[1], runtime="onnx").score(sys.argv[2:], nearest=1)
assert not {"torch", "torchvision", "timm", "onnx"} & sys.modules.keys()
for row in zip(found.score, found.decision, found.prediction, found.expert, found.nearest.ids[:, 0]):
    print(*row, sep="|")
"""


def test_it_scores_without_torch(home, images, by_torch):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", WITHOUT_TORCH, home / "tiny.ood", *images]
    run = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    score, decision, prediction, expert, nearest = zip(
        *(line.split("|") for line in run.stdout.splitlines()), strict=True
    )
    expected = by_torch.score(images, nearest=1)
    np.testing.assert_allclose(np.float32(score), expected.score, atol=1e-3 * by_torch.parts.calibration.scores.std())
    assert list(decision) == expected.decision.tolist()
    assert list(prediction) == expected.prediction.tolist()
    assert [int(each) for each in expert] == expected.expert.tolist()
    assert list(nearest) == expected.nearest.ids[:, 0].tolist()


def test_neither_number_nor_order_matter(home, images):
    detector = Detector.load(home / "tiny.ood", runtime="onnx")
    scored = detector.score(images).score
    np.testing.assert_array_equal(detector.score(images[::-1]).score[::-1], scored)
    alone = np.concatenate([detector.score(path).score for path in images[::9]])
    np.testing.assert_allclose(alone, scored[::9], atol=1e-5)
    prepared = np.stack([detector.prepare(path) for path in images])
    np.testing.assert_array_equal(
        detector.runtime.run(prepared[:1]).refined.features, detector.runtime.run(prepared).refined.features[:1]
    )


def test_two_exports_are_the_same_bytes(home, tmp_path):
    done("export", home / "tiny.toml", "-o", tmp_path / "again.ood", "--onnx")
    assert (tmp_path / "again.ood").read_bytes() == (home / "tiny.ood").read_bytes()
    for place in (home, ROOT, sys.prefix):
        assert str(place).encode() not in (tmp_path / "again.ood").read_bytes()


def test_features_want_torch(home):
    detector = Detector.load(home / "tiny.ood", runtime="onnx")
    with pytest.raises(InputError, match='runtime="torch" for features'):
        detector.score_features(np.zeros((1, 1280), np.float32))


def test_without_a_graph_or_with_anothers_it_is_refused(home, tmp_path):
    from dataclasses import replace

    bundle = read_bundle(home / "tiny.ood")
    for name, graph, why in (
        ("none", None, "it has no model.onnx: export it with --onnx"),
        ("noise", b"no graph", "model.onnx: cannot be run: "),
        ("cut", bundle.graph[: len(bundle.graph) // 2], "model.onnx: cannot be run: "),
    ):
        write_bundle(tmp_path / f"{name}.ood", replace(bundle, graph=graph))
        with pytest.raises(InputError, match=f"{name}.ood: {why}"):
            Detector.load(tmp_path / f"{name}.ood", runtime="onnx")


def test_a_graph_of_another_network_is_not_written(home, tmp_path, monkeypatch):
    """Its experts are others by a little: the golden rows or the proof tell."""
    import onnx

    from stages.detection.deciding import DecidingDetector

    whole = DecidingDetector.graph

    def other(self):
        model = onnx.load_from_string(whole(self))
        weights = next(each for each in model.graph.initializer if len(each.dims) == 4)
        array = onnx.numpy_helper.to_array(weights) * np.float32(1.01)
        weights.CopyFrom(onnx.numpy_helper.from_array(array, weights.name))
        return model.SerializeToString()

    monkeypatch.setattr(DecidingDetector, "graph", other)
    said = refused("export", home / "tiny.toml", "-o", tmp_path / "it.ood", "--onnx")
    assert "it.ood: not written" in said
    assert list(tmp_path.iterdir()) == []
