"""Replicates are the metrics of the rows that were drawn, and pair where the counts are the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import InputError
from stages.metrics.bootstrap import Resamples, bootstrap_each, bootstrap_metrics, resample_counts
from stages.metrics.ranking import auroc, fpr95

tied_scores = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=40).map(np.array)  # ties in every example


@settings(max_examples=30, deadline=None)
@given(tied_scores, tied_scores, st.integers(0, 99))
def test_a_replicate_is_the_metric_of_the_repeated_rows(ids, oods, seed):
    id_counts, ood_counts = resample_counts(len(ids), 5, seed), resample_counts(len(oods), 5, seed + 1)
    replicates = bootstrap_metrics(ids, oods, id_counts, ood_counts)
    for r in range(5):
        drawn = np.repeat(ids, id_counts[r]), np.repeat(oods, ood_counts[r])
        assert replicates["auroc"][r] == pytest.approx(auroc(*drawn))
        assert replicates["fpr95"][r] == fpr95(*drawn)


def test_replicates_against_several_sets_are_those_against_each():
    rng = np.random.default_rng(0)
    ids, oods = rng.normal(size=50).round(1), [rng.normal(1, size=n).round(1) for n in (70, 30)]
    id_counts, *counts = (resample_counts(n, 20, seed) for seed, n in enumerate((50, 70, 30)))
    for index, found in enumerate(bootstrap_each(ids, oods, id_counts, counts)):
        alone = bootstrap_metrics(ids, oods[index], id_counts, counts[index])
        for name, values in found.items():
            np.testing.assert_array_equal(values, alone[name])
    with pytest.raises(InputError, match=r"\(20, 50\) and \(20, 30\) .* 50 ID and 70 OOD"):
        bootstrap_each(ids, oods, id_counts, counts[::-1])


def test_counts_are_seeded_and_draw_as_many_rows_as_there_are():
    counts = resample_counts(200, 300, seed=3)
    assert (counts.sum(axis=1) == 200).all()
    np.testing.assert_array_equal(counts, resample_counts(200, 300, seed=3))
    assert not np.array_equal(counts, resample_counts(200, 300, seed=4))
    assert counts.var() == pytest.approx(1, rel=0.05)  # Binomial(n, 1/n)


def test_counts_that_are_not_held_are_drawn_alike_at_every_walk():
    ids, oods = np.random.default_rng(0).normal(size=60), np.random.default_rng(1).normal(1, size=40)
    held = bootstrap_metrics(ids, oods, resample_counts(60, 30, seed=0), resample_counts(40, 30, seed=1))
    drawn = Resamples(60, 30, seed=0), Resamples(40, 30, seed=1)
    for _ in range(2):  # for the next method once more
        for name, values in bootstrap_metrics(ids, oods, *drawn).items():
            np.testing.assert_array_equal(values, held[name])


def test_interval_covers_the_truth_and_pairing_narrows_a_difference():
    rng = np.random.default_rng(5)
    ids, oods = rng.normal(size=400), rng.normal(1, size=400)
    counts = resample_counts(400, 500, seed=6), resample_counts(400, 500, seed=7)
    low, high = np.quantile(bootstrap_metrics(ids, oods, *counts)["auroc"], [0.025, 0.975])
    assert low < 0.7602 < high  # Φ(1 / √2), what two unit normals one apart have
    assert 0.03 < high - low < 0.10

    noisy = ids + rng.normal(scale=0.1, size=400), oods + rng.normal(scale=0.1, size=400)  # nearly the same method
    paired = bootstrap_metrics(ids, oods, *counts)["auroc"] - bootstrap_metrics(*noisy, *counts)["auroc"]
    assert np.diff(np.quantile(paired, [0.025, 0.975])) < (high - low) / 5


def test_bad_counts_are_refused():
    with pytest.raises(InputError, match="at least 1"):
        resample_counts(0, 10, seed=0)
    counts = resample_counts(3, 4, seed=0)
    with pytest.raises(InputError, match="3 ID and 2 OOD"):
        bootstrap_metrics(np.arange(3), np.arange(2), counts, counts)
