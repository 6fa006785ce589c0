"""Building: locks, plans, going on, and what is refused."""

import os
import signal
import time

import pytest

from cache import (
    CacheBusyError,
    CacheDamagedError,
    CacheError,
    CacheInvalidError,
    CacheMismatchError,
    CacheNotFoundError,
    Failure,
    InputTable,
    commit_shard,
    plan_shards,
    resumed_with,
    unseal,
)
from tests.test_cache.toy import begin, commit, files, fill, fork, make_inputs, make_spec, wait


def test_one_builder_at_a_time(tmp_path):
    holder = fork(lambda: fill(tmp_path / "pets", pause_s=10))
    while not (tmp_path / "pets" / "plan.json").exists():
        time.sleep(0.01)
    with pytest.raises(CacheBusyError, match=f"is being filled by process {holder} on "):
        begin(tmp_path / "pets")
    os.kill(holder, signal.SIGKILL)
    wait(holder)
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


def test_begin_refuses_what_is_no_cache_or_sealed(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(CacheError, match=r"home: .* no cache"):
        begin(tmp_path / "home")
    with pytest.raises(CacheError, match=r"pets.*: .*sealed"):
        begin(fill(tmp_path / "pets").path)


def test_begin_refuses_inputs_that_contradict_themselves(tmp_path):
    for inputs, message in (
        (InputTable.listing(["a", "a"], [0, 0], [1, 1], [1, 1]), "'a' stands there twice"),
        (InputTable.listing(["a", "b"], [0, 3], [1, 1], [1, 1]), "labels must be -1"),
    ):
        with pytest.raises(CacheInvalidError, match=message):
            begin(tmp_path / "pets", inputs=inputs)
    with pytest.raises(CacheInvalidError, match=r"plans .* 23 inputs"):
        begin(tmp_path / "pets", plans=())


def test_commit_refuses_results_that_contradict_the_plan(tmp_path):
    inputs = make_inputs()
    with begin(tmp_path / "pets") as builder:
        plan = builder.pending()[0]
        rows = inputs[plan.start : plan.stop]
        with pytest.raises(CacheInvalidError, match=r"failures .*Katze/000\.png"):
            commit_shard(builder.path, plan, {}, rows, [Failure(rows.ids[0], "why")])
        with pytest.raises(CacheInvalidError, match=r"ShardPlan.* plan"):
            commit_shard(builder.path, type(plan)(0, 0, 23), {}, inputs, [])
        with pytest.raises(CacheError, match="6 of 6 shards"):
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


def test_a_record_that_is_damaged_or_lost_its_shard_is_made_again(tmp_path):
    whole = files(fill(tmp_path / "whole").path)
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


def test_a_run_that_goes_on_elsewhere_says_so_and_is_in_the_manifest(tmp_path):
    path, newer = tmp_path / "pets", {"torch": "2.15"}
    for made_with, elsewhere in (({"torch": "2.14"}, None), (newer, {"torch": "2.14"}), (newer, {"torch": "2.14"})):
        with begin(path, made_with=made_with) as builder:
            assert builder.elsewhere == elsewhere
    assert fill(path).manifest.made_with == {"torch": "2.14", "resumed_with": [newer]}
    with unseal(path, ["shard-00000.h5"], made_with=newer) as builder:
        assert builder.elsewhere == {"torch": "2.14"}
    with begin(path) as builder:
        assert builder.elsewhere is None


def test_made_with_lists_each_of_the_other_settings_once(tmp_path):
    a, b, c = {"torch": "2.14"}, {"torch": "2.15"}, {"torch": "2.16"}
    assert resumed_with(a, a) == a
    assert resumed_with(a, b) == resumed_with(resumed_with(a, b), b) == {**a, "resumed_with": [b]}
    both = resumed_with({**a, "resumed_with": [b]}, {**c, "resumed_with": [b, a]})
    assert both == {**a, "resumed_with": [b, c]}
    # A version that was partly made of an older one's rows begins with such a list.
    begin(tmp_path / "pets", made_with={**a, "resumed_with": [b]}).close()
    with begin(tmp_path / "pets", made_with={**a, "resumed_with": [c]}) as builder:
        assert builder.elsewhere is None
        assert builder.plan.made_with == both | {"resumed_with": [b, c]}
    with pytest.raises(CacheInvalidError, match=r"resumed_with .* list"):
        begin(tmp_path / "other", made_with={**a, "resumed_with": 3})


def touch(inputs, number):
    """The listing after one image was written anew."""
    mtimes = inputs.mtimes_ns.copy()
    mtimes[number] += 1
    return InputTable.listing(inputs.ids, inputs.labels, inputs.sizes, mtimes)


def test_an_unfinished_cache_of_nearly_the_same_inputs_is_taken_over(tmp_path):
    path, inputs = tmp_path / "pets", make_inputs()
    with begin(path) as builder:
        for plan in builder.pending()[:4]:
            commit(path, make_spec(), inputs, plan)
    changed = touch(inputs, 5)  # in shard 1
    with pytest.raises(CacheMismatchError, match="mtimes of the inputs"):
        begin(path, inputs=changed)
    with begin(path, inputs=changed, adopt=True, made_with={"torch": "2.15"}) as builder:
        assert [plan.index for plan in builder.pending()] == [1, 4, 5]
        assert not (path / "shard-00001.h5").exists()
        assert builder.elsewhere == {"torch": "2.14"}
    with begin(path, inputs=changed) as builder:  # its plan is the new one now
        assert len(builder.pending()) == 3
    added = make_inputs(24)  # the last shard grows, the others fit
    with begin(path, inputs=added, adopt=True) as builder:
        assert [plan.index for plan in builder.pending()] == [1, 4, 5]
    assert fill(path, inputs=added).inputs().ids == added.ids


def test_nothing_is_taken_over_where_nothing_fits(tmp_path):
    path, inputs = tmp_path / "pets", make_inputs()
    with begin(path) as builder:
        for plan in builder.pending()[:1]:
            commit(path, make_spec(), inputs, plan)
    before = files(path)
    for changes in (
        {"inputs": touch(inputs, 0)},
        {"plans": plan_shards(23, make_spec().row_bytes, max_rows=2, multiple=2)},
        {"class_names": ("a", "b", "c")},
        {"spec": make_spec(semantics=2)},
        {"dataset": "other"},
    ):
        with pytest.raises(CacheMismatchError):
            begin(path, adopt=True, **changes)
    assert files(path) == before
