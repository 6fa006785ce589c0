"""The Python that documents show runs, and does what it says."""

import io
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from cache import FeatureCache
from tests.test_docs.pages import PAGES, page_with
from tests.test_pipeline.tiny import draw


def run(mark: str, **replaced: str) -> tuple[str, dict]:
    """What the Python between two marks prints, and the names that it leaves."""
    code, names = page_with(mark).code(mark), {}
    for word, instead in replaced.items():
        assert word in code
        code = code.replace(word, instead)
    with redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    return out.getvalue(), names


def test_ones_own_arrays_are_scored_in_ten_lines(caches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, source in {"train": "train", "test": "test", "textures": "far", "places": "near"}.items():
        np.save(f"{name}.npy", caches[source].read("cls"))
    np.save("train.label.npy", caches["train"].labels)
    lines = run("own arrays")[0].splitlines()
    assert [line.split(" | ")[1] for line in lines[2:5]] == ["textures", "places", "average"]
    assert float(lines[2].split(" | ")[2]) > 95  # photographs are far from digits
    assert lines[2 + 3 * 3] == ""
    assert [line.split(":")[0] for line in lines[3 + 3 * 3 :]] == ["mahalanobis-pp", "ssd"]  # few rows: they are shrunk


def test_the_parts_are_used_as_shown(caches):
    shown, _ = run("caches", **{f"cache/{name}-…": str(caches[name].path) for name in ("train", "test", "far")})
    assert shown.startswith("OODMetrics(n_id=")
    assert shown.endswith("[-2.3132617]\n")


def test_features_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(Path("photos"), "sklearn:digits[0-2]/test", 4)
    here = 'BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=32)'  # the hub gives tests none
    started = "from stages.config import BackboneConfig\nfrom stages.extract"
    _, found = run("features alone", **{'"vit_small_patch14_dinov2.lvd142m"': here, "from stages.extract": started})
    assert found["features"].shape == (12, 1280)
    assert found["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_caches_arrays_as_a_file_of_features(caches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    far: FeatureCache = caches["far"]
    run("arrays of a cache", **{"cache/textures-1a2b3c4d": str(far.path)})
    with np.load("mine.npz") as stored:
        assert stored["id"].tolist() == list(far.ids)
        np.testing.assert_array_equal(stored["cls"], far.read("cls"))
        assert set(stored) == {*far.spec.datasets(), "id"}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_snippet_is_python(page):
    for code in page.blocks("python"):
        compile(code, page.name, "exec")
