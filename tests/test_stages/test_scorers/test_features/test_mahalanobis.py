"""Mahalanobis distance of features divided by a power β of their norm: between its neighbours, and how β is chosen."""

import numpy as np
import pytest

from stages.errors import InputError
from stages.metrics.ranking import auroc
from stages.scorers import get_scorer
from stages.scorers.features.mahalanobis import BETA_GRID, RadialMahalanobisScorer
from stages.scorers.inputs import ScoreInputs

CLASSES, DIM = 6, 12


def rows(n, seed, lengths=0.0, pairs=False):
    """Rows of classes that differ in direction; ``lengths`` spreads norms at random.

    Of ``pairs`` two classes have one direction, and the second three times the norm.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    means = np.random.default_rng(9).normal(size=(CLASSES, DIM))
    if pairs:
        means = means[np.arange(CLASSES) // 2] * np.array([1, 3] * (CLASSES // 2))[:, None]
    features = means[labels] + rng.normal(scale=0.5, size=(n, DIM))
    features *= np.exp(lengths * rng.normal(size=n))[:, None]
    return ScoreInputs(features.astype(np.float32), labels=labels)


def divided(x, beta):
    features = x.features.astype(np.float64)
    return ScoreInputs(features / np.linalg.norm(features, axis=1, keepdims=True) ** beta, labels=x.labels)


@pytest.mark.parametrize(("beta", "neighbour"), [(0, "mahalanobis"), (1, "mahalanobis-pp")])
@pytest.mark.parametrize("n", [60, 600])  # shrunk, and not
def test_at_0_and_1_it_is_its_neighbours_to_the_bit(beta, neighbour, n):
    train, x = rows(n, 0, lengths=1), rows(30, 1, lengths=1)
    plain, ours = get_scorer(neighbour).fit(train), get_scorer("mahalanobis-radial", beta=beta).fit(train)
    np.testing.assert_array_equal(ours.score(x), plain.score(x))
    assert ours.params() == plain.params() | {"beta": beta}


@pytest.mark.parametrize("beta", [0.3, 1.5, 2])
@pytest.mark.parametrize("n", [60, 600])
def test_elsewhere_it_is_mahalanobis_of_the_divided_features(beta, n):
    train, x = rows(n, 0, lengths=1), rows(30, 1, lengths=1)
    expected = get_scorer("mahalanobis").fit(divided(train, beta)).score(divided(x, beta))
    np.testing.assert_allclose(get_scorer("mahalanobis-radial", beta=beta).fit(train).score(x), expected, rtol=1e-5)


def test_lengths_that_say_nothing_are_divided_out():
    scorer = RadialMahalanobisScorer().fit(rows(600, 0, lengths=1.5))
    assert scorer.params()["beta_used"] == 1
    assert scorer.remarks() == []


def test_and_lengths_that_tell_classes_apart_are_kept():
    train = rows(600, 0, pairs=True)
    kept, out = train.take(train.labels != 3), train.take(train.labels == 3)  # which is OOD, of a known direction
    auto, one = RadialMahalanobisScorer().fit(kept), RadialMahalanobisScorer(beta=1).fit(kept)
    assert auto.params()["beta_used"] != 1
    assert auroc(auto.score(kept), auto.score(out)) > auroc(one.score(kept), one.score(out)) + 0.1


def test_the_auroc_that_chose_is_in_the_record():
    params = RadialMahalanobisScorer().fit(rows(120, 0)).params()
    assert params["beta"] == "auto"
    assert params["beta_used"] in BETA_GRID
    assert 0.5 < params["beta_auroc"] <= 1


@pytest.mark.parametrize(
    "few",
    [
        lambda train: train.take(train.labels == 2),
        lambda train: train.take(np.arange(CLASSES)),  # one row of each class
        lambda train: train.take(np.array([0])),
    ],
)
def test_where_no_class_can_be_left_out_it_is_1_and_said(few):
    scorer = RadialMahalanobisScorer().fit(few(rows(60, 0)))
    assert scorer.params()["beta_used"] == 1
    assert "beta_auroc" not in scorer.params()
    (remark,) = scorer.remarks()
    assert "beta is 1, for no ID class can be left out and be told from others" in remark
    assert np.isfinite(scorer.score(rows(9, 1))).all()


def test_experts_choose_each_their_own():
    both = rows(600, 0, lengths=1.5), rows(600, 3, pairs=True)
    train = ScoreInputs(
        np.concatenate([each.features for each in both]),
        labels=np.concatenate([each.labels for each in both]),
        expert=np.repeat([0, 1], 600),
    )
    alone = [RadialMahalanobisScorer().fit(each).params()["beta_used"] for each in both]
    assert alone[0] != alone[1]
    assert RadialMahalanobisScorer().fit(train).params()["beta_used"] == {"0": alone[0], "1": alone[1]}


def test_of_many_rows_some_choose(monkeypatch):
    """The same ones each time; the fit is of all."""
    train = rows(600, 0, lengths=1.5)
    whole = RadialMahalanobisScorer().fit(train)
    monkeypatch.setattr("stages.scorers.features.mahalanobis._ROWS_TO_CHOOSE", 100)
    some = RadialMahalanobisScorer().fit(train)
    assert some.params() == RadialMahalanobisScorer().fit(train).params()
    assert some.params()["beta_auroc"] != whole.params()["beta_auroc"]
    x = rows(9, 1)
    if some.params()["beta_used"] == whole.params()["beta_used"]:
        np.testing.assert_array_equal(some.score(x), whole.score(x))


@pytest.mark.parametrize("beta", [0.5, 2, "auto"])
def test_zero_huge_and_tiny_rows(beta):
    train = rows(120, 0)
    features = train.features.copy()
    features[0] = 0
    features[1] *= np.float32(1e15)
    features[2] *= np.float32(1e-15)
    scorer = RadialMahalanobisScorer(beta=beta).fit(ScoreInputs(features, labels=train.labels))
    assert np.isfinite(scorer.score(ScoreInputs(features))).all()


@pytest.mark.parametrize("beta", [-0.5, 2.5, "best"])
def test_other_betas_are_refused(beta):
    with pytest.raises(InputError, match=rf"^mahalanobis-radial\.beta: '?{beta}'? given, must "):
        get_scorer("mahalanobis-radial", beta=beta)
