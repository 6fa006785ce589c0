"""A cache in an object store: the bytes of one in a folder, rows by ranges of bytes, cut lines, kills, two at once."""

import os
import re
import signal
from functools import partial

import numpy as np
import pytest

from cache import (
    CacheBusyError,
    CacheDamagedError,
    CacheInvalidError,
    CacheNotFoundError,
    CacheUnreachableError,
    FeatureCache,
    Manifest,
    RemotePath,
    find_caches,
    next_cache_path,
    place,
    restore_manifest,
    unseal,
)
from cache.ranged import RangedShards
from tests.object_store import BUCKET
from tests.test_cache import toy
from tests.test_cache.toy import commit, files, fork, make_spec, wait

INPUTS = toy.make_inputs(14)  # four shards, of which one holds failures alone: each costs a dozen requests
begin, fill = partial(toy.begin, inputs=INPUTS), partial(toy.fill, inputs=INPUTS)
MANIFESTS = {"manifest.json", "manifest.copy.json"}


@pytest.fixture
def root(object_store, request):
    return RemotePath(f"s3://{BUCKET}/{re.sub('[^a-z_]+', '-', request.node.name)}")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("local") / "pets")


@pytest.fixture(scope="module")
def remote(object_store):
    """A sealed cache that nobody changes."""
    return fill(RemotePath(f"s3://{BUCKET}/sealed/pets"))


def others(content):
    return {name: data for name, data in content.items() if name not in MANIFESTS}


def test_the_same_bytes_as_in_a_folder_and_offsets_in_the_manifest(local, remote):
    assert others(files(remote.path)) == others(files(local.path))
    assert b"offsets" not in (local.path / "manifest.json").read_bytes()
    shard = remote.manifest.shards[0]
    data, (start, length) = (remote.path / shard.name).read_bytes(), shard.offsets["cls"]
    assert np.array_equal(np.frombuffer(data[start : start + length], "<f2").reshape(-1, 6), local.read("cls")[:3])
    assert (remote.identity, remote.digest, remote.verify()) == (local.identity, local.digest, [])
    assert (remote.ids.tolist(), remote.failures()) == (local.ids.tolist(), local.failures())
    assert Manifest.read(remote.path) == remote.manifest


def test_any_rows_are_those_of_the_folder(local, remote):
    rng = np.random.default_rng(0)
    for name in local.spec.datasets():
        assert np.array_equal(remote.read(name), local.read(name))
    for piece, most_gap in ((1, 0), (40, 0), (1 << 20, 1 << 20)):
        shards = RangedShards(remote.path, remote.manifest, piece, most_gap)
        for n in (0, 1, 5, 40):
            rows = rng.integers(0, len(local), n)
            shape, dtype = local.spec.datasets()["patches"]
            out = np.empty((n, *shape), dtype)
            shards.fill(out, "patches", rows)
            assert np.array_equal(out, local.read("patches", rows)), (piece, most_gap, rows)


def test_only_what_is_asked_for_is_read(remote, object_store):
    object_store.requests.clear()
    remote.read("cls", np.array([0, 1]))
    assert len(object_store.requests) == 1


def test_a_cache_that_was_sealed_in_a_folder_and_copied_is_read_as_well(local, root):
    for name, data in files(local.path).items():
        (root / "pets" / name).write_bytes(data)
    cache = FeatureCache.open(str(root / "pets"))
    assert np.array_equal(cache.read("patches", np.array([7, 0])), local.read("patches", np.array([7, 0])))
    assert cache.verify() == []


def test_found_by_its_name_and_numbered(root):
    spec = make_spec()
    path = next_cache_path(root, "pets", spec)
    assert str(path) == f"{root}/pets-{spec.fingerprint:.8}"
    assert find_caches(root, "pets", spec) == []
    begin(path).close()
    assert find_caches(root, None, spec) == [path]
    assert next_cache_path(str(root), "pets", spec).name == f"{path.name}-2"


# ----------------------------------------------------------------------------------------------------- cut connections


def test_a_connection_that_is_cut_now_and_then_changes_nothing(remote, local, object_store):
    with object_store.cut(after=250, times=2) as proxy:
        proxy.n_cut = 0
        assert np.array_equal(remote.read("patches"), local.read("patches"))
    assert proxy.n_cut == 2


def test_never_a_wrong_row_however_connections_are_cut(remote, local, object_store):
    """Cut at every depth, for good: the rows, or one line."""
    rows = np.arange(3)  # of one shard: those of others are asked for side by side, each as often
    wanted = local.read("cls", rows)
    for after in (0, 300, 400):
        with object_store.cut(after=after), pytest.raises(CacheUnreachableError, match="after all retries") as said:
            assert np.array_equal(remote.read("cls", rows), wanted)
        assert "\n" not in str(said.value)


def test_goes_on_after_the_store_was_away(root, local, object_store):
    path = root / "pets"
    with begin(path) as builder:
        first, second, *_ = builder.pending()
        commit(path, make_spec(), INPUTS, first)
        with object_store.cut(after=0), pytest.raises(CacheUnreachableError, match="the same command goes on"):
            commit(path, make_spec(), INPUTS, second)
    with begin(path) as builder:
        assert len(builder.pending()) == len(local.manifest.shards) - 1
    cache = fill(path)
    assert others(files(cache.path)) == others(files(local.path))


# --------------------------------------------------------------------------------------------------- kills, two at once


def killed_before_put(path, step):
    """Build in a process of its own that is killed before its `step`-th object is put or removed."""

    def work():
        steps = iter(range(step, -1, -1))
        for name in ("put", "write_bytes", "unlink"):
            real = getattr(RemotePath, name)

            def counted(*arguments, real=real, **options):
                if next(steps) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            setattr(RemotePath, name, counted)
        fill(path)

    return wait(fork(work)) == -signal.SIGKILL


def test_killed_it_goes_on_and_seals_the_same_bytes(root, local):
    last = 1 + 2 * len(local.manifest.shards) + 3  # the manifest, after plan, shards, records, listing, failures, copy
    for step in (4, last, last + 1):  # amid shards, before the manifest, while what is sealed is tidied
        path = root / f"pets-{step}"
        assert killed_before_put(path, step)
        if step <= last:
            with pytest.raises(CacheNotFoundError):
                FeatureCache.open(path)
            fill(path)
        cache = FeatureCache.open(path)  # tidies
        assert others(files(path)) == others(files(local.path))
        assert cache.verify() == []


def test_one_process_at_a_time(root, object_store):
    path = root / "pets"
    with begin(path), pytest.raises(CacheBusyError, match=f"process {os.getpid()} on "):
        begin(path)
    with begin(path):
        pass
    object_store.forget = b"if-none-match"
    try:
        with pytest.raises(CacheUnreachableError, match="ignores conditions of a put"):
            begin(root / "dogs")
    finally:
        object_store.forget = None


# ----------------------------------------------------------------------------------------------------------- damage


def test_damage_is_found_and_repaired(root, local):
    cache = fill(root / "pets")
    shard = cache.path / cache.manifest.shards[0].name
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CacheDamagedError, match="not those that were sealed"):
        cache.check()
    assert [damage.file for damage in cache.verify()] == [shard.name]
    (cache.path / "inputs.parquet").unlink()
    damaged = [damage.file for damage in FeatureCache.open(cache.path).verify()]
    with unseal(cache.path, damaged, INPUTS) as builder:
        for plan in builder.pending():
            commit(cache.path, make_spec(), INPUTS, plan)
        repaired = builder.seal()
    assert repaired.verify() == []
    assert others(files(cache.path)) == others(files(local.path))
    repaired.check()
    (cache.path / "manifest.json").write_bytes(b"{}")
    assert restore_manifest(cache.path)
    assert FeatureCache.open(cache.path).manifest == repaired.manifest


def test_a_shard_that_is_missing_or_shorter_is_damage(root):
    cache = fill(root / "pets")
    shard = cache.path / cache.manifest.shards[0].name
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CacheDamagedError, match="ends inside 'cls'"):
        cache.read("cls")
    shard.unlink()
    with pytest.raises(CacheDamagedError, match="is missing"):
        cache.read("cls")


# ----------------------------------------------------------------------------------------------------------- errors


def test_what_is_wrong_with_a_store_is_one_line(object_store, monkeypatch):
    with pytest.raises(CacheUnreachableError, match="s3://nowhere: no such bucket"):
        FeatureCache.open("s3://nowhere/pets")
    object_store.refuse = True
    with pytest.raises(CacheUnreachableError, match="permission denied"):
        FeatureCache.open(f"s3://{BUCKET}/pets")
    object_store.refuse = False
    with pytest.raises(CacheNotFoundError, match="no cache stands there"):
        FeatureCache.open(f"s3://{BUCKET}/none")


def test_without_its_client_the_extra_is_named(object_store, monkeypatch):
    from cache import remote

    remote._store_of.cache_clear()
    monkeypatch.setattr("fsspec.filesystem", lambda *_, **__: __import__("no_s3fs"))
    with pytest.raises(CacheUnreachableError, match=re.escape("pip install 'mofe-feature-cache[s3]'")):
        FeatureCache.open(f"s3://{BUCKET}/pets")


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///caches", "s3://bucket//caches", "s3://bucket/../caches", "gs://bucket"]
)
def test_another_url_is_refused(url):
    with pytest.raises(CacheInvalidError, match="s3://bucket/prefix"):
        place(url)
