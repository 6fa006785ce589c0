"""Rows out of mapped shards: both ways to gather, more shards than may be mapped at once, only what is read."""

import os
import shutil

import numpy as np
import pytest

from cache import CacheDamagedError, FeatureCache
from cache.mapped import MappedShards
from tests.test_cache.toy import fails, features, fill, make_spec

USED = [i for i in range(23) if not fails(i)]


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("cache") / "pets")


def expected(name):
    return np.array([features(make_spec(), i)[name] for i in USED]).astype(np.float16)


def rows_of(shards, name, rows):
    out = np.empty((len(rows), *expected(name).shape[1:]), np.float16)
    shards.fill(out, name, rows)
    return out


@pytest.mark.parametrize("large_row", [1, 10**9])
def test_both_ways_to_gather_give_the_same(sealed, large_row):
    rows = np.random.default_rng(0).permutation(len(USED))
    shards = MappedShards(sealed.path, sealed.manifest, large_row=large_row)
    np.testing.assert_array_equal(rows_of(shards, "registers", rows), expected("registers")[rows])


@pytest.mark.parametrize("large_row", [1, 10**9])
def test_more_shards_than_may_be_mapped_at_once(sealed, large_row):
    shards = MappedShards(sealed.path, sealed.manifest, most_mapped=2, large_row=large_row)
    before = len(os.listdir("/proc/self/fd"))
    np.testing.assert_array_equal(rows_of(shards, "cls", np.arange(len(USED))), expected("cls"))
    rows = np.random.default_rng(0).permutation(len(USED))
    np.testing.assert_array_equal(rows_of(shards, "cls", rows), expected("cls")[rows])
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_work_on_class_embeddings_needs_no_patches(sealed, tmp_path):
    """Cut every file off where its patches begin: cls, which lies before them, still reads."""
    cache = FeatureCache.open(shutil.copytree(sealed.path, tmp_path / "cut"))
    cache.read("tap_cls")  # learns where the datasets lie
    for index, reader in cache._shards._readers.items():
        reader.close()
        os.truncate(cache.path / cache.manifest.shards[index].name, reader._layout["patches"][0])
    np.testing.assert_array_equal(cache.read("cls"), expected("cls"))
    with pytest.raises(CacheDamagedError, match="'patches'"):
        cache.read("patches")
