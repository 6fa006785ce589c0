"""Sufficient statistics of ID training features: exact, in any blocks, far from the origin, in little memory."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import InputError
from stages.scorers import ScoreInputs
from stages.scorers.mahalanobis import MahalanobisScorer
from stages.scorers.moments import FeatureMoments, whitening


def drawn(n=200, dim=5, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n) * 4  # numbers of classes may have gaps
    return rng.normal(size=(n, dim)) + labels[:, None], labels


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 200), max_size=6), st.integers(0, 1000))
def test_any_blocks_give_the_statistics_of_all_rows(cuts, seed):
    features, labels = drawn(seed=seed)
    moments = FeatureMoments()
    for block in np.split(np.arange(200), np.sort(cuts)):
        moments.add(features[block], labels[block])
    classes = np.unique(labels)
    means = np.stack([features[labels == c].mean(axis=0) for c in classes])
    apart = features - means[np.searchsorted(classes, labels)]
    np.testing.assert_array_equal(moments.classes, classes)
    np.testing.assert_array_equal(moments.counts, [np.sum(labels == c) for c in classes])
    np.testing.assert_allclose(moments.class_means, means, atol=1e-12)
    np.testing.assert_allclose(moments.within, apart.T @ apart, atol=1e-9)
    np.testing.assert_allclose(moments.mean, features.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(moments.total, 200 * np.cov(features.T, bias=True), atol=1e-8)
    np.testing.assert_allclose(moments.about(np.zeros(5)), features.T @ features, atol=1e-8)


def test_nothing_cancels_far_from_the_origin():
    """Σzzᵀ − nμμᵀ would lose all digits here."""
    features, labels = drawn()
    near, far = FeatureMoments().add(features, labels), FeatureMoments()
    for block in np.split(np.arange(200), 4):
        far.add(features[block] + 1e7, labels[block])
    np.testing.assert_allclose(far.within, near.within, rtol=1e-6, atol=1e-6)


def test_normalised_rows_have_length_1_and_zero_rows_stay():
    moments = FeatureMoments(normalise=True).add(np.array([[3, 4], [0, 0]], dtype=np.float16))
    assert moments.mean.tolist() == [0.3, 0.4]


def test_what_cannot_be_counted_is_refused():
    features, labels = drawn()
    with pytest.raises(InputError, match=r"200 ID training features, but labels of shape \(3,\)"):
        FeatureMoments().add(features, labels[:3])
    with pytest.raises(InputError, match="have 4 columns, those before 5"):
        FeatureMoments().add(features, labels).add(features[:, :4], labels)
    with pytest.raises(InputError, match="no ID training rows"):
        _ = FeatureMoments().mean
    with pytest.raises(InputError, match="do not vary"):
        whitening(np.zeros((3, 3)))


def test_whitened_rows_have_unit_covariance():
    features, _ = drawn()
    white = (features - features.mean(axis=0)) @ whitening(np.cov(features.T, bias=True))
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(5), atol=1e-10)


def test_float32_rounding_is_cut_where_libraries_cut_it():
    spectrum = np.diag([1.0, 1e-3, 1e-8])
    assert whitening(spectrum).shape == (3, 3)
    assert whitening(spectrum, "float32").shape == (3, 2)
    assert whitening(spectrum, 1e-2).shape == (3, 1)


def peak_of_a_fit(n, folder):
    """Bytes beyond the memory-mapped features."""
    path = folder / f"{n}.npy"
    features = np.lib.format.open_memmap(path, "w+", np.float32, (n, 64))
    for start in range(0, n, 10_000):
        features[start : start + 10_000] = np.random.default_rng(start).normal(size=(10_000, 64))
    train = ScoreInputs(features=np.load(path, mmap_mode="r"), labels=np.arange(n) % 100)
    tracemalloc.start()
    MahalanobisScorer().fit(train)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_ten_times_the_rows_take_no_more_memory(tmp_path):
    assert peak_of_a_fit(100_000, tmp_path) < 1.1 * peak_of_a_fit(10_000, tmp_path) + 8 * 100_000  # and the labels
