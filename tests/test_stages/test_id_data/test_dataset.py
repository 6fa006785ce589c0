"""The ID side of a study: labels in the study's classes, rows of every model, tokens as they were cached."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from cache import CacheBuilder, FeatureCache, InputSet, InputTable, commit_shard, plan_shards
from stages.errors import InputError
from stages.extract import import_set
from stages.id_data.clusters import find_clusters
from stages.id_data.rows import epoch_windows, id_data, labels_in, labels_of_test, read_blocks
from stages.id_data.split import split_rows
from stages.id_data.tokens import read_tokens
from stages.inputs.arrays import list_arrays
from tests.test_cache.toy import features, make_spec


@pytest.fixture
def cache_of(tmp_path):
    """Makes a sealed cache of toy features: ``cache_of("train", labels, names)``."""

    def make(name: str, labels, class_names, **changes) -> FeatureCache:
        spec, n = make_spec(**changes), len(labels)
        ids = [f"{row:04d}.png" for row in range(n)]
        inputs = InputTable.listing(ids, np.array(labels), np.full(n, 9), np.zeros(n, int))
        plans = plan_shards(n, spec.row_bytes, max_rows=16, multiple=2)
        with CacheBuilder.begin(
            tmp_path / name, InputSet(name, inputs, tuple(class_names)), spec, plans, {}
        ) as builder:
            for plan in builder.pending():
                rows = range(plan.start, plan.stop)
                digests = [hashlib.sha256(f"{name} {row}".encode()).digest() for row in rows]
                hashes = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
                of_rows = [features(spec, row) for row in rows]
                arrays = {key: np.stack([row[key] for row in of_rows]) for key in spec.datasets()}
                part = inputs[plan.start : plan.stop].with_results(hashes, np.zeros(len(rows), bool))
                commit_shard(builder.path, plan, arrays, part, [])
            return builder.seal()

    return make


def test_study_on_a_share_of_id_train(caches, data):
    """Four digits, a fifth of each held out."""
    assert (data.n_classes, data.class_names) == (4, ("0", "1", "2", "3"))
    assert data.held_out is data.train is caches["train"]
    assert np.array_equal(data.train_labels, caches["train"].labels)
    reference = split_rows(data.train_labels, caches["train"].image_hashes, 0.2)
    assert data.split.rule == reference.rule
    ((name, fold),) = data.runs()
    assert name == "final"
    assert np.array_equal(fold.train, reference.folds[0].train)
    assert list(data.train_rows()) == ["final"]
    assert np.array_equal(data.train_rows()["final"], fold.train)


def test_cross_fitted_study_has_a_model_for_each_fold_and_a_final_one(few):
    assert [name for name, _ in few.runs()] == ["fold-0", "fold-1", "fold-2"]
    rows = few.train_rows()
    assert list(rows) == ["fold-0", "fold-1", "fold-2", "final"]
    kept = np.setdiff1d(np.arange(48), few.split.select)
    assert np.array_equal(rows["final"], kept)
    assert all(np.array_equal(np.union1d(fold.train, fold.calibrate), kept) for _, fold in few.runs())


def test_study_with_a_validation_set_matches_classes_by_name(cache_of):
    train = cache_of("train", np.arange(12) % 3, ("ant", "bee", "cat"))
    val = cache_of("val", [0, 1, 0, 1, 0, 1], ("cat", "ant"))
    data = id_data(train, val, val_share=0.2)
    assert data.held_out is val
    assert data.held_out_labels.tolist() == [2, 0, 2, 0, 2, 0]
    assert np.array_equal(data.train_rows()["final"], np.arange(12))
    assert data.split.held_out == "id-val"


def test_classes_without_an_image_are_no_classes(cache_of):
    """Folders that hold nothing usable; the others are numbered anew."""
    train = cache_of("train", np.array([1, 3])[np.arange(60) % 2], ("void", "ant", "empty", "bee", "none"))
    data = id_data(train, None, val_share=0.2)
    assert data.class_names == ("ant", "bee")
    assert data.train_labels.tolist() == [0, 1] * 30
    assert labels_in(cache_of("test", [1, 0], ("bee", "ant")), data.class_names).tolist() == [0, 1]


def test_identity_tells_features_and_split_apart(caches, data):
    assert id_data(caches["train"], None, 0.2).identity == data.identity
    for other in (id_data(caches["train"], None, 0.3), id_data(caches["train"], caches["test"], 0.2)):
        assert other.identity != data.identity
    assert id_data(caches["test"], None, 0.2).identity != data.identity


def test_identity_is_of_the_bytes_the_names_and_the_rows(caches, data):
    """Same recipe, images and order of classes; one of these is another."""
    manifest = data.train.manifest
    (shard,) = manifest.shards
    other_bits = replace(manifest, shards=(replace(shard, sha256="0" * 64),))
    other_names = replace(manifest, class_names=("0", "1", "5", "9"))
    caches_of = [FeatureCache(data.train.path, own) for own in (manifest, other_bits, other_names)]
    found = [id_data(cache, None, 0.2).identity for cache in caches_of]
    fold = data.split.folds[0]
    swapped = replace(data.split, folds=(replace(fold, select=fold.calibrate, calibrate=fold.select),))
    found += [replace(data, class_names=other_names.class_names).identity, replace(data, split=swapped).identity]
    assert found[0] == data.identity
    assert len(set(map(str, found))) == 5


def test_rows_without_a_label_are_refused(cache_of):
    with pytest.raises(InputError, match=r"2 of 4 images .*'0001\.png'.* label"):
        id_data(cache_of("train", [0, -1, 1, -1], ("ant", "bee")), None, 0.2)


@pytest.fixture
def imported(caches, tmp_path):
    """Features of real images, four digits, as arrays: ``imported(name, n, label=...)``, of the first rows of a set."""

    def make(name: str, n: int = 400, **more) -> FeatureCache:
        rows = np.random.default_rng(0).permutation(caches[name].n_rows)[:n]
        np.savez(tmp_path / f"{name}.npz", cls=caches[name].read("cls", rows), **more, id=caches[name].ids[rows])
        arrays = list_arrays(str(tmp_path / f"{name}.npz"))
        return import_set(name, arrays, arrays.spec("drawn", "float32"), tmp_path)

    return make


def test_clusters_stand_for_classes_where_there_are_no_labels(imported):
    """Rows are held out by hash alone; clusters are found on those that train, and are mostly of one digit."""
    train = imported("train")
    found = id_data(train, None, 0.2)
    assert found.labels == "clusters"
    split = split_rows(np.zeros(train.n_rows, np.int32), train.image_hashes, 0.2)
    assert found.split.digest == split.digest
    assert (
        found.split.rule == f"{split.rule}; no classes to tell apart, {found.n_classes} clusters of cls stand for them"
    )
    digits = np.array([int(name[0]) for name in train.ids])
    assert adjusted_rand_score(digits, found.train_labels) > 0.3
    hashes, rows = train.image_hashes, found.split.final_train
    clusters = find_clusters(train.read("cls", rows), hashes[rows])
    np.testing.assert_array_equal(found.train_labels, clusters.of(train.read("cls")))
    assert found.held_out_labels is found.train_labels


def test_one_class_is_as_none(imported):
    found = id_data(imported("train", 100, label=np.full(100, 3)), imported("test", 40), 0.2)
    assert found.labels == "clusters"
    assert found.split.held_out == "id-val"
    assert len(found.held_out_labels) == 40
    assert labels_of_test(found.held_out, found).tolist() == [-1] * 40


def test_other_features_of_the_same_images_have_the_same_clusters(imported, caches):
    """Those of a backbone that was fine-tuned, in whatever order its rows stand."""
    first = id_data(imported("train", 60), None, 0.2)
    ids = first.train.ids[::-1]
    other = FeatureCache(first.train.path, first.train.manifest)
    vars(other)["ids"] = ids
    again = id_data(other, None, 0.2, classes_of=first)
    np.testing.assert_array_equal(again.train_labels, first.train_labels[::-1])
    vars(other)["ids"] = np.array([*ids[:-1], "new"])
    with pytest.raises(InputError, match=r"1 of 60 rows \(the first: 'new'\) are not in .*: run make extract"):
        id_data(other, None, 0.2, classes_of=first)


def test_identity_tells_clusters_apart(imported):
    found = id_data(imported("train", 60), None, 0.2)
    assert id_data(found.train, None, 0.2).identity == found.identity
    other = replace(found, train_labels=np.roll(found.train_labels, 1))
    assert other.identity != found.identity
    assert "clusters" not in replace(found, labels="given").identity


def test_id_test_has_labels_or_none(cache_of):
    data = id_data(cache_of("train", [0, 1] * 30, ("ant", "bee")), None, 0.2)
    assert labels_of_test(cache_of("none", [-1, -1], ()), data).tolist() == [-1, -1]
    assert labels_of_test(cache_of("all", [0, 1], ("bee", "ant")), data).tolist() == [1, 0]
    with pytest.raises(InputError, match=r"'some': 1 of 2 images .* no label"):
        labels_of_test(cache_of("some", [0, -1], ("bee", "ant")), data)


def test_class_of_one_image_is_refused_by_name(cache_of):
    with pytest.raises(InputError, match=r"class 'cat' has 1 image\(s\).*\(1 such class"):
        id_data(cache_of("train", [0, 1] * 20 + [2], ("ant", "bee", "cat")), None, 0.2)


def test_labels_that_id_train_does_not_have_are_refused(cache_of):
    with pytest.raises(
        InputError,
        match=r"'test': 1 of 3 images .*'0001\.png'.*: 'newt'",
    ):
        labels_in(cache_of("test", [0, 1, 0], ("ant", "newt")), ("ant", "bee"))
    with pytest.raises(InputError, match=r"'flat': 2 of 2 images .*'0000\.png'.* label"):
        labels_in(cache_of("flat", [-1, -1], ()), ("ant", "bee"))


def test_tokens_are_what_was_cached(cache_of):
    cache = cache_of("train", np.arange(40) % 2, ("ant", "bee"))
    rows = np.array([33, 2, 17])
    tokens = read_tokens(cache, rows)
    for name in ("cls", "tap_cls", "registers", "patches"):
        ours = getattr(tokens, name)
        expected = np.stack([features(cache.spec, row)[name] for row in rows]).astype(np.float16)
        assert ours.dtype == torch.float32
        assert np.array_equal(ours.numpy(), expected.astype(np.float32))
    assert torch.equal(read_tokens(cache, slice(0, 3)).cls, read_tokens(cache, np.arange(3)).cls)


def test_tokens_that_the_cache_does_not_hold_have_length_zero(cache_of):
    cache = cache_of("train", [0, 1, 0], ("ant", "bee"), n_registers=0, patches="none", grid=(0, 0))
    tokens = read_tokens(cache, slice(0, 3))
    assert (tokens.registers.shape, tokens.patches.shape) == ((3, 0, 4), (3, 0, 4))


def test_tokens_that_were_not_asked_for_are_not_read(cache_of):
    cache = cache_of("train", [0, 1, 0], ("ant", "bee"))
    tokens = read_tokens(cache, slice(0, 3), reads=("cls", "registers"))
    whole = read_tokens(cache, slice(0, 3))
    assert torch.equal(tokens.cls, whole.cls)
    assert torch.equal(tokens.registers, whole.registers)
    assert tokens.tap_cls.shape == (3, 0)
    assert tokens.patches.shape[:2] == (3, 0)


def test_blocks_are_the_rows_in_order(cache_of):
    cache = cache_of("train", np.arange(40) % 2, ("ant", "bee"))
    rows = np.arange(0, 40, 3)
    numbers, values = (np.concatenate(parts) for parts in zip(*read_blocks(cache, "tap_cls", rows), strict=True))
    assert np.array_equal(numbers, rows)
    assert np.array_equal(values, cache.read("tap_cls", rows).astype(np.float32))


# --------------------------------------------------------------------------------------------------- an epoch's order


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    window_rows=st.integers(1, 40),
    every=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_windows_hold_each_row_once_and_few_shards_at_a_time(sizes, window_rows, every, seed):
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rows = np.arange(0, sum(sizes), every)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)  # of each row of the cache
    windows = epoch_windows(rows, starts, 10, np.random.default_rng((seed, 0)), window_bytes=10 * window_rows)
    assert np.array_equal(np.sort(np.concatenate([rows[:0], *windows])), rows)
    shards = [set(shard_of[window].tolist()) for window in windows]
    assert sum(map(len, shards)) == len(set().union(*shards))  # a shard is read in one window alone
    assert all(len(window) <= window_rows or len(own) == 1 for window, own in zip(windows, shards, strict=True))
    # No window could have taken the first shard of the next.
    first = [np.isin(rows, np.flatnonzero(shard_of == shard_of[window[0]])).sum() for window in windows[1:]]
    if all(len(own) == 1 for own in shards):
        assert all(len(w) + n > window_rows for w, n in zip(windows, first, strict=False))


def test_the_order_follows_from_seed_and_epoch():
    def order(*seed: int, **kwargs) -> list[int]:
        windows = epoch_windows(np.arange(600), range(0, 600, 50), 8, np.random.default_rng(seed), **kwargs)
        return np.concatenate(windows).tolist()

    assert order(0, 1, window_bytes=800) == order(0, 1, window_bytes=800)
    others = [order(0, 1, window_bytes=800), order(0, 2, window_bytes=800), order(1, 1, window_bytes=800)]
    assert len({tuple(other) for other in others}) == 3
    assert order(0, 1, window_bytes=800) != sorted(order(0, 1, window_bytes=800))


def test_what_fits_into_one_window_is_shuffled_as_a_whole():
    """Rows of every shard are spread over the whole epoch: a tenth of it has about a tenth of each shard."""
    (window,) = epoch_windows(np.arange(1000), range(0, 1000, 250), 8, np.random.default_rng(0))
    counts = np.bincount(window[:200] // 250, minlength=4)
    assert counts.min() > 30
    (window,) = epoch_windows(np.arange(5), [0], 10**12, np.random.default_rng(0))  # one shard at least
    assert sorted(window) == [0, 1, 2, 3, 4]


def test_what_came_as_arrays_has_rows_and_no_images(tmp_path):
    np.savez(tmp_path / "mine.npz", cls=np.eye(9, dtype=np.float32), label=np.array([0] * 8 + [1]))
    arrays = list_arrays(str(tmp_path / "mine.npz"))
    cache = import_set("mine", arrays, arrays.spec("drawn", "float32"), tmp_path)
    with pytest.raises(InputError, match=r"class '1' has 1 row\(s\)"):
        id_data(cache, None, 0.2)
