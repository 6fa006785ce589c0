"""Densities on the sphere: against scipy where it can, against many digits where it cannot, and few rows a class."""

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import vonmises_fisher

from stages.scorers import get_scorer
from stages.scorers.features.vmf import NO_PAIR, VonMisesFisher, concentration_of, log_bessel, vmf_score
from stages.scorers.inputs import ScoreInputs


def drawn(n, dim, kappa, classes=1, seed=0):
    """Rows of classes with random mean directions and one concentration."""
    means = np.random.default_rng((seed, dim)).normal(size=(classes, dim))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    rng = np.random.default_rng(seed + 1)
    own = [vonmises_fisher(mean, kappa).rvs(n, random_state=rng) for mean in means]
    return ScoreInputs(np.concatenate(own), labels=np.repeat(np.arange(classes), n))


def kappa_of(train, **params):
    return get_scorer("vmf", **params).fit(train).params()["kappa"]


@settings(deadline=None, max_examples=15)
@given(dim=st.sampled_from([1, 2, 3, 7, 8, 64, 200, 201, 202, 203, 384, 1536]), length=st.floats(1e-3, 1 - 1e-5))
def test_the_concentration_has_the_mean_resultant_length(dim, length):
    """By mpmath, to 1e-8 of what is left of 1; orders from 100 on are by the expansion."""
    kappa = concentration_of(length, dim)
    mpmath.mp.dps = 30
    upper, lower = mpmath.besseli(dim / 2, kappa), mpmath.besseli(dim / 2 - 1, kappa)
    assert float(upper / lower) - length == pytest.approx(0, abs=1e-8 * (1 - length) + 1e-10 * length)
    assert log_bessel(dim / 2 - 1, kappa) == pytest.approx(float(mpmath.log(lower) - kappa), abs=1e-9)


@pytest.mark.parametrize("dim", [2, 3, 12])
def test_densities_are_those_of_scipy(dim):
    rng = np.random.default_rng(0)
    means, shares, kappas = rng.normal(size=(3, dim)), np.array([0.5, 0.3, 0.2]), np.array([2.0, 30.0, 2.0])
    x = drawn(20, dim, 1.0).features
    ours = vmf_score(5 * x, VonMisesFisher.of(shares, means, kappas))
    units = means / np.linalg.norm(means, axis=1, keepdims=True)
    parts = zip(shares, units, kappas, strict=True)
    density = sum(share * vonmises_fisher(mean, kappa).pdf(x) for share, mean, kappa in parts)
    np.testing.assert_allclose(ours, -np.log(density), rtol=1e-5, atol=1e-6)


def test_with_many_rows_the_concentration_is_scipys_of_maximum_likelihood():
    train = drawn(4000, 6, 20.0)
    assert kappa_of(train) == pytest.approx(vonmises_fisher.fit(train.features)[1], rel=1e-3)
    assert kappa_of(train, concentration="class") == kappa_of(train)


@pytest.mark.parametrize("dim", [6, 200])
def test_with_few_rows_a_class_it_is_still_that_of_all(dim):
    """Maximum likelihood makes it larger by half: the mean of two rows is close to both."""
    train = drawn(2, dim, 2.0 * dim, classes=80)
    assert kappa_of(train) == pytest.approx(2 * dim, rel=0.15)
    lengths = np.linalg.norm(train.features.reshape(80, 2, dim).mean(axis=1), axis=1)
    assert concentration_of(float(lengths.mean()), dim) > 1.5 * kappa_of(train)


def test_classes_have_concentrations_of_their_own_where_asked_and_rows_enough():
    sharp, broad, few = (
        drawn(n, 5, kappa, seed=seed) for n, kappa, seed in ((300, 80.0, 1), (300, 4.0, 2), (9, 4.0, 3))
    )
    train = ScoreInputs(
        np.concatenate([each.features for each in (sharp, broad, few)]), labels=np.repeat([0, 1, 2], [300, 300, 9])
    )
    (memory,) = (each.memory for each in get_scorer("vmf", concentration="class").fit(train)._learnt.values())
    shared = kappa_of(train)
    np.testing.assert_allclose(memory.concentrations[:2], [80, 4], rtol=0.15)
    assert memory.concentrations[2] == shared
    np.testing.assert_allclose(memory.shares, np.array([300, 300, 9]) / 609)


@pytest.mark.parametrize("dim", [3, 1536])
def test_one_row_a_class_orders_by_the_nearest_and_says_so(dim):
    rng = np.random.default_rng(0)
    train = ScoreInputs(rng.normal(size=(4, dim)), labels=np.arange(4))
    x = ScoreInputs(train.features.repeat(3, axis=0) + rng.normal(scale=0.2, size=(12, dim)))
    scorer = get_scorer("vmf").fit(train)
    assert scorer.remarks() == [NO_PAIR]
    scores = scorer.score(x)
    assert np.isfinite(scores).all()
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x.features, train.features)]
    np.testing.assert_array_equal(np.argsort(scores), np.argsort(-(unit[0] @ unit[1].T).max(axis=1)))
    assert get_scorer("vmf").fit(ScoreInputs(x.features, labels=np.arange(12) // 3)).remarks() == []


def test_rows_that_are_alike_and_rows_that_are_nothing_alike():
    """The concentration stays between its bounds, and every score a number."""
    rng = np.random.default_rng(0)
    same = ScoreInputs(np.ones((10, 300)), labels=np.arange(10) % 2)
    noise = ScoreInputs(rng.normal(size=(40, 300)), labels=np.arange(40) % 2)
    zero = ScoreInputs(np.zeros((10, 300)), labels=np.arange(10) % 2)
    opposite = ScoreInputs(np.r_[np.ones((5, 300)), -np.ones((5, 300))], labels=np.zeros(10, int))
    for train in (same, noise, zero, opposite):
        scorer = get_scorer("vmf").fit(train)
        for x in (same, noise, zero):
            assert np.isfinite(scorer.score(x)).all()
