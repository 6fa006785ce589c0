"""A sealed cache: reading, order, batches, places, and what it refuses."""

import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import (
    CacheError,
    CacheMismatchError,
    CacheNotFoundError,
    Failure,
    FeatureCache,
    Manifest,
    commit_shard,
)
from tests.test_cache.toy import CLASSES, begin, commit, fails, features, files, fill, make_inputs, make_spec

USED = [i for i in range(23) if not fails(i)]


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("cache") / "pets")


def expected(name):
    return np.array([features(make_spec(), i)[name] for i in USED]).astype(np.float16)


def test_round_trip(sealed):
    inputs = make_inputs()
    assert (sealed.n_rows, len(sealed), sealed.dim, sealed.class_names) == (len(USED), len(USED), 6, CLASSES)
    assert sealed.spec == make_spec()
    assert sealed.fingerprint == make_spec().fingerprint
    for name in make_spec().datasets():
        np.testing.assert_array_equal(sealed.read(name), expected(name))
    assert sealed.labels.tolist() == [i % 3 for i in USED]
    assert sealed.labels.dtype == np.int32
    assert sealed.ids.tolist() == [inputs.ids[i] for i in USED]
    assert sealed.image_hashes.shape == (len(USED), 32)
    assert sealed.inputs().columns_sha256() == inputs.columns_sha256()
    assert [failure.id for failure in sealed.failures()] == [inputs.ids[i] for i in range(23) if fails(i)]
    assert sealed.failures()[0].reason == "truncated after 3 bytes"
    assert sealed.manifest.n_rows + sealed.manifest.n_failures == sealed.manifest.n_inputs == 23
    assert sealed.verify() == []


def test_what_a_source_left_out_stands_in_the_manifest_and_changes_nothing_else(sealed, tmp_path):
    plain, manifest = (sealed.path / "manifest.json").read_bytes(), sealed.manifest
    assert b"left_out" not in plain  # as earlier versions wrote it, and read it
    assert manifest.left_out == {}
    replace(manifest, left_out={".txt": 25, "": 2}).write(tmp_path)
    again = Manifest.read(tmp_path)
    assert again.left_out == {".txt": 25, "": 2}
    assert (again.identity, again.spec.fingerprint) == (manifest.identity, manifest.spec.fingerprint)
    replace(again, left_out={}).write(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == plain


def test_finished_shards_are_given_up_where_a_failure_is_none_any_more(sealed, tmp_path):
    with begin(tmp_path / "pets") as builder:
        for plan in builder.pending():
            commit(builder.path, make_spec(), make_inputs(), plan)
        assert builder.pending() == ()
        failed = builder.failures()[0]
        builder.discard(lambda failure: failure.id == "none of them")
        assert builder.pending() == ()
        builder.discard(lambda failure: failure == failed)
        (plan,) = builder.pending()
        assert failed.id in make_inputs().ids[plan.start : plan.stop]
        commit(builder.path, make_spec(), make_inputs(), plan)
        assert builder.seal().identity == sealed.identity


@settings(deadline=None)
@given(st.lists(st.integers(0, len(USED) - 1), max_size=40))
def test_rows_come_in_the_order_asked(sealed, rows):
    rows = np.array(rows, np.int64)
    np.testing.assert_array_equal(sealed.read("patches", rows), expected("patches")[rows])


def test_rows_are_read_to_where_they_shall_lie(sealed):
    made = []

    def new(shape, dtype):
        made.append(np.zeros(shape, dtype))
        return made[-1]

    read = sealed.read("patches", [2, 0], new)
    assert read is made[0]
    np.testing.assert_array_equal(read, expected("patches")[[2, 0]])


@given(st.slices(len(USED)))
def test_slices_and_masks_mean_what_they_mean_to_numpy(sealed, rows):
    mask = np.zeros(len(USED), bool)
    mask[rows] = True
    np.testing.assert_array_equal(sealed.read("cls", rows), expected("cls")[rows])
    np.testing.assert_array_equal(sealed.read("cls", mask), expected("cls")[mask])


@pytest.mark.parametrize("rows", [np.array([len(USED)]), np.array([-1]), np.array([0.5]), np.zeros((2, 2), int)])
def test_rows_that_do_not_exist_are_refused(sealed, rows):
    with pytest.raises(CacheError, match="rows"):
        sealed.read("cls", rows)


def test_unknown_dataset_is_refused_with_those_that_exist(sealed):
    with pytest.raises(CacheError, match=r"'logits' .* cls, tap_cls, registers, patches"):
        sealed.read("logits")


def test_batches_cover_all_rows_once_and_a_seed_fixes_their_order(sealed):
    plain = list(sealed.batches(["cls"], batch_size=4))
    assert np.concatenate([batch["row"] for batch in plain]).tolist() == list(range(len(USED)))
    np.testing.assert_array_equal(np.concatenate([batch["cls"] for batch in plain]), expected("cls"))
    orders = [np.concatenate([b["row"] for b in sealed.batches([], batch_size=4, seed=seed)]) for seed in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(len(USED)))
    assert orders[0].tolist() == orders[1].tolist() != orders[2].tolist()
    for batch in sealed.batches(["cls", "patches"], rows=np.array([5, 1, 3]), batch_size=2, seed=3):
        np.testing.assert_array_equal(batch["patches"], expected("patches")[batch["row"]])


def test_a_cache_can_be_pickled_and_moved(sealed, tmp_path):
    moved = FeatureCache.open(shutil.copytree(sealed.path, tmp_path / "elsewhere"))
    again = pickle.loads(pickle.dumps(moved))
    np.testing.assert_array_equal(again.read("cls"), expected("cls"))
    assert again.identity == sealed.identity


def test_the_same_inputs_give_the_same_bytes(sealed, tmp_path):
    assert files(fill(tmp_path / "again").path) == files(sealed.path)


def test_identity_is_content_and_spec_without_times(sealed, tmp_path):
    touched = make_inputs()
    touched = type(touched).listing(touched.ids, touched.labels, touched.sizes, touched.mtimes_ns + 1)
    assert fill(tmp_path / "a", inputs=touched).identity == sealed.identity
    assert fill(tmp_path / "b", spec=make_spec(semantics=2)).identity != sealed.identity


def test_a_set_without_a_usable_input_is_a_cache_without_rows(tmp_path):
    all_fail = make_inputs(12)[8:12]
    with begin(tmp_path / "none", inputs=all_fail) as builder:
        (plan,) = builder.pending()
        rows = all_fail.with_results(all_fail.sha256, ~all_fail.failed)
        commit_shard(builder.path, plan, {}, rows, [Failure(id_, "no image") for id_ in rows.ids])
        cache = builder.seal()
    assert cache.read("patches").shape == (0, 6, 4)
    assert (cache.n_rows, len(cache.failures()), list(cache.batches(["cls"]))) == (0, 4, [])
    assert cache.verify() == []


def test_open_says_what_does_not_fit(sealed, tmp_path):
    assert FeatureCache.open(sealed.path, make_spec()).n_rows == len(USED)
    with pytest.raises(CacheMismatchError, match="image_size: 28 in the cache, 56 asked"):
        FeatureCache.open(sealed.path, make_spec(image_size=56))
    with pytest.raises(CacheNotFoundError, match=r"no cache .*manifest\.json"):
        FeatureCache.open(tmp_path / "nowhere")
    with begin(tmp_path / "begun"), pytest.raises(CacheNotFoundError, match="not finished"):
        FeatureCache.open(tmp_path / "begun")
