"""What can be known before work is refused before work: by `run`, by `extract` and by `--dry-run`, alike."""

import json

import pytest
import timm
from safetensors.torch import save_file

from pipeline.backbones import backbones_of
from pipeline.config import load_config
from tests.test_pipeline.command import done, pipeline, refused, settings
from tests.test_pipeline.tiny import STUDY, draw

FINETUNE = """
[finetune]
epochs = 2
"""
VARIANT = """
[[variants]]
name = "many"
set = { "train.experts" = 9 }
"""
ENDS = """
[[variants]]
name = "ends"
set = { "train.expert" = "end" }
"""
VAL = """
[[sets]]
name = "val"
role = "id-val"
images = "images/val"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Three digits with eight images each, one class of one image, and files that stand for weights."""
    home = tmp_path_factory.mktemp("home")
    draw(home / "images" / "train", "sklearn:digits[0-2]/train", 8)
    draw(home / "images" / "test", "sklearn:digits[0-2]/test", 2)
    draw(home / "images" / "threes", "sklearn:digits[3]/test", 2, nested=False)
    draw(home / "images" / "photos", "sklearn:photos", 2)
    draw(home / "images" / "one-class", "sklearn:digits[0]/train", 8)
    draw(home / "images" / "flat", "sklearn:digits[0-1]/train", 1, nested=False)
    draw(home / "images" / "small", "sklearn:digits[0-1]/train", 8)
    draw(home / "images" / "small", "sklearn:digits[2]/train", 1)
    study = STUDY.replace("photos.tar", "photos")
    (home / "study.toml").write_text(study)
    (home / "finetune.toml").write_text(study + FINETUNE)
    (home / "variant.toml").write_text(study + VARIANT)
    draw(home / "images" / "val", "sklearn:digits[0]/train", 1, start=8)
    (home / "val.toml").write_text(study + VAL)
    (home / "groups.json").write_text(json.dumps({"digit 0": 0, "digit 1": 1}))
    (home / "any.pth").write_bytes(b"never read")
    return home


def network(home, name, size=64):
    """A network whose weights stand in a file that nobody can read: its shape alone is known."""
    return (f"backbone.name={name}", f"backbone.weights={home / 'any.pth'}", f"backbone.image_size={size}")


def many_classes(home):
    """65 classes of three images that nobody can decode; covariances of them are 2 GiB and 32 MiB for a ResNet-50."""
    for number in range(65):
        (home / "many" / str(number)).mkdir(parents=True, exist_ok=True)
        for name in ("a.png", "b.png", "c.png"):
            (home / "many" / str(number) / name).write_bytes(b"no image")
    return home / "many"


GMM = 'score.scores=["knn+gmm"]'

KINDS = {
    "a grouping of classes where there is one": (
        "study",
        lambda home: [
            f"sets.train.images={home / 'images/one-class'}",
            f"sets.test.images={home / 'images/one-class'}",
            f"train.grouping={home / 'groups.json'}",
        ],
        "groups.json names the classes of each group, and id-train has none to tell apart",
    ),
    "two images without a label": (
        "study",
        lambda home: [f"sets.train.images={home / 'images/flat'}"],
        "no image is left to select on: give 3 different images of a class or more",
    ),
    "a class too small to hold out": (
        "study",
        lambda home: [f"sets.train.images={home / 'images/small'}"],
        "class 'digit 2' has 1 image(s), too few to hold some out (1 such class(es))",
    ),
    "more patch tokens than there are": (
        "study",
        lambda home: ["cache.patches=pool:100"],
        'cache.patches: "pool:100" given, but the network makes ',
    ),
    "a share to hold out that leaves nothing": (
        "study",
        lambda home: ["split.val=0.99"],
        "none of which is left to train on: the same bytes stay together, or split.val is too large",
    ),
    "an id-val set too small to halve": (
        "val",
        lambda home: [],
        "the id-val set has 1 image(s), too few to halve into those that select and those that calibrate",
    ),
    "more experts than classes": (
        "study",
        lambda home: ["train.experts=4"],
        "train.experts: 4 experts for 3 classes: give at most 3",
    ),
    "more experts than classes in a variant": (
        "variant",
        lambda home: [],
        "variants.many.set.train.experts: 9 experts for 3 classes: give at most 3",
    ),
    "a grouping that lacks a class": (
        "study",
        lambda home: [f"train.grouping={home / 'groups.json'}"],
        "groups.json: 1 classes without a group: 'digit 2'",
    ),
    "a grouping that is not there": (
        "study",
        lambda home: [f"train.grouping={home / 'gone.json'}"],
        "gone.json cannot be read as JSON",
    ),
    "alpha_min above the preset's alpha_max": (
        "study",
        lambda home: ["train.alpha_min=0.9"],
        "train.alpha_min: 0.9 given, must be below alpha_max = 0.8",
    ),
    "a score that reads patches of which none are kept": (
        "study",
        lambda home: ["cache.patches=none", 'score.scores=["knn", "patch-knn"]'],
        'score.scores: patch-knn reads patch tokens, and none are kept: give cache.patches = "full"',
    ),
    "a score of patches that the end cannot run on": (
        "study",
        lambda home: [
            *network(home, "eva02_tiny_patch14_224", 56),
            "cache.patches=pool:2",
            "train.expert=adapter",
            'score.scores=["patch-knn"]',
        ],
        "score.scores: patch tokens behind the end of eva02_tiny_patch14_224 are asked for, which cannot run on "
        'patches = "pool:2"',
    ),
    "Gaussians of each class that take too much memory": (
        "study",
        lambda home: [
            *network(home, "resnet50.a1_in1k"),
            *(f"sets.{name}.images={many_classes(home)}" for name in ("train", "test")),
            GMM,
        ],
        "gmm: covariances of 65 classes and 2048 features take 2.0 GiB, 2 are allowed",
    ),
    "experts of an end that needs all patches": (
        "study",
        lambda home: [*network(home, "vit_small_patch16_dinov3", 32), "cache.patches=none"],
        'train.expert: "end" of vit_small_patch16_dinov3 cannot run on a cache with patches = "none"',
    ),
    "the same with pooled patches": (
        "study",
        lambda home: [*network(home, "eva02_tiny_patch14_224", 56), "cache.patches=pool:2"],
        'cannot run on a cache with patches = "pool:2": extract with patches = "full", or give expert = "adapter"',
    ),
    "more expert blocks than the network has": (
        "study",
        lambda home: [*network(home, "resnet10t"), "cache.expert_blocks=4"],
        "cache.expert_blocks: 4 given, resnet10t has 4: give at most 3",
    ),
    "taps after more blocks than the network has": (
        "study",
        lambda home: [*network(home, "resnet10t"), "cache.taps=[2,5]"],
        "cache.taps: [2, 5] given, resnet10t has 4 blocks or stages, counted from 1",
    ),
    "a score of layers that the network does not have": (
        "study",
        lambda home: [*network(home, "resnet10t"), "cache.taps=all", "score.params={ mm-pp = { layers = [2, 7] } }"],
        "score.params.mm-pp.layers: 7 given, the network has 4 blocks or stages",
    ),
    "a score of layers that are not kept": (
        "study",
        lambda home: ["cache.taps=[2,7]", "score.params={ mm-pp = { layers = [2, 5] } }"],
        "score.params.mm-pp.layers: 5 given, must be some of cache.taps = [2, 7]",
    ),
    "taps of a network whose class token does not pass its blocks": (
        "study",
        lambda home: [*network(home, "xcit_nano_12_p16_224", 32), "cache.taps=all", "train.expert=adapter"],
        "cache.taps: what xcit_nano_12_p16_224 makes after block or stage 1 cannot be read: leave it out",
    ),
    "an image size off the grid of patches": (
        "study",
        lambda home: network(home, "test_vit", 50),
        "backbone.image_size: 50 is no multiple of the patch size 16 of test_vit: give 48 or 64",
    ),
    "a network that does not run at a size": (
        "study",
        lambda home: network(home, "crossvit_9_240", 64),
        "backbone.image_size: crossvit_9_240 does not run at 64 px",
    ),
    "an unknown network": (
        "study",
        lambda home: network(home, "vit_smal_patch14_dinov2"),
        "backbone.name: timm has no model 'vit_smal_patch14_dinov2': did you mean",
    ),
    "weights that are not there": (
        "study",
        lambda home: ["backbone.name=resnet10t", f"backbone.weights={home / 'gone.pth'}"],
        'gone.pth: give "hub", "embedded" or a .safetensors or .pth file',
    ),
    "embedded weights of another network": (
        "study",
        lambda home: ["backbone.name=resnet10t"],
        '"embedded" weights exist for tf_efficientnet_lite0 only, not for resnet10t',
    ),
    "weights that the hub does not have": (
        "study",
        lambda home: ["backbone.name=test_vit4", "backbone.weights=hub", "backbone.image_size=64"],
        "the hub has no weights for test_vit4: give a local file",
    ),
    "a fine-tune that never trains the backbone": (
        "finetune",
        lambda home: ["finetune.head_epochs=2"],
        "finetune.head_epochs: 2 given, must be below epochs = 2",
    ),
    "more passes than images in a batch": (
        "finetune",
        lambda home: ["finetune.accumulate=64"],
        "finetune.accumulate: 64 passes given for a batch of 32 images",
    ),
    "an augmentation that timm does not know": (
        "finetune",
        lambda home: ["finetune.rand_augment=rand-w9"],
        "finetune.rand_augment: 'rand-w9' given, timm cannot read it",
    ),
    "more frozen blocks than there are": (
        "finetune",
        lambda home: ["finetune.freeze=9"],
        "finetune.freeze: 9 given, the backbone has 7 blocks or stages that can stay as they are",
    ),
    "more joint blocks than there are": (
        "finetune",
        lambda home: ["finetune.joint=7"],
        "finetune.joint: 7 given, tf_efficientnet_lite0 has 6 blocks or stages before the experts",
    ),
    "a joint fine-tune of an end that cannot be cut out": (
        "finetune",
        lambda home: [*network(home, "regnety_002"), "finetune.joint=1"],
        "finetune.joint: the end of regnety_002 cannot be cut out for experts: leave joint at 0",
    ),
    "stochastic depth that the family does not have": (
        "finetune",
        lambda home: [*network(home, "dla46_c"), "finetune.drop_path=0.1"],
        "finetune.drop_path: 0.1 given, dla46_c has no stochastic depth: give 0",
    ),
    "gradient checkpointing that the family does not have": (
        "finetune",
        lambda home: [*network(home, "dla46_c"), "finetune.checkpointing=true"],
        "finetune.checkpointing: timm's DLA has no gradient checkpointing: leave it out",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_refused_before_an_image_is_decoded(home, tmp_path, kind):
    study, changes, message = KINDS[kind]
    arguments = [home / f"{study}.toml", *settings(f"work={tmp_path / 'work'}", f"cache.root={tmp_path / 'caches'}")]
    arguments += settings(*changes(home))
    for verb in (["run", "--dry-run"], ["extract"]):  # `run` itself asks what `extract` asks
        assert message in refused(verb[0], *arguments, *verb[1:])
    assert not (tmp_path / "caches").exists()


def test_the_shape_of_the_network_is_built_once_for_all_backbones(home):
    backbones = backbones_of(load_config(home / "finetune.toml"))
    assert [backbone.kind for backbone in backbones] == ["pretrained", "finetuned"]
    assert backbones[1].architecture is backbones[0].architecture


@pytest.mark.parametrize("key", ["work", "cache.root"])
def test_a_folder_that_cannot_be_made(home, tmp_path, key):
    (tmp_path / "file").write_text("")
    places = {"work": tmp_path / "work", "cache.root": tmp_path / "caches"} | {key: tmp_path / "file" / "below"}
    arguments = [home / "study.toml", *settings(*(f"{name}={place}" for name, place in places.items()))]
    for verb in (["run", *arguments, "--dry-run"], ["run", *arguments], ["extract", *arguments]):
        assert refused(*verb) == f"{key}: {tmp_path / 'file'} is a file, a folder is needed"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_settings_of_every_variant_are_checked_before_the_first_is_trained(home, tmp_path):
    work = settings(f"work={tmp_path / 'work'}", f"cache.root={home / 'caches'}")
    done("extract", home / "study.toml", *work)
    message = "variants.many.set.train.experts: 9 experts for 3 classes: give at most 3"
    assert message in refused("train", home / "variant.toml", *work, "--dry-run")
    assert message in refused("train", home / "variant.toml", *work)
    assert not (tmp_path / "work" / "model").exists()


def test_every_variant_is_checked_against_the_patches_before_the_first_is_trained(home, tmp_path):
    """The first is made of adapters, which read none; of the second it is known that its end cannot run."""
    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("eva02_tiny_patch14_224", num_classes=0, img_size=28).state_dict(), weights)
    work = [f"work={tmp_path / 'work'}", f"cache.root={tmp_path / 'caches'}", "cache.patches=none"]
    work += ["backbone.name=eva02_tiny_patch14_224", f"backbone.weights={weights}", "backbone.image_size=28"]
    work += ["train.expert=adapter"]
    done("extract", home / "study.toml", *settings(*work))
    (tmp_path / "study.toml").write_text(f'extends = "{home / "study.toml"}"\n{ENDS}')
    for verb in (["train"], ["train", "--dry-run"], ["run"]):
        said = refused(verb[0], tmp_path / "study.toml", *settings(*work), *verb[1:])
        assert said.startswith('variants.ends.set.train.expert: "end" of eva02_tiny_patch14_224 cannot run on a cache')
    assert not (tmp_path / "work" / "model").exists()


def test_a_fine_tune_is_checked_by_its_own_dry_run(home, tmp_path):
    work = settings(f"work={tmp_path / 'work'}", f"cache.root={home / 'caches'}")
    done("extract", home / "study.toml", *work)
    for options in ([], ["--dry-run"]):
        said = refused("finetune", home / "finetune.toml", *work, *settings("finetune.freeze=9"), *options)
        assert said.startswith("finetune.freeze: 9 given, the backbone has 7 blocks or stages")


def test_what_is_sound_is_not_refused(home, tmp_path):
    """The same settings where they can be: adapters on no patches, as many experts as classes, a file of all groups."""
    groups = tmp_path / "groups.json"
    groups.write_text(json.dumps({"digit 0": "a", "digit 1": "b", "digit 2": "a"}))
    for changes in (
        ["cache.patches=none", "train.expert=adapter"],
        ["cache.patches=pool:1"],
        ["train.experts=3"],
        [f"train.grouping={groups}"],
        [*network(home, "vit_small_patch16_dinov3", 32)],
        [*network(home, "dla46_c")],  # nothing is asked of stochastic depth, which it does not have
    ):
        arguments = [home / "finetune.toml", *settings(f"work={tmp_path / 'work'}", *changes)]
        assert pipeline("run", *arguments, "--dry-run").status == 0


def test_image_that_cannot_be_decoded_is_not_looked_at(home, tmp_path):
    """Only an extraction finds it, and there it is a line of failures.jsonl."""
    folder = tmp_path / "train"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            (folder / name / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    arguments = settings(f"work={tmp_path / 'work'}", f"sets.train.images={folder}", "train.experts=3")
    arguments += settings(f"sets.test.images={folder}")
    assert "train.experts: 3 experts for 2 classes" in refused("run", home / "study.toml", *arguments)
