"""Clusters of ID rows that stand for classes where there are no labels."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, silhouette_score

from stages.id_data.clusters import SMALLEST_CLUSTER, find_clusters, first_by_hash, unit_rows


def blobs(k, n, dim=24, spread=0.15, seed=0):
    """(features ``[n, dim]``, truth ``[n]``, hashes ``[n, 32]``): k directions at right angles, of any length."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, k, n)
    features = (np.eye(k, dim)[truth] + rng.normal(scale=spread, size=(n, dim))) * rng.uniform(0.5, 9, (n, 1))
    return features.astype(np.float32), truth, rng.integers(0, 256, (n, 32)).astype(np.uint8)


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6, 7, 8, 12])
def test_planted_clusters_are_found(k):
    features, truth, hashes = blobs(k, 40 * k)
    found = find_clusters(features, hashes)
    assert len(found) == k
    assert adjusted_rand_score(truth, found.of(features)) == 1
    assert found.silhouette == pytest.approx(silhouette_score(unit_rows(features), found.of(features)))
    assert np.all(np.diff(np.bincount(found.of(features))) <= 0)  # the largest first
    assert found.names[:2] == ("cluster-0", "cluster-1")


def test_neither_order_nor_names_of_rows_matter():
    features, _, hashes = blobs(4, 200, spread=0.4)
    found = find_clusters(features, hashes)
    order = np.random.default_rng(1).permutation(200)
    again = find_clusters(features[order], hashes[order])
    np.testing.assert_array_equal(found.centres, again.centres)
    np.testing.assert_array_equal(found.of(features)[order], again.of(features[order]))


def test_one_blob_is_two_clusters_or_more_with_enough_rows_each():
    """Of one normal class: whatever needs classes to tell apart has some."""
    features, _, hashes = blobs(1, 150)
    found = find_clusters(features, hashes)
    assert len(found) >= 2
    assert np.bincount(found.of(features)).min() >= SMALLEST_CLUSTER


def test_a_stray_row_is_no_cluster():
    features, truth, hashes = blobs(3, 120)
    features[0] = -features[0]
    found = find_clusters(features, hashes)
    assert len(found) == 3
    assert adjusted_rand_score(truth[1:], found.of(features)[1:]) == 1


@pytest.mark.parametrize(
    "features",
    [
        np.ones((40, 8)),
        np.zeros((40, 8)),
        np.arange(1, 41)[:, None] * np.ones((1, 8)),
        blobs(2, 2 * SMALLEST_CLUSTER - 1)[0],
    ],
    ids=["all alike", "all zero", "one direction", "too few"],
)
def test_what_makes_no_two_clusters_has_none(features):
    hashes = np.random.default_rng(0).integers(0, 256, (len(features), 32)).astype(np.uint8)
    assert len(find_clusters(features, hashes)) == 0


def test_rows_are_drawn_by_hash():
    hashes = np.random.default_rng(0).integers(0, 256, (50, 32)).astype(np.uint8)
    rows = np.arange(10, 50)
    few = first_by_hash(rows, hashes, 7)
    assert few.tolist() == sorted(sorted(rows.tolist(), key=lambda row: hashes[row].tobytes())[:7])
    np.testing.assert_array_equal(first_by_hash(rows, hashes, 99), rows)
