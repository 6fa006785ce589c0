"""Studies of a few small images, from the command line: order of verbs, freshness, sources, bad input."""

import csv
import io
import json
import os
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from cache import FeatureCache
from stages.config import BackboneConfig
from stages.networks.weights.loading import build_model
from tests.test_pipeline.command import Running, done, pipeline, refused, settings, snapshot
from tests.test_pipeline.tiny import ADAPTERS, STUDY, by_network, draw

VARIANT = """
[[variants]]
name = "dense"
set = { "train.experts" = 1 }
"""
VALIDATION = """
[[sets]]
name = "val"
role = "id-val"
images = "images/val"
"""
FINETUNE = """
[finetune]
epochs = 1
hflip = 0.0
"""


@pytest.fixture(scope="module")
def home(vit, tmp_path_factory):
    """A folder with images and experiment files, and the study ``tiny`` run once; everybody's, so copy what you change.

    Three digits with 32 images each to train on, so that a fifth of them can be held out and halved.
    """
    home = tmp_path_factory.mktemp("home")
    draw(home / "images" / "train", "sklearn:digits[0-2]/train", 32)
    draw(home / "images" / "test", "sklearn:digits[0-2]/test", 8)
    draw(home / "images" / "val", "sklearn:digits[0-2]/train", 8, start=32)
    draw(home / "images" / "threes", "sklearn:digits[3]/test", 16, nested=False)
    draw(home / "images" / "photos", "sklearn:photos", 8)
    with tarfile.open(home / "images" / "photos.tar", "w") as tar:
        tar.add(home / "images" / "photos", arcname=".")
    for name, more in {"tiny": "", "variant": VARIANT, "validation": VALIDATION}.items():
        (home / f"{name}.toml").write_text(ADAPTERS + more)
    # Experts that are trained with the backbone are made of its end.
    (home / "finetune.toml").write_text(by_network(vit, STUDY) + FINETUNE)
    done("run", home / "tiny.toml")
    return home


@pytest.fixture
def tiny(home, tmp_path):
    """Arguments that name a copy of the finished study: its work folder may be changed, its caches are shared."""
    shutil.copytree(home / "work", tmp_path / "work")
    return [home / "tiny.toml", *settings(f"work={tmp_path / 'work'}")]


@pytest.fixture
def caches(home, tmp_path):
    """A copy of the study's caches, to be damaged and added to."""
    return Path(shutil.copytree(home / "caches", tmp_path / "caches"))


@pytest.fixture
def nothing(home, tmp_path):
    """Arguments that name the same study where nothing was done yet."""
    return [home / "tiny.toml", *settings(f"work={tmp_path / 'new'}", f"cache.root={tmp_path / 'caches'}")]


def table_of(work):
    return list(csv.DictReader(io.StringIO((work / "scores" / "table.csv").read_text())))


# --------------------------------------------------------------------------------------------------- order of verbs


@pytest.mark.parametrize("verb", ["train", "score", "verify"])
def test_before_extract(verb, nothing, tmp_path):
    assert "the pretrained features are not extracted yet" in refused(verb, *nothing)
    assert "run make extract" in refused(verb, *nothing)
    assert not (tmp_path / "new").exists()


def test_predict_before_extract(nothing, home):
    assert "run make extract" in refused("predict", *nothing, home / "images" / "photos.tar")


def test_score_before_train(tiny, tmp_path):
    shutil.rmtree(tmp_path / "work" / "model")
    assert refused("score", *tiny).endswith("holds no trained mixture: run make train")


def test_report_before_score(tiny, tmp_path):
    shutil.rmtree(tmp_path / "work" / "scores")
    assert refused("report", *tiny).endswith("contents.json is missing or damaged: run make score")


def test_info_at_any_time(nothing):
    out = done("info", *nothing).out
    assert out.count("not extracted yet") == 4
    assert "model      pretrained default seed 0: not trained" in out


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("backbone.image_size=64", "image_size: 32 in the cache, 64 asked"),
        ("backbone.name=mobilenetv3_small_100", "backbone: "),
        ("backbone.weights=hub", "weights: "),
        ("cache.dtype=float32", "dtype: "),
        ("cache.patches=none", "patches: "),
        ("cache.expert_blocks=2", "expert_blocks: 1 in the cache, 2 asked"),
        ("sets.train.images=sklearn:digits", "set 'train' was extracted from "),
    ],
)
def test_other_features_than_those_extracted(setting, said, tiny):
    line = refused("train", *tiny, "--set", setting)
    assert said in line
    assert line.endswith("run make extract")


@pytest.mark.parametrize("setting", ["train.epochs=2", "train.experts=1", "seeds=[5]", "split.val=0.4"])
def test_other_settings_than_those_trained_with(setting, tiny):
    assert refused("score", *tiny, "--set", setting).endswith("run make train")


def test_training_again_with_other_settings_gives_other_models(tiny, tmp_path):
    weights = tmp_path / "work" / "model" / "pretrained" / "default" / "seed-0" / "mofe.safetensors"
    before = weights.read_bytes()
    assert "default seed 0: fresh" in done("train", *tiny).out
    assert weights.read_bytes() == before
    assert "default seed 0: done, 2 experts" in done("train", *tiny, "--set", "train.lr=0.001").out
    assert weights.read_bytes() != before
    assert "run make train" in refused("score", *tiny)  # the models are now others than the file asks for


# ------------------------------------------------------------------------------------------------------- freshness


def test_dry_run_of_a_new_study(nothing, tmp_path):
    lines = done("run", *nothing, "--dry-run").out.splitlines()
    row_bytes = 2 * (1280 + 192 + 192)
    assert lines[0] == f"extract pretrained train: 96 images, would write {96 * row_bytes / 2**20:.1f} MiB"
    assert lines[4] == "train pretrained default seed 0: would run"
    assert lines[5].startswith("score: would read caches and models")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "caches").exists()


def test_dry_run_follows_the_settings(tiny):
    lines = done("run", *tiny, "--set", "train.epochs=2", "--dry-run").out.splitlines()
    assert [line.split(": ")[1].split(",")[0] for line in lines[4:6]] == ["would run", "would read caches and models"]
    assert all(", fresh, " in line for line in lines[:4])
    assert done("score", *tiny, "--dry-run").out.startswith("score: fresh, ")
    assert done("score", *tiny, "--set", "score.k=2", "--dry-run").out.startswith("score: would")


def test_what_lies_beside_the_images_is_told_before_and_after(tiny, home, tmp_path):
    folder = shutil.copytree(home / "images" / "threes", tmp_path / "threes")
    for name in ("README.txt", "more/notes.TXT", "labels.json", "@eaDir/1.png", ".DS_Store"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no image")
    study = [*tiny, *settings(f"sets.threes.images={folder}", f"cache.root={tmp_path / 'caches'}")]
    told = "left out: 3 files: 2 .txt, 1 .json"
    planned = [line for line in done("extract", *study, "--dry-run").out.splitlines() if "left out" in line]
    assert len(planned) == 1
    assert planned[0].startswith("extract pretrained threes: 16 images, would write ")
    assert planned[0].endswith(f"; {told}")
    for _ in range(2):  # fresh or not
        assert f"threes: {told}" in done("extract", *study).out.splitlines()
    assert done("info", *study).out.splitlines().count(told) == 1
    (cache,) = (tmp_path / "caches").glob("threes-*")
    assert FeatureCache.open(cache).manifest.left_out == {".txt": 2, ".json": 1}
    assert told in done("info", cache).out.splitlines()


def without_each(folder, names):
    """Each of some files and folders, while it alone is away; then all of them are."""
    for name in names:
        (folder / name).rename(folder.parent / "away")
        yield name
        (folder.parent / "away").rename(folder / name)
    for name in names:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def test_lost_results_are_made_again(tiny, home, tmp_path):
    scores, names = tmp_path / "work" / "scores", ("summary.csv", "table.csv", "id.json", "thresholds.json", "samples")
    for lost in without_each(scores, names):
        assert done("score", *tiny, "--dry-run").out.startswith("score: would"), lost
    done("score", *tiny)
    for original in (home / "work" / "scores").rglob("*.*"):
        made = scores / original.relative_to(home / "work" / "scores")
        assert made.read_bytes() == original.read_bytes() or "samples" in made.parts, made


def test_lost_models_are_made_again(tiny, home, tmp_path):
    model = Path("work", "model", "pretrained", "default", "seed-0")
    names = ("mofe.safetensors", "heads.safetensors", "refined/final/id-train.safetensors")
    for lost in without_each(tmp_path / model, names):
        assert refused("score", *tiny).endswith("or not whole: run make train"), lost
    assert "default seed 0: done" in done("train", *tiny).out
    for name in names:
        assert (tmp_path / model / name).read_bytes() == (home / model / name).read_bytes()
    done("score", *tiny)


def test_lost_cache_is_made_again(nothing, tmp_path):
    done("extract", *nothing)
    before = {path: path.read_bytes() for path in (tmp_path / "caches").rglob("*") if path.is_file()}
    (gone,) = (tmp_path / "caches").glob("train-*")
    shutil.rmtree(gone)
    assert refused("train", *nothing).endswith("run make extract")
    assert "extract pretrained: 1 of 4 sets extracted" in done("extract", *nothing).out
    assert {path: path.read_bytes() for path in (tmp_path / "caches").rglob("*") if path.is_file()} == before


def test_caches_are_shared_by_studies(home, tmp_path):
    answer = done("extract", home / "tiny.toml", *settings(f"work={tmp_path / 'other'}"))
    assert answer.out.startswith("extract pretrained: fresh; ")


def test_same_seed_same_table(home, tmp_path):
    again = [home / "tiny.toml", *settings(f"work={tmp_path / 'again'}")]
    done("extract", *again)
    assert "train pretrained default seed 0: done" in done("train", *again).out
    done("score", *again)
    for name in ("table.csv", "summary.csv", "id.json", "thresholds.json"):
        assert (tmp_path / "again" / "scores" / name).read_bytes() == (home / "work" / "scores" / name).read_bytes()


def test_moved_study_stays_whole(home, tmp_path):
    """Caches below ``work`` are found relative to it."""
    arguments = settings(f"cache.root={tmp_path / 'one' / 'cache'}", f"work={tmp_path / 'one'}")
    done("extract", home / "tiny.toml", *arguments)
    (tmp_path / "one").rename(tmp_path / "two")
    moved = settings(f"cache.root={tmp_path / 'two' / 'cache'}", f"work={tmp_path / 'two'}")
    assert done("verify", home / "tiny.toml", *moved).out.count("/two/cache/") == 4


def test_weights_that_change_under_their_name(home, tmp_path):
    """Same path, size and time, other weights: features of both never meet."""
    config = BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=32)
    state = build_model(config).state_dict()
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    stat = path.stat()
    study = [home / "tiny.toml", *settings(f"work={tmp_path / 'work'}", f"backbone.weights={path}", "train.expert=end")]
    assert done("extract", *study).out.startswith("extract pretrained: fresh; ")  # the embedded weights, from a file
    save_file({name: tensor * 2 if name == "conv_stem.weight" else tensor for name, tensor in state.items()}, path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    line = refused("train", *study)
    assert "gives other weights now than those that the pretrained features were extracted with" in line


# ------------------------------------------------------------------------------------------- variants, seeds, id-val


def test_variants_and_seeds(home, tmp_path):
    work = tmp_path / "work"
    both = settings(f"work={work}", "seeds=[0, 1]", 'score.scores=["knn"]')
    for verb in ("extract", "train", "score"):
        done(verb, home / "variant.toml", *both)
    rows = table_of(work)
    own = {(row["variant"], row["seed"]) for row in rows if row["features"] == "mofe"}
    assert own == {("default", "0"), ("default", "1"), ("dense", "0"), ("dense", "1")}
    assert {(row["variant"], row["seed"]) for row in rows if row["features"] == "cls"} == {("", "")}
    assert {row["calibrated"] for row in rows if row["variant"] == "dense"} == {"false"}  # one expert: one scale
    dense = json.loads((work / "model" / "pretrained" / "dense" / "seed-1" / "mofe.json").read_text())
    assert dense["settings"]["experts"] == 1
    assert dense["seed"] == 1

    summary = list(csv.DictReader(io.StringIO((work / "scores" / "summary.csv").read_text())))
    named = {"features": "mofe", "variant": "default", "head": "none", "score": "knn", "calibrated": "false"}
    named |= {"routing": "predicted", "ood": "threes"}
    (line,) = (line for line in summary if all(line[name] == value for name, value in named.items()))
    values = [float(row["auroc"]) for row in rows if all(row[name] == value for name, value in named.items())]
    assert line["n_seeds"] == "2"
    assert float(line["auroc_mean"]) == pytest.approx(np.mean(values))
    assert float(line["auroc_std"]) == pytest.approx(np.std(values, ddof=1))
    assert " ± " in (work / "scores" / "summary.md").read_text()
    frozen = [line for line in summary if line["features"] == "cls"]
    assert {line["n_seeds"] for line in frozen} == {"1"}
    assert {line["auroc_std"] for line in frozen} == {""}

    # A variant may have fewer seeds than the study.
    fewer = [home / "variant.toml", *both, *settings("variants.dense.seeds=[1]")]
    assert "dense seed 0" not in done("run", *fewer, "--dry-run").out + done("info", *fewer).out
    done("score", *fewer)
    own = {(row["variant"], row["seed"]) for row in table_of(work) if row["features"] == "mofe"}
    assert own == {("default", "0"), ("default", "1"), ("dense", "1")}

    # Without the variant and the second seed nothing of them stays in the results.
    done("score", home / "tiny.toml", *settings(f"work={work}"))
    assert (work / "scores" / "table.csv").read_bytes() == (home / "work" / "scores" / "table.csv").read_bytes()
    assert {path.name for path in (work / "scores" / "samples").iterdir()} == {
        path.name for path in (home / "work" / "scores" / "samples").iterdir()
    }


def test_validation_set(home, tmp_path):
    work = tmp_path / "work"
    given = settings(f"work={work}")
    out = "".join(done(verb, home / "validation.toml", *given).out for verb in ("extract", "train", "score"))
    assert "probe with strength" in out
    assert "id-val, halved into select and calibrate" in out
    thresholds = json.loads((work / "scores" / "thresholds.json").read_text())
    assert {line["n"] for line in thresholds} == {12}  # half of 3 classes of 8
    assert {row["ood"] for row in table_of(work)} == {"threes", "photos", "average"}


def test_class_without_enough_rows_is_cross_fitted(home, tmp_path):
    draw(tmp_path / "few", "sklearn:digits[0-2]/train", 9)
    arguments = settings(f"work={tmp_path / 'work'}", f"cache.root={tmp_path / 'caches'}")
    few = settings(f"sets.train.images={tmp_path / 'few'}")
    done("extract", home / "tiny.toml", *arguments, *few)
    assert "selects, 3 folds of the rest calibrate" in done("train", home / "tiny.toml", *arguments, *few).out
    shutil.rmtree(tmp_path / "few" / "digit 0")
    (tmp_path / "few" / "digit 0").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "few" / "digit 0" / "only.png")
    assert "class 'digit 0' has 1 image(s), too few" in refused("extract", home / "tiny.toml", *arguments, *few)


# -------------------------------------------------------------------------------------------------------- fine-tune


class Tuned(NamedTuple):
    """What a study said whose backbone was fine-tuned, and experts trained together with it, verb by verb.

    Attributes:
        study: arguments that name it. Everybody's: give another work folder to what changes it.
        refused: by verb, and what had been done before.
        done: by verb.
    """

    study: list[object]
    work: Path
    refused: dict[tuple[str, str], str]
    done: dict[str, str]


@pytest.fixture(scope="module")
def tuned(home, tmp_path_factory):
    root = tmp_path_factory.mktemp("tuned")
    places = settings(f"work={root / 'work'}", f"cache.root={root / 'caches'}")
    study = [home / "finetune.toml", *places, *settings("finetune.joint=1")]
    for verb in ("extract", "train"):
        done(verb, *study, "--backbone", "pretrained")
    now = ["--backbone", "finetuned"]
    no = {("nothing", verb): refused(verb, *study, *now) for verb in ("extract", "train", "score")}
    no["nothing", "predict"] = refused("predict", *study, root, *now)
    yes = {"plan": done("run", *study, "--dry-run").out, "finetune": done("finetune", *study).out}
    yes["verify"] = done("verify", *study).out
    no |= {("finetune", verb): refused(verb, *study, *now) for verb in ("train", "score")}
    yes["extract"] = done("extract", *study).out
    no["extract", "score"] = refused("score", *study, *now)
    yes["train"] = done("train", *study, *now).out
    yes["score"] = done("score", *study).out
    return Tuned(study, root / "work", no, yes)


@pytest.fixture
def retuned(tuned, tmp_path):
    """The same in a work folder of its own, which may be changed."""
    shutil.copytree(tuned.work, tmp_path / "work")
    return [*tuned.study, *settings(f"work={tmp_path / 'work'}")]


def test_finetune_in_verbs(tuned):
    for verb in ("extract", "train", "score", "predict"):
        assert tuned.refused["nothing", verb] == "there is no finetuned backbone yet: run make finetune"
    assert "finetune seed 0: would run" in tuned.done["plan"]
    assert "finetune seed 0: done, epoch 0 kept" in tuned.done["finetune"]
    assert tuned.done["verify"].count(": whole, ") == 4  # those of the pre-trained backbone; no others yet
    assert "finetuned-seed-0 features are not extracted yet" in tuned.refused["finetune", "score"]
    assert "run make extract" in tuned.refused["finetune", "train"]
    assert [line.split(";")[0] for line in tuned.done["extract"].splitlines()] == [
        "extract pretrained: fresh",
        "extract finetuned-seed-0: 4 of 4 sets extracted",
    ]
    assert "run make train" in tuned.refused["extract", "score"]
    assert "train pretrained" not in tuned.done["train"]
    assert "train finetuned-seed-0 default seed 0: done" in tuned.done["train"]
    assert {row["backbone"] for row in table_of(tuned.work)} == {"pretrained", "finetuned"}
    assert "finetune seed 0: fresh" in done("finetune", *tuned.study).out


def test_a_fine_tune_with_other_settings_is_not_taken_for_that_of_now(retuned, tmp_path):
    other = settings("finetune.lr=0.001")
    assert refused("score", *retuned, *other, "--backbone", "finetuned").endswith("run make finetune")
    answer = done("score", *retuned, *other)
    assert "finetuned-seed-0 is left out: " in answer.err
    assert {row["backbone"] for row in table_of(tmp_path / "work")} == {"pretrained"}
    (tmp_path / "work" / "finetune" / "seed-0" / "backbone.safetensors").unlink()
    assert "finetune seed 0: done" in done("finetune", *retuned).out


@pytest.mark.parametrize("stage", ["train", "finetune"])
def test_event_files_that_cannot_be_written_are_refused_before_the_first_stage(home, tmp_path, monkeypatch, stage):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # what Python does without the package
    asked = settings(f"{stage}.tensorboard=true", f"work={tmp_path / 'new'}")
    assert refused("run", home / "finetune.toml", *asked).startswith(f"{stage}.tensorboard: needs the package")
    assert not (tmp_path / "new").exists()


def test_experts_trained_together_with_the_backbone_are_a_variant(tuned):
    assert "train finetuned-seed-0 joint seed 0: would run" in tuned.done["plan"]
    assert "train finetuned-seed-0 default seed 0: done, 2 experts" in tuned.done["train"]
    assert "train finetuned-seed-0 joint seed 0: done, 2 experts, epoch 0 kept" in tuned.done["train"]
    rows = table_of(tuned.work)
    joint, default = ([row for row in rows if row["variant"] == name] for name in ("joint", "default"))
    assert {(row["backbone"], row["features"], row["seed"]) for row in joint} == {("finetuned", "mofe", "0")}
    names = ("head", "routing", "score", "calibrated", "ood", "group")
    of_cache = [row for row in default if row["backbone"] == "finetuned"]
    assert [[row[name] for name in names] for row in joint] == [[row[name] for name in names] for row in of_cache]
    assert [row["auroc"] for row in joint] != [row["auroc"] for row in of_cache]
    assert "model      finetuned-seed-0 joint seed 0: 2 experts, " in done("info", *tuned.study).out


def test_experts_of_a_joint_fine_tune_are_neither_made_twice_nor_taken_for_others(retuned, tmp_path):
    work = tmp_path / "work"
    done("run", *retuned)  # what was copied is compared with its digests, once
    before = snapshot(work / "model", work / "finetune", work / "scores")
    again = done("run", *retuned).out
    assert "finetune seed 0: fresh" in again
    assert "train finetuned-seed-0 joint seed 0: fresh" in again
    assert snapshot(work / "model", work / "finetune", work / "scores") == before
    assert "MoFE · joint · 2 experts" in (work / "report" / "index.html").read_text()
    weights = work / "model" / "finetuned" / "joint" / "seed-0" / "mofe.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    assert "or not whole: run make train" in refused("score", *retuned)
    planned = done("run", *retuned, "--dry-run").out
    assert "train finetuned-seed-0 default seed 0: fresh" in planned
    assert "train finetuned-seed-0 joint seed 0: would run" in planned
    assert "joint seed 0: done" in done("train", *retuned, "--backbone", "finetuned").out
    assert weights.read_bytes() == whole
    for other in ("finetune.joint=2", "train.router_lr=0.001"):
        assert refused("score", *retuned, *settings(other), "--backbone", "finetuned").endswith("run make finetune")
    planned = done("run", *retuned, *settings("finetune.joint=2"), "--dry-run").out
    assert "finetune seed 0: would run" in planned
    assert "extract finetuned-seed-0 train: 96 images, would write" in planned
    assert "train finetuned-seed-0 joint seed 0: would run" in planned


# ---------------------------------------------------------------------------------------------------------- sources


def test_folder_tar_and_lists_are_the_same_images(home, caches, tmp_path):
    """A tar with the names and bytes of a folder is the folder; lists name the same images by their paths."""
    train, test = home / "images" / "train", home / "images" / "test"
    files = sorted(train.rglob("*.png"))
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(train, arcname=".")
    with (tmp_path / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((path, path.parent.name) for path in files)])
    for name, folder in (("train", train), ("test", test)):  # in OpenOOD's lists classes are numbers, in every set
        lines = (f"{path} {path.parent.name.split()[-1]}\n" for path in sorted(folder.rglob("*.png")))
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    study = [home / "tiny.toml", *settings(f"cache.root={caches}", f"work={tmp_path / 'work'}")]

    answer = done("extract", *study, "--set", f"sets.train.images={tmp_path / 'train.tar'}")
    assert answer.out.startswith("extract pretrained: fresh; ")
    for lists in (["train.csv"], ["train.txt", "test.txt"]):
        given = settings(*(f"sets.{name.split('.')[0]}.images={tmp_path / name}" for name in lists))
        assert f": {len(lists)} of 4 sets extracted" in done("extract", *study, *given).out
    one, *others = (FeatureCache.open(path) for path in sorted(caches.glob("train-*")))
    assert len(others) == 2
    for other in others:
        assert np.array_equal(other.read("patches"), one.read("patches"))
        assert np.array_equal(other.image_hashes, one.image_hashes)
        assert np.array_equal(other.labels, one.labels)
    assert [cache.class_names[1] for cache in (one, *others)] == ["digit 1", "digit 1", "1"]


def test_ood_sets_need_no_classes_and_have_no_say_in_them(tiny, caches, tmp_path):
    """Folders of an OOD set that are called like ID classes: they are what the set's role says."""
    draw(tmp_path / "near", "sklearn:digits[0-2]/test", 4)
    given = settings(f"cache.root={caches}", f"sets.threes.images={tmp_path / 'near'}")
    assert "1 of 4 sets extracted" in done("extract", *tiny, *given).out
    done("score", *tiny, *given)
    row = next(row for row in table_of(tmp_path / "work") if row["ood"] == "threes")
    assert row["n_ood"] == "12"
    assert 0.2 < float(row["auroc"]) < 0.8  # the same kind of images as the ID test set


def test_images_that_cannot_be_used(home, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(home / "images" / "test", images)
    (images / "digit 1" / "broken.png").write_bytes(b"no image")
    (images / "digit 1" / "notes.md").write_text("no image either, and it does not say that it is one")
    given = settings(f"work={tmp_path / 'work'}", f"cache.root={tmp_path / 'caches'}", f"sets.test.images={images}")
    answer = pipeline("extract", home / "tiny.toml", *given)
    assert answer.status == 1
    last = answer.err.splitlines()[-1]
    assert last.startswith("error: test: 1 of 25 images cannot be used, more than --max-failures 0.01 allows")
    assert "digit 1/broken.png: " in last
    answer = done("extract", home / "tiny.toml", *given, "--max-failures", "0.1")
    assert "extract train: " not in answer.err  # what was finished is kept
    (cache,) = (tmp_path / "caches").glob("test-*")
    assert f"test: 24 rows + 1 failures = 25 inputs, sealed in {cache}" in answer.err
    (failure,) = map(json.loads, (cache / "failures.jsonl").read_text().splitlines())
    assert failure["id"] == "digit 1/broken.png"
    assert failure["reason"]


def test_images_that_stand_in_a_set_twice_are_said_and_listed(home, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(home / "images" / "test", images)
    first, second, *_ = sorted((images / "digit 1").iterdir())
    (images / "digit 2" / "wrong.png").write_bytes(first.read_bytes())
    (images / "digit 1" / "x.png").symlink_to(second)
    given = settings(f"work={tmp_path / 'work'}", f"cache.root={tmp_path / 'caches'}", f"sets.test.images={images}")
    said = done("extract", home / "tiny.toml", *given).err
    listed = tmp_path / "work" / "extract" / "test-same-bytes.jsonl"
    one, two = f"'digit 1/{first.name}'", f"'digit 1/{second.name}'"
    assert f"under another label ({one} (digit 1) = 'digit 2/wrong.png' (digit 2)): one of the two is wrong" in said
    assert f"test: 1 images have the bytes of another ({two} = 'digit 1/x.png'); all in {listed}" in said
    assert [json.loads(line)["id"] for line in listed.read_text().splitlines()] == [
        "digit 1/x.png",
        "digit 2/wrong.png",
    ]
    (images / "digit 2" / "wrong.png").unlink()
    (images / "digit 1" / "x.png").unlink()
    done("extract", home / "tiny.toml", *given)
    assert not listed.exists()


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("sets.photos.images=nowhere", "sets.photos.images: '{cwd}/nowhere': no such file or folder"),
        ("sets.photos.images={tmp}/empty", "sets.photos.images: {tmp}/empty: no images found"),
        ("sets.photos.images={tmp}/a.zip", "sets.photos.images: {tmp}/a.zip: not a source of images"),
        ("sets.photos.images=sklearn:faces", "sets.photos.images: sklearn:faces: no such embedded set"),
        (
            "sets.test.images=sklearn:digits[7]",
            "set 'test' has classes that id-train does not have: '7'; the first of ",
        ),
        ("backbone.name=resnet1", "backbone.name: timm has no model 'resnet1'"),
        ("backbone.name=vit_tiny_patch16_224", 'backbone.weights: "embedded" weights exist for'),
        ("backbone.weights={tmp}/no.safetensors", "backbone.weights: no file {tmp}/no.safetensors"),
        ("backbone.weights={tmp}/a.zip", "backbone.weights: a.zip does not hold weights"),
        ("cache.expert_blocks=7", "cache.expert_blocks: 7 given, tf_efficientnet_lite0 has 7: give at most 6"),
        ("score.k=0", "--set score.k: 0 given, must be greater than 0 or 'auto'"),
        ("score.scores=['energi']", "--set score.scores: \"energi\" is not a known score; did you mean 'energy'?"),
        ("work={tmp}/a.zip", "work: {tmp}/a.zip is a file, a folder is needed"),
        ("cache.root={tmp}/a.zip", "cache.root: {tmp}/a.zip is a file, a folder is needed"),
    ],
)
def test_refused_before_anything_is_done(setting, said, home, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"PK")
    places = {"tmp": tmp_path, "home": home, "cwd": os.getcwd()}
    study = settings(f"work={tmp_path / 'new'}", f"cache.root={tmp_path / 'caches'}", setting.format(**places))
    line = refused("run", home / "tiny.toml", *study)
    assert line.startswith(said.format(**places))
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "caches").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.experts=4", "train.experts: 4 experts for 3 classes: give at most 3"),
        ("train.grouping={tmp}/no.json", "train.grouping: {tmp}/no.json cannot be read"),
        ("train.grouping={tmp}/groups.json", "train.grouping: {tmp}/groups.json: 2 classes without a group"),
    ],
)
def test_training_settings_that_do_not_fit_the_data(setting, said, tiny, tmp_path):
    (tmp_path / "groups.json").write_text('{"digit 0": 0}')
    line = refused("train", *tiny, "--set", setting.format(tmp=tmp_path))
    assert line.startswith(said.format(tmp=tmp_path))


# --------------------------------------------------------------------------------------------- damage and interrupts


def test_verify_says_all_that_is_damaged_and_repair_puts_it_right(nothing, caches):
    done("extract", *nothing)
    train, test = (next(caches.glob(f"{name}-*")) for name in ("train", "test"))
    manifest, shard = train / "manifest.json", test / "shard-00000.h5"
    wholes = [path.read_bytes() for path in (manifest, shard)]
    manifest.write_text("{}")
    shard.write_bytes(wholes[1][:-1])
    answer = pipeline("verify", *nothing)
    assert answer.status == 1
    assert f"{manifest}" in answer.out
    assert f"{shard}: has {len(wholes[1]) - 1} bytes, must have {len(wholes[1])}" in answer.out
    assert answer.out.count(": whole, ") == 2
    assert answer.err == "error: 2 damaged files: verify --repair makes damaged shards again\n"
    done("verify", *nothing, "--repair")
    assert [path.read_bytes() for path in (manifest, shard)] == wholes
    assert done("verify", *nothing).out.count(": whole, ") == 4


def test_a_cache_that_two_sets_share_is_verified_once(nothing, caches, home):
    same = settings(f"sets.photos.images={home / 'images' / 'threes'}")
    done("extract", *nothing, *same)
    assert done("verify", *nothing, *same).out.count(": whole, ") == 3


def test_verify_says_what_repair_cannot_heal(nothing, caches):
    done("extract", *nothing)
    train = next(caches.glob("train-*"))
    for name in ("manifest.json", "manifest.copy.json"):
        (train / name).write_text("{}")
    answer = pipeline("verify", *nothing, "--repair")
    assert answer.status == 1
    assert f"{train}" in answer.out
    assert answer.err.endswith("error: 1 damaged files: delete these caches, run make extract\n")
    shutil.rmtree(train)
    done("extract", *nothing)
    assert done("verify", *nothing).out.count(": whole, ") == 4


def test_images_that_change_are_extracted_again_and_nothing_else(home, tmp_path):
    shutil.copytree(home / "images" / "train", tmp_path / "images")
    study = [
        home / "tiny.toml",
        *settings(f"work={tmp_path / 'work'}", f"cache.root={tmp_path / 'c'}", f"sets.train.images={tmp_path}/images"),
    ]
    assert "train: leave-one-out 5-NN accuracy of cls" in done("extract", *study).err
    first, *_, last = sorted((tmp_path / "images").rglob("*.png"))
    first.write_bytes(last.read_bytes())
    answer = done("extract", *study, "--dry-run")
    assert "1 changed since " in answer.out
    assert "would extract 1, take over the others" in answer.out
    answer = done("extract", *study)
    assert "train: 1 changed since " in answer.err
    assert "1 of 96 images to extract, the others are taken over" in answer.err
    assert "extract pretrained: 1 of 4 sets extracted" in answer.out
    kept = last.stat()
    last.write_bytes(sorted((tmp_path / "images").rglob("*.png"))[5].read_bytes().ljust(kept.st_size, b"\0"))
    os.truncate(last, kept.st_size)
    os.utime(last, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # behind size and time
    assert "extract pretrained: fresh" in done("extract", *study).out
    assert "extract pretrained: 1 of 4 sets extracted" in done("extract", *study, "--rehash", "--max-failures=1").out


def test_two_runs_on_one_cache(home, tmp_path):
    """The second says who fills it; when that one is killed, it goes on where it was."""
    study = [str(home / "tiny.toml"), *settings(f"work={tmp_path / 'work'}", f"cache.root={tmp_path / 'caches'}")]
    study += settings("sets.train.images=sklearn:digits[0-2]", "sets.test.images=sklearn:digits[0-2]")
    first = Running("extract", *study)
    while not list(tmp_path.glob("caches/train-*/plan.json")):
        assert first.is_running()
        time.sleep(0.01)
    first.send(signal.SIGSTOP)
    second = pipeline("extract", *study)
    first.send(signal.SIGKILL)
    assert first.finish().status == -signal.SIGKILL
    assert second.status == 1
    assert f"is being filled by process {first.pid} on " in second.err
    assert "wait for it, or stop it" in second.err
    done("extract", *study)


def test_repair_of_images_that_have_changed(home, tmp_path):
    shutil.copytree(home / "images" / "train", tmp_path / "images")
    study = [
        home / "tiny.toml",
        *settings(f"work={tmp_path / 'work'}", f"cache.root={tmp_path / 'c'}", f"sets.train.images={tmp_path}/images"),
    ]
    done("extract", *study)
    shard = next((tmp_path / "c").glob("train-*")) / "shard-00000.h5"
    damaged = shard.read_bytes()[:-1]
    shard.write_bytes(damaged)
    next((tmp_path / "images").rglob("*.png")).unlink()
    answer = pipeline("verify", *study, "--repair")
    assert answer.status == 2
    assert "does not hold the images any more that it was made from" in answer.err
    assert shard.read_bytes() == damaged
    assert "extract pretrained: 1 of 4 sets extracted" in done("extract", *study).out
    assert done("verify", *study).out.count(": whole, ") == 4


def test_interrupted_extract_goes_on(home, tmp_path):
    """SIGINT while the second set is being made: 130, one line, and the first set is kept."""
    study = [str(home / "tiny.toml"), *settings(f"work={tmp_path / 'work'}", f"cache.root={tmp_path / 'caches'}")]
    study += settings("sets.train.images=sklearn:digits[0-2]", "sets.test.images=sklearn:digits[1-2]")
    process = Running("extract", *study)
    for line in process.err:
        if line.startswith("extract test: "):
            process.send(signal.SIGINT)
            break
    answer = process.finish()
    assert answer.status == 130
    assert answer.err.splitlines()[-1] == "interrupted; what is finished is kept: the same command goes on where it was"
    assert "Traceback" not in answer.err
    record = json.loads((tmp_path / "work" / "record.json").read_text())
    assert record["stages"]["extract pretrained"]["status"] == "interrupted"
    kept = snapshot(next((tmp_path / "caches").glob("train-*")))
    assert kept
    answer = done("extract", *study)
    assert "extract pretrained: 3 of 4 sets extracted" in answer.out
    assert snapshot(next((tmp_path / "caches").glob("train-*"))) == kept
    assert done("verify", *study).out.count(": whole, ") == 4
