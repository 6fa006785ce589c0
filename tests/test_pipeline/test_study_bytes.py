"""What is derived is named by the bytes that it was derived from: nothing stale is used in silence.

A study of small features is run once. Then bytes change, classes are renamed, folders move, a training ends in other
bits, and every verb makes again what follows, or refuses; what it gives is what a study from scratch gives.
"""

import csv
import io
import json
import os
import re
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from cache import CacheBuilder, FeatureCache, FeatureSpec, InputSet, InputTable, commit_shard, file_sha256, plan_shards
from stages.files.documents import read_document, write_document
from tests.test_pipeline.command import Running, done, pipeline, refused, settings, snapshot
from tests.test_pipeline.tiny import ID_SETS
from tests.test_pipeline.tiny import draw as draw_images

STUDY = """
name = "bytes"
work = "work"

[[sets]]
name = "train"
role = "id-train"
features = "train.npz"
origin = "drawn"

[[sets]]
name = "test"
role = "id-test"
features = "test.npz"
origin = "drawn"

[[sets]]
name = "near"
role = "near-ood"
features = "near.npz"
origin = "drawn"

[train]
experts = 2
epochs = 2

[score]
scores = ["energy", "knn"]
k = 5
bootstrap = 100
"""
CLASSES = ("0", "1", "2")
MIXTURE = Path("work", "model", "pretrained", "default", "seed-0")
RESULTS = ("table.csv", "summary.csv", "id.json", "thresholds.json")


def draw(folder, classes=CLASSES):
    """Three classes of 40 rows, and OOD rows between them."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    means = 2 * rng.normal(size=(3, 24))
    for name, n, spread in (("train", 40, 1.0), ("test", 12, 1.0), ("near", 12, 2.0)):
        cls = means.repeat(n, 0) + spread * rng.normal(size=(3 * n, 24))
        label = {} if name == "near" else {"label": np.array(classes).repeat(n)}
        np.savez(folder / f"{name}.npz", cls=cls.astype(np.float32), **label)
    (folder / "study.toml").write_text(STUDY)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The study, run once. Everybody's: copy what you change."""
    home = draw(tmp_path_factory.mktemp("bytes") / "home")
    done("run", home / "study.toml")
    return home


@pytest.fixture
def home(whole, tmp_path):
    """A copy of the whole study, files of features and all, which may be changed."""
    return Path(shutil.copytree(whole, tmp_path / "home"))


@pytest.fixture(scope="module")
def expected(whole, tmp_path_factory):
    """Results by another k, and decisions about the test rows, as the whole study gives them."""
    home = shutil.copytree(whole, tmp_path_factory.mktemp("expected") / "home")
    return results_by_another_k(home), decisions(home)


def results(home):
    return {name: (home / "work" / "scores" / name).read_bytes() for name in RESULTS}


def results_by_another_k(home):
    done("score", home / "study.toml", *settings("score.k=3"))
    return results(home)


def decisions(home):
    out = done("predict", home / "study.toml", home / "test.npz").out
    return [{**row, "path": Path(row["path"]).name} for row in csv.DictReader(io.StringIO(out))]


def flip(path, share):
    """Another byte in a file, of the same size and time."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[min(int(share * len(content)), len(content) - 1)] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# ------------------------------------------------------------------------------------------------- a byte that changed

STORED = (
    "cache/train-*/shard-00000.h5",
    "cache/train-*/inputs.parquet",
    "cache/train-*/manifest.json",
    "cache/test-*/shard-00000.h5",
    "extract/pretrained.json",
    "model/pretrained/probe/probe.json",
    "model/pretrained/probe/probe.safetensors",
    "model/pretrained/default/seed-0/mofe.json",
    "model/pretrained/default/seed-0/mofe.safetensors",
    "model/pretrained/default/seed-0/heads.json",
    "model/pretrained/default/seed-0/heads.safetensors",
    "model/pretrained/default/seed-0/refined/final/id-train.json",
    "model/pretrained/default/seed-0/refined/final/id-train.safetensors",
    "model/pretrained/default/seed-0/refined/final/sets/test.safetensors",
    "model/pretrained/default/seed-0/refined/final/sets/near.json",
    "model/pretrained/default/seed-0/refined/final/oracle/test.safetensors",
    "scores/neighbours/*/*.safetensors",
)


SHARES = (0.1, 0.6, 1.0)  # of a file's bytes before the one that changes


def pytest_generate_tests(metafunc):
    """Every file once, each at another share than the one before; with more mutants, at all of them."""
    if "stored" in metafunc.fixturenames:
        pairs = [(name, SHARES[(row + turn) % 3]) for turn in range(3) for row, name in enumerate(STORED)]
        n = max(len(STORED), metafunc.config.getoption("mutants") // 30)
        metafunc.parametrize(("stored", "share"), pairs[:n])


def test_a_changed_byte_is_made_again_or_refused(stored, share, home, expected):
    """Scores by another k and decisions are those of the whole study, or there are none."""
    paths = sorted((home / "work").glob(stored))
    assert paths
    for path in paths:
        flip(path, share)
    scored = pipeline("score", home / "study.toml", *settings("score.k=3"))
    predicted = pipeline("predict", home / "study.toml", home / "test.npz")
    for answer in (scored, predicted):
        assert answer.status in (0, 1, 2)
        assert "unexpected" not in answer.err
    if scored.status == 0:
        assert results(home) == expected[0]
    else:
        assert re.search(r"run make (train|extract)|run verify|verify --repair", scored.err), scored.err
    if predicted.status == 0:
        rows = list(csv.DictReader(io.StringIO(predicted.out)))
        assert [{**row, "path": Path(row["path"]).name} for row in rows] == expected[1]


def test_every_file_of_models_and_scores_is_watched(home):
    """`verify` names it, whichever it is, and no other."""
    files = [path for name in ("model", "scores", "cache") for path in (home / "work" / name).rglob("*")]
    # Those of neighbours watch themselves; an empty one (no failures) has no byte to change.
    watched = [path for path in files if path.is_file() and "neighbours" not in path.parts and path.stat().st_size]
    assert len(watched) > 30
    assert done("verify", home / "study.toml").out.count(": whole, ") == 3
    for path in watched:
        before = path.read_bytes()
        flip(path, 0.5)
        answer = pipeline("verify", home / "study.toml")
        assert answer.status == 1
        assert str(path) in answer.out
        path.write_bytes(before)
    done("verify", home / "study.toml")


@pytest.mark.parametrize("name", ["table.json", "summary.csv", "thresholds.json", "samples"])
def test_changed_results_are_not_shown(name, home):
    path = home / "work" / "scores" / name
    path = next(path.iterdir()) if path.is_dir() else path
    before = path.read_bytes()
    flip(path, 0.5)
    assert refused("report", home / "study.toml").endswith(f"{path} is not as it was left: run make score")
    done("score", home / "study.toml")
    assert path.read_bytes() == before
    done("report", home / "study.toml")


def test_a_report_that_is_up_to_date_is_left_as_it_is(home):
    page = home / "work" / "report" / "index.html"
    done("run", home / "study.toml")  # the page shows where the study is, which is elsewhere in this copy
    assert f"report: fresh, {page}" in done("run", home / "study.toml").out
    before = snapshot(home / "work" / "report")
    assert f"report: fresh, {page}" in done("report", home / "study.toml").out
    assert f"report: fresh, {page}" in done("report", home / "study.toml", "--dry-run").out
    assert snapshot(home / "work" / "report") == before
    flip(page, 0.5)
    assert f"report: {page}" in done("report", home / "study.toml").out
    log = home / MIXTURE / "metrics.jsonl"
    flip(log, 0.5)  # which the page shows
    assert f"report: {page}" in done("report", home / "study.toml").out
    assert "epoch" not in page.read_text("utf-8").partition('id="training"')[2].partition("</section>")[0]


def test_a_report_that_is_lost_is_made_again_without_the_other_stages(home):
    shutil.rmtree(home / "work" / "report")
    page, answer = home / "work" / "report" / "index.html", done("report", home / "study.toml")
    assert answer.out.endswith(f"\nreport: {page}\n")
    assert "energy" in answer.out  # the table stands before it
    assert "near" in page.read_text("utf-8")


def test_a_lost_probe_is_fitted_by_those_who_use_it_and_not_by_those_who_only_look(home):
    probe = home / "work" / "model" / "pretrained" / "probe"
    before = {path.name: path.read_bytes() for path in probe.iterdir()}
    shutil.rmtree(probe)
    assert done("score", home / "study.toml", "--dry-run").out.startswith("score: would")
    assert "holds no whole linear probe" in done("report", home / "study.toml").err
    assert not probe.exists()
    done("score", home / "study.toml")
    assert {path.name: path.read_bytes() for path in probe.iterdir()} == before


# ------------------------------------------------------------------------------------------ other bits, other names


@contextmanager
def other_last_bits():
    """After each step of a training one weight is the next number above what it should be."""

    def next_above(optimizer, *_):
        weight = optimizer.param_groups[0]["params"][0].data
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(torch.inf))

    hook = register_optimizer_step_post_hook(next_above)
    try:
        yield
    finally:
        hook.remove()


# Rows as easy as these leave nothing to be learnt where heads and router start as the probe, and that start is kept.
TRAINED = settings("train.preset=zero")


def test_a_training_that_ends_in_other_bits_makes_all_that_follows_anew(home, tmp_path):
    """The same settings, and the last bit of a weight is another, as by the kernels of an older CPU."""
    for verb in ("train", "score"):
        done(verb, home / "study.toml", *TRAINED)
    (home / MIXTURE / "heads.json").unlink()
    before = file_sha256(home / MIXTURE / "mofe.safetensors")
    with other_last_bits():
        done("train", home / "study.toml", *TRAINED)
    assert file_sha256(home / MIXTURE / "mofe.safetensors") != before
    assert done("score", home / "study.toml", "--dry-run", *TRAINED).out.startswith("score: would")
    assert "the scores are of other models" in done("report", home / "study.toml", *TRAINED).err
    done("score", home / "study.toml", *TRAINED)
    again = Path(shutil.copytree(home, tmp_path / "again"))
    shutil.rmtree(again / "work" / "scores")
    for name in ("sets", "oracle"):
        shutil.rmtree(again / MIXTURE / "refined" / "final" / name)
    done("score", again / "study.toml", *TRAINED)
    assert results(again) == results(home)


def test_weights_of_another_training_do_not_pass_for_these(home, tmp_path):
    other = [*TRAINED, *settings(f"work={tmp_path / 'other'}", f"cache.root={home / 'work' / 'cache'}")]
    done("extract", home / "study.toml", *other)
    done("train", home / "study.toml", *other)
    weights = tmp_path / "other" / MIXTURE.relative_to("work") / "mofe.safetensors"
    shutil.copy2(weights, home / MIXTURE)
    for arguments in (["score"], ["predict"]):
        paths = [home / "test.npz"] if arguments == ["predict"] else []
        assert refused(*arguments, home / "study.toml", *paths).endswith("or not whole: run make train")


def test_renamed_classes_are_other_classes(home, tmp_path):
    """0, 1, 2 to 0, 5, 9: no number, no feature and no row is another, only what people read."""
    draw(home, ("0", "5", "9"))
    done("extract", home / "study.toml")
    for arguments in (["score", home / "study.toml"], ["predict", home / "study.toml", home / "test.npz"]):
        assert refused(*arguments).endswith("run make train")
    for verb in ("train", "score"):
        done(verb, home / "study.toml")
    assert {row["prediction"] for row in decisions(home)} == {"0", "5", "9"}
    groups = json.loads((home / MIXTURE / "mofe.json").read_text())["groups"]
    assert set(groups) == {"0", "5", "9"}
    new = draw(tmp_path / "new", ("0", "5", "9"))
    for verb in ("extract", "train", "score"):
        done(verb, new / "study.toml")
    assert results(new) == results(home)


def test_a_file_of_features_that_changed_is_said(home):
    assert "has changed" not in done("score", home / "study.toml", *settings("score.k=4")).err
    os.utime(home / "near.npz")
    for verb, said in (("train", 0), ("score", 1)):  # which reads no OOD set, which does
        err = done(verb, home / "study.toml").err
        assert err.count(f"sets.near.features: {home / 'near.npz'} has changed since it was extracted") == said
    assert "fresh" in done("extract", home / "study.toml").out  # its bytes are the same
    assert "has changed" not in done("score", home / "study.toml").err


# ------------------------------------------------------------------------------------------------------ other places


@pytest.mark.parametrize("beside", [False, True])
def test_a_study_that_was_moved_as_a_whole_is_found_again(beside, home, tmp_path):
    """Work, caches (below it or beside it), files of features and the experiment file."""
    if beside:
        (home / "study.toml").write_text(STUDY + '\n[cache]\nroot = "caches"\n')
        (home / "work" / "cache").rename(home / "caches")
    done("run", home / "study.toml")
    (tmp_path / "far" / "away").mkdir(parents=True)
    home = home.rename(tmp_path / "far" / "away" / "there")
    before = snapshot(home / "work" / "model", home / "work" / "scores")
    plan = done("run", home / "study.toml", "--dry-run").out
    assert "would" not in plan
    for verb in ("extract", "train", "score", "report", "verify", "info"):
        done(verb, home / "study.toml")
    assert len(decisions(home)) == 36
    assert snapshot(home / "work" / "model", home / "work" / "scores") == before


def test_caches_alone_that_were_moved_are_found_where_the_file_says(home, tmp_path):
    (home / "work" / "cache").rename(tmp_path / "caches")
    done("score", home / "study.toml", *settings(f"cache.root={tmp_path / 'caches'}", "score.k=4"))


def test_what_systems_leave_is_ignored_and_named(home):
    cache = next((home / "work" / "cache").glob("train-*"))
    left = [cache / ".DS_Store", cache / ".nfs000000a1", cache / "Thumbs.db", cache / "._shard-00000.h5"]
    left += [home / MIXTURE / "._mofe.json", home / MIXTURE / ".DS_Store"]
    left += [home / "work" / "scores" / "samples" / "._a.parquet", home / "work" / ".DS_Store"]
    (home / MIXTURE.parent / "seed-0 copy").mkdir()
    left.append(home / MIXTURE.parent / "seed-0 copy" / "metrics.jsonl")
    for path in left:
        path.write_bytes(b"\0left")
    done("run", home / "study.toml")
    said = done("verify", home / "study.toml").out
    for path in left[:6]:
        assert f"{path}: not part of the {'cache' if path.parent == cache else 'study'}, ignored" in said
    assert said.count(": whole, ") == 3
    assert "Thumbs.db: not part of the cache, ignored" in done("verify", cache).out
    (cache / "notes.txt").write_text("mine")  # nothing that a system leaves
    assert "notes.txt: is not part of the cache" in pipeline("verify", cache).out


# ------------------------------------------------------------------------------------------------- a GPU's features

IMAGES = (
    ID_SETS.replace('root = "caches"', 'root = "caches"\npatches = "none"')
    + """
[[sets]]
name = "near"
role = "near-ood"
images = "images/near"

[train]
experts = 2
epochs = 1
expert = "adapter"

[score]
scores = ["energy", "knn"]
k = 5
bootstrap = 100
"""
)


@pytest.fixture
def extracted_on_a_gpu(tmp_path):
    """A study whose caches say that their features were made on CUDA, as those of a machine with a GPU do."""
    draw_images(tmp_path / "images" / "train", "sklearn:digits[0-1]/train", 32)
    draw_images(tmp_path / "images" / "test", "sklearn:digits[0-1]/test", 6)
    draw_images(tmp_path / "images" / "near", "sklearn:digits[3]/test", 8, nested=False)
    (tmp_path / "study.toml").write_text(IMAGES)
    done("extract", tmp_path / "study.toml")
    for path in list((tmp_path / "caches").iterdir()):
        made_on_cuda(FeatureCache.open(path))
        shutil.rmtree(path)
    link = tmp_path / "work" / "extract" / "pretrained.json"
    about = read_document(link)
    about["spec"]["compute"]["device"] = "cuda"
    spec = FeatureSpec.from_dict(about["spec"])
    for name, entry in about["sets"].items():
        entry["path"] = f"../caches/{name}-{spec.fingerprint:.8}"
    write_document(link, about)
    return tmp_path


def made_on_cuda(cache):
    """The same features in a cache whose spec says so."""
    spec = replace(cache.spec, compute=cache.spec.compute | {"device": "cuda"})
    inputs, name = cache.inputs(), cache.manifest.dataset
    listing = InputTable.listing(inputs.ids, inputs.labels, inputs.sizes, inputs.mtimes_ns)
    plans = plan_shards(len(inputs), spec.row_bytes)
    path = cache.path.with_name(f"{name}-{spec.fingerprint:.8}")
    with CacheBuilder.begin(path, InputSet(name, listing, cache.class_names), spec, plans, {}) as builder:
        (plan,) = builder.pending()
        commit_shard(path, plan, {key: cache.read(key) for key in spec.datasets()}, inputs, [])
        builder.seal()


def test_features_of_a_gpu_are_used_without_one(extracted_on_a_gpu):
    home = extracted_on_a_gpu
    for verb in ("train", "score", "report", "run", "verify", "info"):
        done(verb, home / "study.toml")
    assert "extract pretrained: fresh" in done("extract", home / "study.toml").out
    answer = done("predict", home / "study.toml", home / "images" / "test")
    assert (
        "the study's features were made on cuda, those of the new images are made on cpu: they are equal to a tol"
        in (answer.err)
    )
    assert answer.out.count("\n") == 1 + 12
    next((home / "images" / "near").iterdir()).unlink()
    line = refused("extract", home / "study.toml")
    assert (
        "set 'near' is not extracted yet, or of other images, and the features of this study are of device \"cuda\""
        in (line)
    )
    (next((home / "caches").glob("test-*")) / "shard-00000.h5").write_bytes(b"damaged")
    line = pipeline("verify", home / "study.toml", "--repair").err.splitlines()[-1]
    assert line.endswith(
        "made on cuda; made on cpu, as here, its features would be others: repair it on a machine with cuda"
    )


# -------------------------------------------------------------------------------------------------- two at one study


def test_the_second_of_two_runs_says_who_is_at_it(home):
    """A training that goes on, in another process, until it is killed."""
    long = ["train", home / "study.toml", *settings("train.epochs=100000", "train.warmup_epochs=1")]
    other = Running(*long)
    try:
        lock = home / "work" / "study.lock"
        while not (lock.is_file() and lock.read_bytes()):
            assert other.is_running()
            time.sleep(0.05)
        for verb in ("train", "score", "run"):
            answer = pipeline(verb, home / "study.toml")
            assert answer.status == 1
            said = answer.err.splitlines()[-1]
            assert f"study is being trained or scored by process {other.pid} on " in said
            assert re.search(r" since \d{4}-\d\d-\d\dT\S+; wait for it, or stop it$", said)
        done("report", home / "study.toml")  # which reads
    finally:
        other.send(signal.SIGKILL)
        other.finish()
    done("train", home / "study.toml")
    done("score", home / "study.toml")
    assert not lock.exists()
