"""A study whose images and caches are in an object store: every verb, and the bytes that it gives from a disk."""

import shutil

import numpy as np
import pytest

from cache import FeatureCache, RemotePath, find_caches
from tests.object_store import BUCKET
from tests.test_pipeline.command import done, pipeline, refused, settings
from tests.test_pipeline.tiny import ADAPTERS, by_network, draw

URL = f"s3://{BUCKET}/study"


@pytest.fixture(scope="module")
def studies(object_store, vit, tmp_path_factory):
    """The same study of the same images twice: of a folder, and of the store."""
    folder = tmp_path_factory.mktemp("studies")
    draw(folder / "images/train", "sklearn:digits[0-1]/train", 10)
    draw(folder / "images/test", "sklearn:digits[0-1]/test", 4)
    draw(folder / "images/threes", "sklearn:digits[3]/test", 8, nested=False)
    draw(folder / "images/photos", "sklearn:photos", 4, nested=False)
    local = by_network(vit, ADAPTERS).replace('"images/photos.tar"', '"images/photos"')
    (folder / "local.toml").write_text(local)
    remote = local.replace('root = "caches"', f'root = "{URL}/caches"').replace('"images/', f'"{URL}/images/')
    (folder / "remote.toml").write_text(remote.replace('work = "work"', 'work = "remote"'))
    for path in (folder / "images").rglob("*.png"):
        (RemotePath(URL) / str(path.relative_to(folder))).write_bytes(path.read_bytes())
    for verb in ("extract", "train", "score"):
        done(verb, folder / "local.toml")
        done(verb, folder / "remote.toml")
    return folder


def caches(root):
    """Sealed caches below a root by the names of their sets."""
    paths = root.folders() if isinstance(root, RemotePath) else root.iterdir()
    found = map(FeatureCache.open, paths)
    return {cache.manifest.dataset: cache for cache in found}


def test_it_gives_what_a_folder_gives(studies):
    here, there = caches(studies / "caches"), caches(RemotePath(f"{URL}/caches"))
    assert here.keys() == there.keys()
    for name, cache in here.items():
        assert (cache.fingerprint, cache.identity, cache.digest) == (
            there[name].fingerprint, there[name].identity, there[name].digest,
        )  # fmt: skip
        assert np.array_equal(cache.read("patches"), there[name].read("patches"))
    assert (studies / "remote/scores/table.csv").read_bytes() == (studies / "work/scores/table.csv").read_bytes()


def test_nothing_of_credentials_or_endpoints_is_written(studies, object_store):
    written = b"".join(path.read_bytes() for path in (studies / "remote").rglob("*") if path.is_file())
    assert b"127.0.0.1" not in written
    assert b"AWS_" not in written
    assert f"{URL}/caches".encode() in written


def test_all_is_fresh_and_whole(studies):
    study = studies / "remote.toml"
    assert "fresh" in done("extract", study).out
    assert done("verify", study).out.count(": whole, ") == 4
    train = caches(RemotePath(f"{URL}/caches"))["train"]
    assert f"cache      {URL}/caches/train-" in done("info", study).out
    assert "20 rows + 0 failures" in done("info", train.path).out
    assert "whole, 20 rows" in done("verify", train.path).out
    assert "fresh" in done("extract", study, "--dry-run").out


def test_new_images_of_a_store_are_scored(studies):
    here = done("predict", studies / "local.toml", studies / "images/threes", "--format", "csv").out
    there = done("predict", studies / "remote.toml", f"{URL}/images/threes", "--format", "csv").out
    assert there.replace(URL, str(studies)) == here


def test_a_damaged_shard_is_made_again(studies, tmp_path):
    study = [studies / "remote.toml", *settings(f"work={shutil.copytree(studies / 'remote', tmp_path / 'work')}")]
    cache = caches(RemotePath(f"{URL}/caches"))["threes"]
    shard = cache.path / cache.manifest.shards[0].name
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"?")
    assert pipeline("verify", *study).status == 1
    assert "repaired" in done("verify", *study, "--repair").out
    assert shard.read_bytes() == whole


def test_a_store_that_is_not_there_is_refused_before_any_work(studies):
    study = studies / "remote.toml"
    answer = pipeline("extract", study, *settings("cache.root=s3://nowhere/caches"))
    assert (answer.status, answer.out) == (1, "")
    assert answer.err == "error: s3://nowhere: no such bucket; make it, or look at its name\n"
    assert "s3://nowhere: no such bucket" in refused("extract", study, *settings("sets.train.images=s3://nowhere/a"))
    assert "cache.root: gs://bucket/caches: not the URL" in refused(
        "info", study, *settings("cache.root=gs://bucket/caches")
    )
    assert 'work: "s3://bucket/work" given, must be a path of this machine' in refused(
        "info", study, *settings("work=s3://bucket/work")
    )


def test_a_cache_without_a_study_goes_to_a_store(studies):
    network = ("--backbone", "tf_efficientnet_lite0", "--weights", "embedded", "--size", "32")
    done("cache", f"{URL}/images/threes", *network, "--out", f"{URL}/alone")
    (found,) = caches(RemotePath(f"{URL}/alone")).values()
    assert find_caches(f"{URL}/alone", "threes", found.spec) == [found.path]
