"""Kills, locks, flipped bits and repair."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cache import (
    CacheBusyError,
    CacheDamagedError,
    CacheError,
    CacheInvalidError,
    CacheMismatchError,
    CacheNotFoundError,
    Failure,
    FeatureCache,
    InputTable,
    commit_shard,
    unseal,
)
from cache import builder as builder_module
from cache.journal import BuildPlan
from tests.test_cache.toy import begin, commit, files, fill, make_inputs, make_spec


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return files(fill(tmp_path_factory.mktemp("whole") / "pets").path)


def restore(path, content):
    path.mkdir(exist_ok=True)
    for name, data in content.items():
        (path / name).write_bytes(data)
    return path


def child(path, pause_s):
    command = [sys.executable, "-m", "tests.test_cache.toy", str(path), str(pause_s)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_killed_and_resumed_gives_the_same_bytes(tmp_path, whole):
    """SIGKILL at random moments until the work is done; what each run had finished is not done again."""
    path, rng, kills, done = tmp_path / "pets", np.random.default_rng(0), 0, 0
    while not (path / "manifest.json").exists():
        with child(path, 0.05) as process:
            time.sleep(rng.uniform(0.005, 0.08))
            process.kill()
        kills += process.returncode == -signal.SIGKILL
        if (path / "plan.json").exists() and not (path / "manifest.json").exists():
            with begin(path) as builder:
                assert builder.counts()[0] >= done
                done = builder.counts()[0]
    assert kills >= 1
    assert FeatureCache.open(path).verify() == []
    assert files(path) == whole
    with begin(tmp_path / "other"):
        pass  # and no lock of a dead process stands in the way


@pytest.mark.parametrize("step", range(26))
def test_killed_at_every_step_of_building_and_sealing(tmp_path, whole, step):
    """Before any one change of the disk (a file arrives or is removed); then once more, to the end."""
    if (pid := os.fork()) == 0:
        try:
            steps = itertools.count()
            for name in ("rename", "unlink"):
                real = getattr(os, name)
                setattr(os, name, lambda *a, real=real: os._exit(9) if next(steps) == step else real(*a))
            fill(tmp_path / "pets")
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (9 if step < 24 else 0)
    sealed = (tmp_path / "pets" / "manifest.json").exists()
    cache = FeatureCache.open(tmp_path / "pets") if sealed else fill(tmp_path / "pets")
    assert cache.verify() == []
    assert files(cache.path) == whole


def test_one_builder_at_a_time(tmp_path):
    with child(tmp_path / "pets", 0.5) as holder:
        while not (tmp_path / "pets" / "plan.json").exists():
            time.sleep(0.01)
        with pytest.raises(CacheBusyError, match=f"is being filled by process {holder.pid} on "):
            begin(tmp_path / "pets")
        holder.kill()
    with begin(tmp_path / "pets") as builder:  # its lock died with it
        assert builder.pending()
        with pytest.raises(CacheBusyError, match=f"process {os.getpid()} on"):
            begin(tmp_path / "pets")
    assert not (tmp_path / "pets.lock").exists()


def test_another_plan_is_refused_with_what_differs(tmp_path):
    path, inputs = tmp_path / "pets", make_inputs()
    begin(path).close()
    touched = InputTable.listing(inputs.ids, inputs.labels, inputs.sizes, inputs.mtimes_ns + 1)
    for changes, message in (
        ({"spec": make_spec(image_size=56)}, "image_size: 28 in the cache, 56 asked"),
        ({"inputs": make_inputs(22)}, "ids, labels, sizes, mtimes of the inputs"),
        ({"inputs": touched}, "mtimes of the inputs are not those"),
        ({"class_names": ("a", "b", "c")}, 'class_names: .* in the cache, .*"a","b","c"'),
        ({"dataset": "other"}, 'dataset: "pets" in the cache, "other" asked'),
    ):
        with pytest.raises(CacheMismatchError, match=message):
            begin(path, **changes)
    begin(path).close()  # and the refusals gave the lock back


def test_begin_refuses_what_is_no_cache_or_sealed(tmp_path, whole):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(CacheError, match="holds files but no cache"):
        begin(tmp_path / "home")
    with pytest.raises(CacheError, match="sealed already"):
        begin(restore(tmp_path / "pets", whole))


def test_begin_refuses_inputs_that_contradict_themselves(tmp_path):
    for inputs, message in (
        (InputTable.listing(["a", "a"], [0, 0], [1, 1], [1, 1]), "'a' stands there twice"),
        (InputTable.listing(["a", "b"], [0, 3], [1, 1], [1, 1]), "labels must be -1"),
    ):
        with pytest.raises(CacheInvalidError, match=message):
            begin(tmp_path / "pets", inputs=inputs)
    with pytest.raises(CacheInvalidError, match="do not cover the 23 inputs"):
        begin(tmp_path / "pets", plans=())


def test_commit_refuses_results_that_contradict_the_plan(tmp_path):
    inputs = make_inputs()
    with begin(tmp_path / "pets") as builder:
        plan = builder.pending()[0]
        rows = inputs[plan.start : plan.stop]
        with pytest.raises(CacheInvalidError, match="failures are listed"):
            commit_shard(builder.path, plan, {}, rows, [Failure(rows.ids[0], "why")])
        with pytest.raises(CacheInvalidError, match="not part of its plan"):
            commit_shard(builder.path, type(plan)(0, 0, 23), {}, inputs, [])
        with pytest.raises(CacheError, match="6 of 6 shards are missing"):
            builder.seal()
        assert builder.counts() == (0, 0)
    with pytest.raises(CacheNotFoundError):
        commit_shard(tmp_path / "nowhere", plan, {}, rows, [])


def test_a_shard_of_other_inputs_is_not_sealed(tmp_path):
    inputs = make_inputs()
    other = InputTable.listing([f"{id_}.bak" for id_ in inputs.ids], inputs.labels, inputs.sizes, inputs.mtimes_ns)
    with begin(tmp_path / "pets") as builder:
        for plan in builder.pending():
            commit(builder.path, make_spec(), other if plan.index == 3 else inputs, plan)
        with pytest.raises(CacheDamagedError, match=r"shard-00003\.h5: made from other inputs"):
            builder.seal()


def test_a_record_that_is_damaged_or_lost_its_shard_is_made_again(tmp_path, whole):
    path = tmp_path / "pets"
    with begin(path) as builder:
        for plan in builder.pending():
            commit(path, make_spec(), make_inputs(), plan)
    (path / "shard-00000.json").write_text("{}")
    (path / "shard-00001.h5").unlink()
    with begin(path) as builder:
        assert [plan.index for plan in builder.pending()] == [0, 1]
        assert builder.counts() == (15, 5)
    assert files(fill(path).path) == whole


def test_a_run_that_goes_on_elsewhere_is_in_the_manifest(tmp_path):
    begin(tmp_path / "pets").close()
    begin(tmp_path / "pets", made_with={"torch": "2.15"}).close()
    begin(tmp_path / "pets", made_with={"torch": "2.15"}).close()
    made_with = fill(tmp_path / "pets").manifest.made_with
    assert made_with == {"torch": "2.14", "resumed_with": [{"torch": "2.15"}]}


def mutations(whole, n, seed):
    """Single flipped bits and truncations, over every file of a cache alike."""
    rng, names = np.random.default_rng(seed), sorted(whole)
    for i in range(n):
        name = names[i % len(names)]
        data = bytearray(whole[name])
        if i % 5 == 4:
            del data[rng.integers(len(data)) :]
        else:
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        yield name, bytes(data)


def test_every_flipped_bit_and_truncation_is_found(tmp_path, whole):
    path = restore(tmp_path / "pets", whole)
    for name, data in mutations(whole, 300, seed=0):
        (path / name).write_bytes(data)
        if name == "manifest.json":
            with pytest.raises((CacheDamagedError, CacheInvalidError)):
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
    assert sum(read) == sum(map(len, whole.values())) - len(whole["manifest.json"])
    (cache.path / "shard-00000.h5").unlink()
    (cache.path / "notes.txt").touch()
    (cache.path / "manifest.json").write_bytes(b"{")
    damages = {damage.file: damage.what for damage in cache.verify()}
    assert damages.keys() == {"shard-00000.h5", "notes.txt", "manifest.json"}
    assert damages["shard-00000.h5"] == "is missing"


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
    with pytest.raises(CacheDamagedError, match="must be listed anew"):
        unseal(path, ["inputs.parquet"])
    with pytest.raises(CacheMismatchError, match="made from 23 inputs, 22 are listed now"):
        unseal(path, [], inputs=make_inputs(22))
    renamed = make_inputs()
    renamed = InputTable.listing([f"x{id_}" for id_ in renamed.ids], renamed.labels, renamed.sizes, renamed.mtimes_ns)
    with pytest.raises(CacheMismatchError, match="are not those that are listed now"):
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
