"""WDiscOOD: what its settings turn, and where classes are few."""

import numpy as np
import pytest

from stages.scorers import get_scorer
from stages.scorers.inputs import ScoreInputs
from stages.scorers.shared.moments import moments_of


def rows(n=200, seed=0, dim=10, classes=5):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    means = np.random.default_rng(9).normal(size=(classes, dim))
    return ScoreInputs(means[labels] + rng.normal(scale=0.4, size=(n, dim)), labels=labels)


def score(train, x, **settings):
    return get_scorer("wdiscood", **settings).fit(train).score(x)


def test_without_the_rest_and_with_all_directions_it_orders_as_mahalanobis_of_their_space():
    """Along C − 1 directions the means lie; the distance to a mean is theirs, but for what is the same to all means."""
    train, x = rows(), rows(30, 1)
    settings = {"normalise": False, "shrinkage": "none"}
    both, along = (score(train, x, weight=weight, **settings).astype(np.float64) for weight in (1.0, 0.0))
    mahalanobis = get_scorer("mahalanobis", shrinkage="none").fit(train).score(x)
    np.testing.assert_allclose(along**2 + (both - along) ** 2, mahalanobis, rtol=1e-5)


def test_the_weight_is_of_the_rest():
    train, x = rows(), rows(30, 1)
    none, one, five = (score(train, x, weight=weight).astype(np.float64) for weight in (0.0, 1.0, 5.0))
    np.testing.assert_allclose(five, none + 5 * (one - none), rtol=1e-5)


def test_lengths_count_where_nothing_is_normalised():
    train, x = rows(), rows(30, 1)
    longer = ScoreInputs(3 * x.features)
    np.testing.assert_allclose(score(train, longer), score(train, x), rtol=1e-6)
    assert (score(train, longer, normalise=False) > score(train, x, normalise=False)).mean() > 0.9


def test_directions_are_no_more_than_means_can_differ_in():
    train, x = rows(), rows(30, 1)
    auto = get_scorer("wdiscood").fit(train)
    assert auto.params()["directions_used"] == 4  # of five classes
    many = get_scorer("wdiscood", directions=9).fit(train)
    assert many.params()["directions_used"] == 4
    np.testing.assert_array_equal(many.score(x), auto.score(x))
    two = get_scorer("wdiscood", directions=2).fit(train)
    assert "directions_used" not in two.params()
    assert not np.allclose(two.score(x), auto.score(x))
    wide = rows(400, dim=6, classes=8)
    assert get_scorer("wdiscood").fit(wide).params()["directions_used"] == 4  # two thirds of six features


def test_of_one_class_the_rest_is_all():
    train = rows().take(rows().labels == 2)
    x = rows(30, 1)
    scorer = get_scorer("wdiscood", shrinkage="none").fit(train)
    assert scorer.params()["directions_used"] == 0
    ssd = get_scorer("ssd", shrinkage="none").fit(train).score(x)
    np.testing.assert_allclose(scorer.score(x).astype(np.float64) ** 2, ssd, rtol=1e-5)


def test_classes_count_alike_whatever_their_rows():
    """The authors' scatter between classes is that of the means, not of the rows' means."""
    train, x = rows(), rows(30, 1)
    uneven = train.take((train.labels != 0) | (np.arange(200) < 40))
    means = moments_of(uneven, "a test", normalise=True).class_means
    scorer = get_scorer("wdiscood", directions=1, shrinkage="none").fit(uneven)
    (learnt,) = (each.memory for each in scorer._learnt.values())
    white = (means - learnt.origin) @ learnt.whiten
    _, vectors = np.linalg.eigh(white.T @ white)
    assert abs(vectors[:, -1] @ learnt.directions[:, 0]) == pytest.approx(1, rel=1e-9)
    assert np.isfinite(scorer.score(x)).all()
