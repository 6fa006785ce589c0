"""Stage one: every image is a row or a listed failure, nothing is done twice, and the bits depend on nothing else."""

import hashlib
import shutil
import signal
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from cache import CacheError, CacheMismatchError, FeatureCache
from stages.config import BackboneConfig
from stages.errors import StageError
from stages.extract import ExtractOptions, extract_set, made_with, repair_set
from stages.extraction.changes import compare_versions
from stages.inputs.images import ImageReader, decode_image, list_images
from stages.networks.backbone import Backbone
from tests.test_stages.drawn import create
from tests.test_stages.slow_extraction import WaitsAfterEveryBatch, small_shards
from tests.test_stages.test_extraction.digits import (
    BROKEN,
    Notes,
    StopsAfter,
    counting,
    extract,
    files,
    not_needed,
    write,
    write_images,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images, backbone, tmp_path_factory):
    return extract(images, tmp_path_factory.mktemp("whole"), backbone)


@pytest.fixture(scope="module")
def sharded(images, backbone, tmp_path_factory):
    return small_shards(backbone, images, tmp_path_factory.mktemp("sharded"), max_failures=1.0)


def test_every_input_is_a_row_or_a_listed_failure(images, whole):
    names = sorted(str(path.relative_to(images)) for path in images.glob("*/*"))
    assert whole.inputs().ids == tuple(names)
    assert whole.ids.tolist() == [name for name in names if name not in BROKEN]
    assert [failure.id for failure in whole.failures()] == sorted(BROKEN)
    assert all(failure.reason for failure in whole.failures())
    assert whole.n_rows + len(whole.failures()) == len(names)
    assert (whole.path / "failures.jsonl").read_text().count("\n") == 3
    assert [whole.class_names[label] for label in whole.labels] == [name[0] for name in whole.ids]
    digests = [hashlib.sha256((images / name).read_bytes()).digest() for name in whole.ids]
    assert [row.tobytes() for row in whole.image_hashes] == digests
    assert whole.verify() == []


def test_cached_rows_are_what_the_backbone_says_of_each_image(images, whole, backbone):
    """Image by image, without batches, padding and shards."""
    for row in range(0, whole.n_rows, 5):
        image = decode_image((images / str(whole.ids[row])).read_bytes())
        live = backbone.encode(backbone.transform(image)[None])
        for name in ("cls", "tap_cls", "patches"):
            expected = getattr(live, name)[0].numpy()
            cached = whole.read(name, np.array([row]))[0]
            assert cached.dtype == np.float16
            np.testing.assert_allclose(cached, expected, rtol=2**-11, atol=1e-4, err_msg=f"{name} of row {row}")


def test_a_second_run_does_nothing(images, whole, backbone, monkeypatch):
    monkeypatch.setattr(ImageReader, "read", None)  # no image is opened
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in whole.path.iterdir()}
    spec = backbone.feature_spec("float16", "full")
    again = extract_set(
        "digits",
        list_images(str(images)),
        spec,
        whole.path.parent,
        not_needed,
        options=ExtractOptions(max_failures=0.0),
    )
    assert again.path == whole.path
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in whole.path.iterdir()} == before


def test_killed_and_resumed_gives_the_same_bytes(images, sharded, backbone, tmp_path, monkeypatch):
    fork = get_context("fork")
    here, there = fork.Pipe()
    waits = {"progress": WaitsAfterEveryBatch(there)}
    process = fork.Process(target=small_shards, args=(backbone, images, tmp_path), kwargs=waits)
    process.start()
    for _ in range(2):  # it has begun; the first shard is done
        assert here.poll(60)
        assert here.recv() is not None
        here.send(None)
    assert here.poll(60)  # a batch: now it stands in the midst of the second shard
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (unfinished,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert not (unfinished / "manifest.json").exists()
    assert [path.name for path in unfinished.glob("shard-*.h5")] == ["shard-00000.h5"]

    batches = counting(backbone, monkeypatch)
    resumed = small_shards(backbone, images, tmp_path, max_failures=1.0)
    assert len(batches) == 2  # what was done is not done again
    assert resumed.path == unfinished
    assert files(resumed.path) == files(sharded.path)


def test_too_many_failures_keep_the_work(images, whole, backbone, tmp_path):
    with pytest.raises(StageError, match=r"digits: 3 of 40 images .*--max-failures 0\.05.*0/0000-notes\.png"):
        extract(images, tmp_path, backbone, max_failures=0.05)
    assert compare_versions("digits", list_images(str(images)), whole.spec, tmp_path) is None
    samples = list_images(str(images))
    sealed = extract_set(
        "digits", samples, whole.spec, tmp_path, not_needed, options=ExtractOptions(max_failures=0.075)
    )  # 3 of 40 is allowed
    assert files(sealed.path) == files(whole.path)


def test_interrupted_it_finishes_what_it_computes_and_says_how_far_it_is(images, backbone, tmp_path):
    progress = StopsAfter(2)
    with pytest.raises(KeyboardInterrupt):
        small_shards(backbone, images, tmp_path, progress=progress)
    (path,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert progress.lines == [f"digits: stopped after 32 of 40 images; finished shards are kept in {path}"]
    assert [file.name for file in sorted(path.glob("shard-*.h5"))] == ["shard-00000.h5", "shard-00001.h5"]
    assert not (tmp_path / f"{path.name}.lock").exists()


def test_going_on_with_other_versions_is_said(images, backbone, tmp_path, monkeypatch):
    now = made_with() | {"torch": "9.0"}
    with pytest.raises(KeyboardInterrupt):
        small_shards(backbone, images, tmp_path, progress=StopsAfter(2))
    monkeypatch.setattr("stages.extract.made_with", lambda: now)
    progress = Notes()
    cache = small_shards(backbone, images, tmp_path, progress=progress, max_failures=1.0)
    assert progress.lines[1].startswith("digits: going on with torch 9.0 what was begun with torch 2")
    assert cache.manifest.made_with["resumed_with"] == [now]


@pytest.mark.parametrize("damaged", ["shard-00000.h5", "shard-00002.h5", "inputs.parquet", "failures.jsonl"])
@pytest.mark.parametrize("how", ["a bit is flipped", "it is gone"])
def test_tampering_is_found_and_repaired_to_the_same_bytes(images, sharded, backbone, tmp_path, damaged, how):
    cache = FeatureCache.open(shutil.copytree(sharded.path, tmp_path / sharded.path.name))
    path = cache.path / damaged
    if how == "it is gone":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert [damage.file for damage in cache.verify()] == [damaged]
    repaired = repair_set(cache, [damaged], list_images(str(images)), lambda: backbone)
    assert repaired.verify() == []
    assert files(repaired.path) == files(sharded.path)


def test_other_images_repair_nothing(images, sharded, backbone, tmp_path):
    mine = shutil.copytree(images, tmp_path / "images")
    cache = FeatureCache.open(shutil.copytree(sharded.path, tmp_path / sharded.path.name))
    (cache.path / "inputs.parquet").unlink()
    (mine / "0/0000-notes.png").unlink()
    with pytest.raises(CacheMismatchError, match="40 inputs, 39 "):
        repair_set(cache, ["inputs.parquet"], list_images(str(mine)), lambda: backbone)


@pytest.mark.parametrize(("patches", "kept"), [("none", 0), ("pool:1", 1)])
def test_fewer_patches_leave_the_rest_as_it_is(images, whole, backbone, tmp_path, patches, kept):
    cache = extract(images, tmp_path, backbone, spec=backbone.feature_spec("float16", patches))
    np.testing.assert_array_equal(cache.read("cls"), whole.read("cls"))
    if kept:
        expected = whole.read("patches").astype(np.float32).mean(1)
        np.testing.assert_allclose(cache.read("patches")[:, 0], expected, rtol=1e-2, atol=1e-3)
    assert ("patches" in cache.spec.datasets()) == bool(kept)


def test_a_set_without_a_usable_image_is_sealed_where_that_is_allowed(images, backbone, tmp_path):
    only = tmp_path / "only"
    write(only / "0" / "notes.png", b"no image at all")
    cache = extract(only, tmp_path, backbone)
    assert (cache.n_rows, len(cache.failures())) == (0, 1)
    assert cache.read("cls").shape == (0, backbone.dim)


def test_features_that_float16_cannot_hold_are_never_stored(images, tmp_path):
    """Weights as some networks have them: their maps reach beyond 65,504."""
    model = create("test_efficientnet")
    with torch.no_grad():
        model.bn2.weight *= 1e7
    large = Backbone(model, BackboneConfig(name="test_efficientnet", image_size=48))
    with pytest.raises(CacheError, match=r'cls of .*: inf: too large for float16.*set cache.dtype = "float32"'):
        extract(images, tmp_path, large)
    assert not list(tmp_path.glob("*/shard-*.h5"))
    cache = extract(images, tmp_path, large, spec=large.feature_spec("float32", "full"))
    assert cache.read("cls").max() > 65504
