"""Covariances of few rows: the coefficients are scikit-learn's, and no score falls to chance where rows are scarce."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf, oas
from sklearn.datasets import load_digits

from stages.compare import compare_scores
from stages.heads.choose import fit_head
from stages.metrics.ranking import auroc
from stages.scorers import get_scorer
from stages.scorers.inputs import ScoreInputs
from stages.scorers.shared.moments import Scatter, fourth_moment, moments_of
from stages.scorers.shared.shrinkage import (
    ENOUGH_ROWS,
    is_scarce,
    ledoit_wolf_intensity,
    oas_intensity,
    shrunk_about_zero,
    shrunk_scatter,
)

INVERTS = ("mahalanobis", "mahalanobis-pp", "relative-mahalanobis", "relative-mahalanobis-pp", "ssd", "gmm", "pnml",
           "wdiscood")  # fmt: skip
SPLITS = ("residual", "vim", "neco")


def wide(n: int, dim: int, classes: int, seed: int) -> tuple[ScoreInputs, ScoreInputs, ScoreInputs]:
    """ID training rows, ID test rows, and OOD rows of other classes that scatter twice as far; far from each other.

    Every row has the same ten directions in which it varies much, and some noise in all.
    """
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(dim, 2 * classes + 11)))[0].T
    known, other, varied, common = np.split(12 * directions, [classes, 2 * classes, 2 * classes + 10])
    labels = np.arange(n) % classes

    def drawn(means: np.ndarray, count: int, noise: float) -> np.ndarray:
        some = means[np.arange(count) % classes] + 2 * common + rng.normal(size=(count, 10)) @ varied / 4
        return np.float32(some + rng.normal(scale=noise, size=(count, dim)))

    features = drawn(known, n, 0.3)
    head = fit_head(features, labels.astype(np.int32), classes, 0.1).on_raw_features()
    test, ood = (ScoreInputs(drawn(means, 150, noise), head=head) for means, noise in ((known, 0.3), (other, 0.6)))
    return ScoreInputs(features, None, labels, head=head), test, ood


def separation(name: str, rows: tuple[ScoreInputs, ScoreInputs, ScoreInputs], **params) -> float:
    train, test, ood = rows
    scorer = get_scorer(name, **params).fit(train)
    return auroc(scorer.score(test), scorer.score(ood))


@pytest.mark.parametrize("name", [*INVERTS, *SPLITS])
@settings(deadline=None, max_examples=4)
@given(n=st.integers(30, 120), dim=st.sampled_from([256, 400]), classes=st.integers(2, 10), seed=st.integers(0, 99))
def test_fewer_rows_than_features_separate_what_can_be_separated(name, n, dim, classes, seed):
    assert separation(name, wide(n, dim, classes, seed)) > 0.95


def test_where_there_was_no_shrinkage_they_fell_to_chance_and_below():
    rows = wide(60, 1280, 10, 0)
    for name in ("ssd", "pnml"):
        assert separation(name, rows, shrinkage="none") < 0.3
        assert separation(name, rows) > 0.99


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 60), dim=st.integers(1, 40), seed=st.integers(0, 999), decades=st.floats(0, 3))
def test_the_intensities_are_those_of_scikit_learn(n, dim, seed, decades):
    rows = np.random.default_rng(seed).normal(size=(n, dim)) * np.logspace(0, -decades, dim)
    scatter = Scatter(dim).add(rows)
    theirs, intensity = ledoit_wolf(rows, assume_centered=True)
    ours = ledoit_wolf_intensity(scatter, n, float((np.square(rows).sum(axis=1) ** 2).sum()))
    assert ours == pytest.approx(intensity if dim > 1 else 0, abs=1e-8)  # one number is its own mean
    np.testing.assert_allclose(scatter.shrunk(ours).matrix / n, theirs, rtol=1e-8, atol=1e-12)
    theirs, intensity = oas(rows, assume_centered=True)
    np.testing.assert_allclose(scatter.shrunk(oas_intensity(scatter, n)).matrix / n, theirs, rtol=1e-8, atol=1e-12)
    assert oas_intensity(scatter, n) == pytest.approx(intensity, abs=1e-8)


@pytest.mark.parametrize(("rule", "theirs"), [("ledoit-wolf", ledoit_wolf), ("oas", oas)])
@pytest.mark.parametrize("normalise", [False, True])
def test_covariances_of_real_rows_around_their_class_means_are_those_of_scikit_learn(rule, theirs, normalise):
    """Read block by block, of rows whose order is not that of their classes."""
    images, labels = load_digits(return_X_y=True)
    train = ScoreInputs(features=images.astype(np.float32), labels=labels)
    moments = moments_of(train, "a test", normalise)
    rows = images / np.linalg.norm(images, axis=1, keepdims=True) if normalise else images
    around = rows - np.stack([rows[labels == c].mean(axis=0) for c in range(10)])[labels]
    covariance, intensity = theirs(around, assume_centered=True)
    shrunk = shrunk_scatter(train, "a test", moments, rule)
    assert shrunk.intensity == pytest.approx(intensity, rel=1e-6)
    np.testing.assert_allclose(shrunk.scatter.matrix / len(rows), covariance, rtol=1e-6, atol=1e-9)


def test_second_moments_of_normalised_rows_are_those_of_scikit_learn():
    rows = np.random.default_rng(0).normal(size=(30, 12)) + 1
    train = ScoreInputs(features=rows)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for rule, theirs in (("auto", ledoit_wolf), ("oas", oas)):
        shrunk = shrunk_about_zero(moments_of(train, "a test", normalise=True, by_class=False), rule)
        assert shrunk.intensity == pytest.approx(theirs(rows, assume_centered=True)[1], rel=1e-6)


def test_any_blocks_give_one_fourth_moment(monkeypatch):
    rng = np.random.default_rng(0)
    train = ScoreInputs(features=rng.normal(size=(50, 6)), labels=rng.integers(0, 3, 50))
    moments = moments_of(train, "a test")
    around = train.features - moments.class_means[train.labels]
    blocks = train.blocks
    monkeypatch.setattr(ScoreInputs, "blocks", lambda self: blocks(7))
    expected = (np.square(around).sum(axis=1) ** 2).sum()
    assert fourth_moment(train, "a test", moments) == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------------- where, and what is said


def test_rows_are_scarce_below_ten_a_feature():
    assert is_scarce(79, 10, 7)
    assert not is_scarce(80, 10, 7)
    assert ENOUGH_ROWS == 10


@pytest.mark.parametrize("name", [*INVERTS, "vim", "residual"])
def test_plenty_of_rows_are_scored_as_ever_and_nothing_is_said(name):
    train, test, _ = wide(1600, 36, 4, 0)
    scorer = get_scorer(name).fit(train)
    params = {"dim": 18} if name in SPLITS else {"shrinkage": "none"}
    np.testing.assert_array_equal(scorer.score(test), get_scorer(name, **params).fit(train).score(test))
    assert scorer.remarks() == []
    assert not {"shrinkage_intensity", "covariances_shrunk"} & scorer.params().keys()


@pytest.mark.parametrize("name", [*INVERTS, "vim", "residual"])
def test_few_rows_are_said(name):
    scorer = get_scorer(name).fit(wide(60, 100, 4, 0)[0])
    (remark,) = scorer.remarks()
    assert "fewer than 10 rows a" in remark
    assert {"shrinkage_intensity", "covariances_shrunk", "dim_used"} & scorer.params().keys()


@pytest.mark.parametrize("name", INVERTS)
@pytest.mark.parametrize("profile", ["openood", "pytorch-ood"])
def test_profiles_stay_what_the_libraries_do(name, profile):
    scorer = get_scorer(name, profile)
    if scorer.profiles.get(profile):
        assert scorer.shrinkage == "none"
        assert scorer.fit(wide(60, 100, 4, 0)[0]).remarks() == []


def test_experts_are_shrunk_each_by_its_own_rows():
    train, *_ = wide(1200, 36, 4, 0)
    routed = ScoreInputs(train.features, None, train.labels, (np.arange(1200) % 40 == 0).astype(int))
    scorer = get_scorer("mahalanobis").fit(routed)  # 1,170 rows and 30
    assert list(scorer.params()["shrinkage_intensity"]) == ["1"]
    assert len(scorer.remarks()) == 1


def test_a_class_of_few_rows_leans_on_the_others():
    """Gaussian of a class with one row, as of one with all: its covariance is what all classes have."""
    train, test, ood = wide(1000, 20, 4, 0)
    few = train.take(np.flatnonzero((train.labels != 2) | (np.arange(1000) == 2)))
    scorer = get_scorer("gmm").fit(few)
    assert scorer.params()["covariances_shrunk"] == 1
    assert auroc(scorer.score(test), scorer.score(ood)) > 0.99


def test_compare_scores_says_it_below_its_table():
    train, test, ood = wide(60, 100, 4, 0)
    found = compare_scores({"features": train.features, "labels": train.labels}, test.features, ood.features, "ssd")
    assert found.notes == ["ssd: the covariance is shrunk, for there are fewer than 10 rows a feature"]
    assert str(found).splitlines()[-1] == found.notes[0]
