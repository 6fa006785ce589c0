"""Sufficient statistics of ID training features: exact, in any blocks, far from the origin, in little memory."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import InputError
from stages.heads.affine import LinearHead
from stages.scorers import get_scorer
from stages.scorers.features.mahalanobis import MahalanobisScorer
from stages.scorers.inputs import ScoreInputs
from stages.scorers.shared.moments import FeatureMoments, Scatter, _triangular_whitening


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
    np.testing.assert_allclose(moments.within.matrix, apart.T @ apart, atol=1e-9)
    np.testing.assert_allclose(moments.mean, features.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(moments.total.matrix, 200 * np.cov(features.T, bias=True), atol=1e-8)
    np.testing.assert_allclose(moments.about(np.zeros(5)).matrix, features.T @ features, atol=1e-8)


def test_nothing_cancels_far_from_the_origin():
    """Σzzᵀ − nμμᵀ would lose all digits here."""
    features, labels = drawn()
    near, far = FeatureMoments().add(features, labels), FeatureMoments()
    for block in np.split(np.arange(200), 4):
        far.add(features[block] + 1e7, labels[block])
    np.testing.assert_allclose(far.within.matrix, near.within.matrix, rtol=1e-6, atol=1e-6)


def test_normalised_rows_have_length_1_and_zero_rows_stay():
    moments = FeatureMoments(normalise=True).add(np.array([[3, 4], [0, 0]], dtype=np.float16))
    assert moments.mean.tolist() == [0.3, 0.4]


def test_what_cannot_be_counted_is_refused():
    features, labels = drawn()
    with pytest.raises(InputError, match=r"200 .* labels of shape \(3,\)"):
        FeatureMoments().add(features, labels[:3])
    with pytest.raises(InputError, match=r"4 columns.* 5"):
        FeatureMoments().add(features, labels).add(features[:, :4], labels)
    with pytest.raises(InputError, match="training rows"):
        _ = FeatureMoments().mean
    with pytest.raises(InputError, match="do not vary"):
        Scatter(3).add(np.zeros((5, 3))).whitening()
    with pytest.raises(InputError, match="do not vary"):
        Scatter(30).whitening()


def test_whitened_rows_have_unit_covariance():
    features, _ = drawn()
    white = (features - features.mean(axis=0)) @ FeatureMoments().add(features).total.whitening()
    np.testing.assert_allclose(white.T @ white, np.eye(5), atol=1e-10)


def test_float32_rounding_is_cut_where_libraries_cut_it():
    scatter = Scatter(3).add(np.sqrt(np.diag([1.0, 1e-3, 1e-8])))
    assert scatter.whitening().shape == (3, 3)
    assert scatter.whitening("float32").shape == (3, 2)
    assert scatter.whitening(1e-2).shape == (3, 1)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(0, 1000), st.floats(0, 4))
def test_few_rows_and_their_matrix_have_one_spectrum(n, seed, decades):
    """Kept as rows up to half of the features, as the matrix beyond: the same pseudo-inverse."""
    rows = np.random.default_rng(seed).normal(size=(n, 24)) * np.logspace(0, -decades, 24)
    scatter, dense = Scatter(24).add(rows), Scatter(24).add(np.zeros((13, 24))).add(rows)
    np.testing.assert_allclose(scatter.matrix, dense.matrix, atol=1e-10)
    for each in (scatter, dense):
        values, vectors = each.spectrum()
        assert len(values) == min(n, 24)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(values)), atol=1e-6)
        whiten = each.whitening()
        np.testing.assert_allclose(whiten @ whiten.T @ rows.T, np.linalg.pinv(rows), rtol=1e-5, atol=1e-5)


def test_a_cholesky_factor_stands_for_eigenvectors_only_where_nothing_is_left_out():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 6)) * [1, 1, 1, 1e-2, 1e-2, 1e-4]
    matrix = rows.T @ rows
    quick = _triangular_whitening(matrix, 1e-12)
    values, vectors = np.linalg.eigh(matrix)
    np.testing.assert_allclose(quick @ quick.T, (vectors / values) @ vectors.T, rtol=1e-6)
    assert _triangular_whitening(matrix, "float32") is None  # 1e-8 of the largest counts as 0 there
    rows[:, 5] = rows[:, 4]
    assert _triangular_whitening(rows.T @ rows, 1e-12) is None


def test_many_wide_classes_take_little_memory():
    """D = 1536, C = 1000: with the test below, what a million rows take. rows × classes × D would be 9 × 10¹⁰ bytes."""
    rng = np.random.default_rng(0)
    n, dim, classes = 6000, 1536, 1000
    head = LinearHead(rng.standard_normal((classes, dim), dtype=np.float32), np.zeros(classes, np.float32))
    features = rng.standard_normal((n, dim), dtype=np.float32)
    train = ScoreInputs(features=features, labels=np.arange(n) % classes, head=head)
    for name in ("relative-mahalanobis", "vim"):
        tracemalloc.start()
        get_scorer(name).fit(train).score(train.take(slice(200)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 0.5 * 2**30, name


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
