"""`backbone.decode` in a study: part of what features are, shown before work, honoured by `predict`, or refused."""

import json

import pytest
import torch

from cache import FeatureCache
from pipeline.backbones import StudyBackbone
from pipeline.config import load_config
from tests.test_pipeline.command import done, refused, settings
from tests.test_pipeline.tiny import STUDY
from tests.test_stages.jpegs import PHOTOS

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU answers here, so it is not refused")
DRAFT, CUDA = settings("backbone.decode=draft"), settings("backbone.decode=cuda")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Crops of two photographs, large enough for a network of 32 pixels to have them decoded smaller."""
    home = tmp_path_factory.mktemp("home")
    for name, photos in {"train": (0, 1), "test": (0, 1), "threes": (0,), "photos": (1,)}.items():
        for label in photos:
            folder = home / "images" / name / str(label)
            folder.mkdir(parents=True)
            for number in range(8 if name == "train" else 3):
                left = 10 * number + 5 * (name == "test")
                PHOTOS[label].crop((left, left, left + 320, left + 240)).save(folder / f"{number}.jpg", quality=90)
    (home / "study.toml").write_text(STUDY.replace("photos.tar", "photos"))
    return home


def asked(home, *overrides):
    return StudyBackbone(load_config(home / "study.toml", overrides), "pretrained").asked()


def test_studies_from_before_there_was_a_choice_are_fresh(home):
    assert "decode" not in asked(home)
    assert asked(home) == asked(home, "backbone.decode=pil")
    assert asked(home, "backbone.decode=draft") == asked(home) | {"decode": "draft"}


def test_a_draft_is_another_cache_which_predict_reads_alike(home):
    lines = done("run", home / "study.toml", "--dry-run", *DRAFT).out.splitlines()
    assert "extract pretrained: JPEG files are decoded by 'draft' (backbone.decode)" in lines
    assert "decoded" not in done("run", home / "study.toml", "--dry-run").out
    done("extract", home / "study.toml")
    done("extract", home / "study.toml", *DRAFT)
    pil, draft = sorted(
        map(FeatureCache.open, (home / "caches").glob("test-*")), key=lambda cache: len(cache.spec.transform)
    )
    assert draft.spec.transform == pil.spec.transform | {"decode": "draft"}
    assert pil.image_hashes.tolist() == draft.image_hashes.tolist()
    away = abs(pil.read("cls").astype(float) - draft.read("cls"))
    assert 0 < away.mean() < 0.1 * abs(pil.read("cls")).mean()
    assert "JPEG decoded by 'draft'" in done("info", draft.path).out
    done("train", home / "study.toml", *DRAFT)
    train = home / "images" / "train"
    answer = done("predict", home / "study.toml", train, "--format", "json", "--score", "knn", *DRAFT)
    found = [(image["path"], image["nearest"][0]) for image in json.loads(answer.out)["images"]]
    alike = [near["distance"] < 1e-3 for path, near in found if path == f"{train}/{near['id']}"]
    assert sum(alike) >= 8  # those that are trained on find themselves, decoded the same way


@WITHOUT_GPU
@pytest.mark.parametrize("verb", ["extract", "run", "predict"])
def test_cuda_without_a_gpu_is_refused_before_any_work(home, verb):
    images = [home / "images" / "test"] if verb == "predict" else []
    line = 'backbone.decode: "cuda" decodes new images on a GPU, and there is none here: give "pil" or "draft", '
    assert refused(verb, home / "study.toml", *images, *CUDA, *settings(f"work={home / 'no-gpu'}")).startswith(line)
    assert not (home / "no-gpu").exists()


def test_a_wrong_way_is_refused_with_those_that_there_are(home):
    line = refused("extract", home / "study.toml", *settings("backbone.decode=gpu"))
    assert line.endswith("backbone.decode: \"gpu\" given, must be 'pil', 'draft' or 'cuda'")
