"""The experiment files that come with the project: each runs unchanged on a made tree of its folders and lists."""

import re
from pathlib import Path

import pytest
import timm
from PIL import Image

from pipeline.benchmark.map import MAPPED
from pipeline.benchmark.run import STUDIES
from pipeline.config import load_config
from pipeline.reproduction.document import every_score, load_study, run_configs
from pipeline.reproduction.selection import Selection
from tests.test_pipeline.command import done, settings

EXPERIMENTS = Path(__file__).parents[2] / "pipeline" / "experiments"
REPRODUCED = EXPERIMENTS / "dinov2-imagenet.toml"  # a study file, which names runs of experiment files
OTHERS = {EXPERIMENTS / "demo.toml", *STUDIES, MAPPED, REPRODUCED}  # run for real by their own tests, but for the last
PAPERS = sorted(set(EXPERIMENTS.glob("*.toml")) - OTHERS)
CLASSES = [line for line in (EXPERIMENTS / "imagenet-100.txt").read_text().splitlines() if not line.startswith("#")]
OTHER_CLASS = "n01440764"  # of ImageNet-1K, not of ImageNet-100
OPENOOD = {"ssb_hard": "largescale", "ninco": "largescale", "inaturalist": "largescale", "openimage_o": "largescale"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folders of ImageNet and of MOS's OOD sets, and OpenOOD's lists, with three images of each class."""
    root = tmp_path_factory.mktemp("data")
    pixel = root / "pixel.png"
    Image.new("RGB", (2, 2)).save(pixel)

    def put(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(pixel)

    for name in [*CLASSES, OTHER_CLASS]:
        for number in (1, 2, 3):  # of fewer, none could be held out to select and to calibrate
            put(root / "imagenet" / "train" / name / f"{name}_{number}.JPEG")
        put(root / "imagenet" / "val" / name / "ILSVRC2012_val_00000001.JPEG")
    for folder in (
        "iNaturalist/images",
        "SUN/images",
        "Places/images",
        "dtd/images/banded",
        "NINCO/NINCO_OOD_classes/f",
    ):
        put(root / folder / "a.jpg")
    lists = {
        f"{part}_imagenet": [f"imagenet_1k/{part}/{i}.JPEG {i % 7}" for i in range(14)]
        for part in ("train", "val", "test")
    }
    lists |= {f"test_{name}": [f"{name}/a.jpg -1", f"{name}/b.jpg -1"] for name in (*OPENOOD, "textures")}
    shifted = [f"imagenet_{name}" for name in ("v2", "c", "r", "es")]
    lists |= {f"test_{name}": [f"{name}/a.jpg 0", f"{name}/b.jpg 1"] for name in shifted}
    for name, lines in lists.items():
        path = root / "benchmark_imglist" / "imagenet" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))
        images = root / ("images_classic" if name == "test_textures" else "images_largescale")
        for line in lines:
            put(images / line.split()[0])
    return root


def test_all_of_the_papers_studies_are_here():
    assert {path.stem for path in PAPERS} == {
        "imagenet-1k",
        "imagenet-100",
        "openood-imagenet-1k",
        "openood-fs-imagenet-1k",
        *(f"pilot-{name}" for name in ("dino", "dinov2", "mae", "clip", "openclip", "siglip")),
    }


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_a_dry_run_finds_every_set_and_says_what_would_run(path, data, tmp_path):
    config = load_config(path, [f"data={data}", f"work={tmp_path}"])
    # A smaller sister of the network, and smaller images: their shapes are soon known.
    name = config.backbone.name.replace("vit_base_patch14", "vit_small_patch14")
    small = settings(f"data={data}", f"work={tmp_path}", f'backbone.name="{name}"', "backbone.image_size=112")
    said = done("run", path, *small, "--dry-run").out
    n_classes, openood = 100 if path.stem == "imagenet-100" else 101, "openood" in path.stem
    for entry in config.sets:
        n = 2 if openood else 1
        if entry.role.startswith("id-"):
            n = 14 if openood else 3 * n_classes if entry.role == "id-train" else n_classes
        assert re.search(rf"^extract pretrained {re.escape(entry.name)}: {n} images, would write", said, re.MULTILINE)
    for variant in config.variant_configs():
        assert f"train pretrained {variant} seed 0: would run" in said
    assert ("finetune seed 0: would run" in said) == (config.finetune is not None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_the_hub_has_weights_of_every_backbone(path):
    """timm lists ``model.tag`` only where it knows weights of it."""
    config = load_config(path)
    assert config.backbone.weights == "hub"
    assert config.backbone.name in timm.list_models(config.backbone.name.split(".")[0] + ".*", pretrained=True)


def test_the_pilot_differs_in_the_backbone_alone():
    configs = [load_config(path).to_dict() for path in PAPERS if path.stem.startswith("pilot-")]
    recipes = {config["backbone"].pop("name"): config["backbone"].pop("recipe") for config in configs}
    assert len(recipes) == 6
    assert {name for name, recipe in recipes.items() if recipe == "official"} == {
        name for name in recipes if "dinov2" in name
    }
    assert len({config.pop("name") for config in configs}) == 6
    assert len({config.pop("work") for config in configs}) == 6
    assert len({config["cache"].pop("root") for config in configs}) == 6
    assert all(config == configs[0] for config in configs)


def test_imagenet_100_is_a_hundred_classes():
    assert len(set(CLASSES)) == 100
    assert all(re.fullmatch(r"n\d{8}", name) for name in CLASSES)
    assert OTHER_CLASS not in CLASSES


@pytest.mark.parametrize("run", load_study(REPRODUCED).runs, ids=lambda run: run.name)
def test_a_run_of_the_study_has_its_network_and_what_its_targets_are_of(run, tmp_path):
    study = load_study(REPRODUCED)
    config = run_configs(study, REPRODUCED, tmp_path, tmp_path, Selection(only=[run.name]))[run.name]
    name = config.backbone.name
    assert name in timm.list_models(name.split(".")[0] + "*", pretrained="." in name)
    oods = {"near", "far", "all", *(entry.name for entry in config.sets_of("near-ood", "far-ood"))}
    for target in study.targets_of(run.name):
        assert target.needs_features_alone or (target.score in config.score.scores and target.of in oods)
        assert bool(config.sets_of("cs-id")) >= target.measure.startswith("fsood")


def test_the_study_is_all_of_dinov2_by_every_score():
    study = load_study(REPRODUCED)
    readme = {"dinov2-s": 79.0, "dinov2-b": 82.1, "dinov2-l": 83.5, "dinov2-g": 83.5}
    assert {target.run: target.value for target in study.targets if target.needs_features_alone} == readme
    assert study.set["score.scores"] == "every"
    assert {"knn", "mahalanobis-pp", "energy", "knn+energy"} <= set(every_score())
    assert not {"patch-knn", "mos", "other"} & set(every_score())
