"""CoP, CoRP and Nyström kernel PCA, at the edges; `tests.test_parity.test_kernel_pca` holds their values."""

import numpy as np
import pytest

from stages.errors import InputError
from stages.scorers import get_scorer
from stages.scorers.inputs import ScoreInputs
from tests.test_stages.test_scorers.drawn import inputs

NAMES = ("cop", "corp", "kpca-nystrom")


def of(name, **params):
    return get_scorer(name, **({"features": 64} if name == "corp" else {}) | params)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_direction_of_a_feature_counts(name):
    x, scorer = inputs(9, seed=1), of(name).fit(inputs())
    longer = ScoreInputs(x.features * np.arange(1, 10)[:, None], x.logits)
    np.testing.assert_allclose(scorer.score(longer), scorer.score(x), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_as_few_components_as_explain_the_share_and_never_all(name):
    train, x = inputs(), inputs(9, seed=1)
    dims = [of(name, variance=share).fit(train).params()["dim_used"] for share in (0.1, 0.5, 0.9, 1.0)]
    assert dims == sorted(dims)
    assert dims[0] < dims[1] < dims[2]
    width = {"cop": 8, "corp": 64, "kpca-nystrom": 60}[name]
    assert dims[3] < width
    assert (of(name, variance=1.0).fit(train).score(x) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_fewer_rows_than_features(name):
    """Of few rows the components follow each: what a new row has beyond them is left."""
    train, x = inputs(6, dim=40), inputs(9, dim=40, seed=1)
    scorer = of(name).fit(train)
    assert scorer.params()["dim_used"] <= 5
    assert scorer.score(x).min() > scorer.score(train).max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_rows_that_are_all_alike_leave_the_distance_to_them(name, n, value):
    train, x = inputs(n), inputs(9, seed=1)
    same = ScoreInputs(np.full((n, 8), value), train.logits, train.labels)
    scorer = of(name).fit(same)
    np.testing.assert_allclose(scorer.score(same), 0, atol=1e-6)
    assert (scorer.score(x) > 0.1).all()
    assert scorer.params()["dim_used"] == 0
    assert scorer.remarks() == ["rows are measured from the mean, for no two ID training rows differ"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_refused(name):
    scorer, x = of(name).fit(inputs()), inputs(9, seed=1)
    with pytest.raises(InputError, match=r"have 5 .* 8"):
        scorer.score(ScoreInputs(x.features[:, :5], x.logits))
    x.features[4, 2] = np.nan
    with pytest.raises(InputError, match=r"1 of 9 .*NaN or inf, row 4 first"):
        scorer.score(x)
    with pytest.raises(InputError, match=r"1 of 9 ID training .*row 4 first"):
        of(name).fit(x)


@pytest.mark.parametrize("name", ["cop", "corp"])
def test_no_labels_are_read(name):
    train, x = inputs(), inputs(9, seed=1)
    alone = of(name).fit(ScoreInputs(train.features))
    np.testing.assert_array_equal(alone.score(x), of(name).fit(train).score(x))


def test_random_features_are_those_of_their_seed():
    train, x = inputs(experts=2), inputs(9, experts=2, seed=1)
    first, again, other = (of("corp", seed=seed).fit(train) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.score(x), again.score(x))
    assert not np.allclose(first.score(x), other.score(x), rtol=1e-3)
    arrays = first.state().arrays
    np.testing.assert_array_equal(arrays["0.1.frequencies"], arrays["1.1.frequencies"])
    more = of("corp", features=8192).fit(train), of("corp", features=8192, seed=1).fit(train)
    np.testing.assert_allclose(more[0].score(x), more[1].score(x), rtol=0.1)  # of the same kernel, nearly


def test_landmarks_are_the_rows_that_the_head_is_least_sure_of():
    train = inputs()
    scorer = of("kpca-nystrom", landmarks=7).fit(train)
    unsure = np.sort(np.argsort(np.log(np.exp(train.logits).sum(axis=1)))[:7])
    np.testing.assert_array_equal(scorer.state().arrays["none.1.landmarks"], train.features[unsure])
    assert "landmarks_used" not in scorer.params()
    assert of("kpca-nystrom").fit(train).params()["landmarks_used"] == 60


def test_landmarks_that_are_the_same_row_count_once():
    """Their kernel matrix has no inverse; what is rounding is not blown up."""
    train, x = inputs(30), inputs(9, seed=1)
    twice = train.take(np.repeat(np.arange(30), 2))
    once, both = (of("kpca-nystrom").fit(rows).score(x) for rows in (train, twice))
    np.testing.assert_allclose(both, once, rtol=1e-4)
