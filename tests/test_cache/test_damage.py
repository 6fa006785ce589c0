"""Flipped bits, truncations and lost files: all are found, and repair makes only what is damaged again."""

import numpy as np
import pytest

from cache import (
    CacheBusyError,
    CacheDamagedError,
    CacheMismatchError,
    CacheNotFoundError,
    FeatureCache,
    InputTable,
    find_caches,
    restore_manifest,
    unseal,
)
from cache import builder as builder_module
from cache.unfinished import BuildPlan
from tests.test_cache.toy import begin, commit, files, fill, make_inputs, make_spec, restore

MANIFESTS = ("manifest.json", "manifest.copy.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return files(fill(tmp_path_factory.mktemp("whole") / "pets").path)


def damage(data, rng):
    """A flipped bit, or now and then a truncation."""
    damaged = bytearray(data)
    if rng.random() < 0.2:
        del damaged[rng.integers(len(damaged)) :]
    else:
        damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def test_every_flipped_bit_and_truncation_is_found(tmp_path, whole, request):
    path, rng, names = restore(tmp_path / "pets", whole), np.random.default_rng(0), sorted(whole)
    assert set(MANIFESTS) < set(names)
    for mutant in range(request.config.getoption("mutants", default=300)):
        name = names[mutant % len(names)]
        (path / name).write_bytes(damage(whole[name], rng))
        if name == "manifest.json":
            with pytest.raises(CacheDamagedError, match="verify --repair"):
                FeatureCache.open(path)
        else:
            assert [damage.file for damage in FeatureCache.open(path).verify()] == [name]
            if name == "inputs.parquet":
                with pytest.raises(CacheDamagedError):
                    FeatureCache.open(path).inputs()
        (path / name).write_bytes(whole[name])
    assert FeatureCache.open(path).verify() == []


def test_verify_names_missing_and_foreign_files_and_counts_bytes(tmp_path, whole):
    cache = FeatureCache.open(restore(tmp_path / "pets", whole))
    read: list[int] = []
    assert cache.verify(read.append) == []
    assert sum(read) == sum(len(data) for name, data in whole.items() if name not in MANIFESTS)
    (cache.path / "shard-00000.h5").unlink()
    (cache.path / "notes.txt").touch()
    (cache.path / "manifest.json").write_bytes(b"{")
    damages = {damage.file: damage.what for damage in cache.verify()}
    assert damages.keys() == {"shard-00000.h5", "notes.txt", "manifest.json"}
    assert damages["shard-00000.h5"] == "is missing"


@pytest.mark.parametrize("damaged", [None, b"", b"{", b"\0" * 3000])
def test_a_manifest_is_put_back_from_its_copy(tmp_path, whole, damaged):
    path = restore(tmp_path / "pets-12345678", {name: data for name, data in whole.items() if name != "manifest.json"})
    if damaged is not None:
        (path / "manifest.json").write_bytes(damaged)
    for use in (FeatureCache.open, lambda path: unseal(path, [])):
        with pytest.raises(CacheDamagedError, match=r"manifest\.json: .*verify --repair.*copy"):
            use(path)
    assert restore_manifest(path)
    assert files(path) == whole
    assert not restore_manifest(path)


def test_a_cache_whose_manifest_is_lost_is_not_taken_for_an_empty_place(tmp_path, whole):
    spec = make_spec()
    path = restore(tmp_path / f"pets-{spec.fingerprint:.8}", whole)
    (path / "manifest.json").unlink()
    assert find_caches(tmp_path, "pets", spec) == [path]
    with pytest.raises(CacheDamagedError, match="verify --repair"):
        begin(path)


@pytest.mark.parametrize("damaged", [None, b"{"])
def test_a_copy_is_put_back_from_the_manifest(tmp_path, whole, damaged):
    path = restore(tmp_path / "pets", {name: data for name, data in whole.items() if name != "manifest.copy.json"})
    if damaged is not None:
        (path / "manifest.copy.json").write_bytes(damaged)
    assert [damage.file for damage in FeatureCache.open(path).verify()] == ["manifest.copy.json"]
    assert restore_manifest(path)
    assert files(path) == whole


def test_restoring_says_what_it_cannot_do(tmp_path, whole):
    path = restore(tmp_path / "pets", whole | {"manifest.json": b"", "manifest.copy.json": b"{"})
    for use in (FeatureCache.open, restore_manifest):
        with pytest.raises(CacheDamagedError, match=r"copy .* damaged"):
            use(path)
    with pytest.raises(CacheNotFoundError, match="no cache"):
        restore_manifest(tmp_path / "nowhere" / "pets")
    with begin(tmp_path / "begun"), pytest.raises(CacheBusyError):
        restore_manifest(tmp_path / "begun")


def test_any_damage_is_repaired_to_the_same_bytes(tmp_path, whole, request):
    """Some files at once, manifests as well; only damaged shards are made again."""
    rng, inputs = np.random.default_rng(1), make_inputs()
    for _ in range(max(request.config.getoption("mutants", default=300) // 10, 10)):
        names = rng.choice(sorted(whole), rng.integers(1, 5), replace=False).tolist()
        if set(MANIFESTS) <= set(names):
            names.remove("manifest.json")
        path = restore(tmp_path / "pets", whole | {name: damage(whole[name], rng) for name in names})
        assert restore_manifest(path) == bool(set(MANIFESTS) & set(names))
        found = [damage.file for damage in FeatureCache.open(path).verify()]
        assert found == sorted(set(names) - set(MANIFESTS))
        if found:
            with unseal(path, found, inputs=inputs) as builder:
                redo = builder.pending()
                for plan in redo:
                    commit(path, make_spec(), inputs, plan)
                builder.seal()
            if not {"inputs.parquet", "failures.jsonl"} & set(found):
                assert [plan.name for plan in redo] == found
        assert files(path) == whole


@pytest.mark.parametrize("name", ["shard-00001.h5", "inputs.parquet", "failures.jsonl"])
def test_repair_makes_only_the_damaged_shards_again(tmp_path, whole, name):
    path = restore(tmp_path / "pets", whole | {name: whole[name][:-1]})
    damages = FeatureCache.open(path).verify()
    inputs = make_inputs()
    with unseal(path, [damage.file for damage in damages], inputs=inputs) as builder:
        redo = [plan.index for plan in builder.pending()]
        # 0, 2, 4 hold failures: without their list, or the list of inputs, nothing else knows of them.
        assert redo == ([1] if name == "shard-00001.h5" else [0, 2, 4])
        for plan in builder.pending():
            commit(path, make_spec(), inputs, plan)
        builder.seal()
    assert files(path) == whole


def test_repair_is_resumed_like_any_run(tmp_path, whole):
    path = restore(tmp_path / "pets", whole)
    unseal(path, ["shard-00001.h5", "shard-00005.h5"]).close()
    with pytest.raises(CacheNotFoundError, match="not finished"):
        FeatureCache.open(path)
    with begin(path) as builder:
        assert [plan.index for plan in builder.pending()] == [1, 5]
    assert files(fill(path).path) == whole


def test_repair_without_the_inputs_asks_for_them(tmp_path, whole):
    path = restore(tmp_path / "pets", whole | {"inputs.parquet": b""})
    with pytest.raises(CacheDamagedError, match=r"inputs\.parquet"):
        unseal(path, ["inputs.parquet"])
    with pytest.raises(CacheMismatchError, match="23 inputs, 22"):
        unseal(path, [], inputs=make_inputs(22))
    renamed = make_inputs()
    renamed = InputTable.listing([f"x{id_}" for id_ in renamed.ids], renamed.labels, renamed.sizes, renamed.mtimes_ns)
    with pytest.raises(CacheMismatchError, match="sample ids or labels"):
        unseal(path, [], inputs=renamed)
    assert (path / "manifest.json").exists()
    assert not (path / "plan.json").exists()


def test_a_kill_inside_unseal_leaves_a_sealed_cache(tmp_path, whole, monkeypatch):
    path = restore(tmp_path / "pets", whole)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(builder_module.ShardRecord, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        unseal(path, ["shard-00001.h5"])
    assert BuildPlan.read(path).dataset == "pets"
    assert FeatureCache.open(path).verify() == []  # opening tidied up
    assert files(path) == whole
