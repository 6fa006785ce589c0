"""Blocks of rows give one result, whatever is kept of them and however many cores there are, in flat memory."""

import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

from stages.heads import logistic, sums
from stages.heads.affine import Standardisation
from stages.heads.choose import fit_head
from stages.heads.summing import HERE
from stages.heads.sums import blocks, standardisation
from tests.test_stages.test_heads.fitting import minimum


def digits(n: int) -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.data[:n].astype(np.float32), data.target[:n].astype(np.int32)


def weights(features, labels, strength=1.0) -> np.ndarray:
    """Weight and bias in one, float64."""
    classes, own = np.unique(labels, return_inverse=True)
    weight, bias, *_ = minimum(features, own, len(classes), strength, standardisation(features), tolerance=1e-15)
    return np.concatenate([weight, bias[:, None]], axis=1)


@settings(max_examples=15)
@given(
    block=st.integers(1, 300),
    n_classes=st.integers(2, 10),
    n_rows=st.integers(60, 250),
    strength=st.sampled_from([0.01, 1.0]),
)
def test_the_size_of_a_block_does_not_matter(block, n_classes, n_rows, strength):
    features, labels = digits(n_rows)
    features, labels = features[labels < n_classes], labels[labels < n_classes]
    one = weights(features, labels, strength)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "BLOCK", block)
        other = weights(features, labels, strength)
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize("kept", [0, 300 * 64 * 4])
def test_what_is_kept_of_the_blocks_changes_no_bit(kept, monkeypatch):
    """Where all of them are, coordinates are those of the rows, which changes the last digits of float64."""
    monkeypatch.setattr(sums, "BLOCK", 100)
    features, labels = digits(950)
    whole = weights(features, labels)
    monkeypatch.setattr(sums, "KEPT_BYTES", 300 * 64 * 8)
    expected = weights(features, labels)
    np.testing.assert_allclose(expected, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    monkeypatch.setattr(sums, "KEPT_BYTES", kept)
    read = []

    class Watched:
        shape = features.shape

        def __getitem__(self, rows):
            read.append(rows.start)
            return features[rows]

    np.testing.assert_array_equal(weights(Watched(), labels), expected)
    assert read.count(900) > 10  # the last block, in every step
    assert (read.count(0) < 10) == (kept > 0)


def test_the_number_of_cores_changes_no_bit(monkeypatch):
    monkeypatch.setattr(sums, "BLOCK", 100)
    features, labels = digits(950)
    results, likelihoods = [], []
    for cores in (1, 2, 5):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        with threadpool_limits(cores):
            head = fit_head(features, labels, 10, 1.0)
            likelihoods.append(HERE.log_likelihood(head, features, labels))
            results.append(head.tensors())
    for result, likelihood in zip(results, likelihoods, strict=True):
        np.testing.assert_array_equal(likelihood, likelihoods[0])
        for name, array in result.items():
            np.testing.assert_array_equal(array, results[0][name])


def test_blocks_hold_every_row_once():
    assert [(block.start, block.stop) for block in blocks(2500)] == [(0, 1024), (1024, 2048), (2048, 2500)]
    assert list(blocks(0)) == []


def test_far_from_the_origin_the_scale_is_exact(monkeypatch):
    monkeypatch.setattr(sums, "BLOCK", 100)
    features = np.random.default_rng(0).normal(1e4, [1e-2, 1, 3], size=(1000, 3))
    found = standardisation(features)
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-7)
    np.testing.assert_allclose(found.scale, np.sqrt(features.var(0).mean()), rtol=1e-7)
    assert (found.mean.dtype, found.scale.dtype, found.scale.shape) == (np.float32, np.float32, (1,))


def test_features_that_do_not_vary_are_divided_by_something():
    assert standardisation(np.full((5, 3), 7.0)).scale == np.float32(1e-6)


def test_a_solver_that_stops_before_the_minimum_says_so(monkeypatch):
    features, labels = digits(300)
    standardise = standardisation(features)
    assert minimum(features, labels, 10, 0.1, standardise).converged
    assert not minimum(features, labels, 10, 0.1, standardise, max_iter=3).converged
    assert fit_head(features, labels, 10, 0.1).converged
    monkeypatch.setattr(logistic, "MAX_STEPS", 3)
    assert not fit_head(features, labels, 10, 0.1).converged


def peak_of_a_fit(n, folder, kept):
    """Bytes beyond the memory-mapped features, of a fit and of judging it."""
    path = folder / f"{n}.npy"
    features = np.lib.format.open_memmap(path, "w+", np.float32, (n, 64))
    labels = (np.arange(n) % 5).astype(np.int32)
    for start in range(0, n, 10_000):
        rows = slice(start, start + 10_000)
        features[rows] = np.random.default_rng(start).normal(size=(10_000, 64)) + labels[rows, None]
    features = np.load(path, mmap_mode="r")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "KEPT_BYTES", kept)
        tracemalloc.start()
        head = fit_head(features, labels, 5, 0.001)
        assert HERE.log_likelihood(head, features, labels).mean() > np.log(1 / 5)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_ten_times_the_rows_take_no_more_memory(tmp_path):
    a_row = 48  # bytes: its label, its likelihood and their like; its features are 256, and 512 in float64
    assert peak_of_a_fit(100_000, tmp_path, 1 << 20) < 1.1 * peak_of_a_fit(10_000, tmp_path, 1 << 20) + a_row * 100_000


def test_many_wide_classes_take_little_memory():
    """D = 1536, C = 1000: with the test above, what a million rows take."""
    features = np.random.default_rng(0).standard_normal((1200, 1536), np.float32)
    standardise = Standardisation(np.zeros(1536, np.float32), np.ones(1, np.float32))
    tracemalloc.start()
    minimum(features, np.arange(1200) % 1000, 1000, 1.0, standardise, max_iter=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 30
