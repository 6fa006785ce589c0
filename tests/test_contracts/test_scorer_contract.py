"""What every score keeps, whoever writes it: entering it in `SCORERS` is enough to be held to this."""

import json

import numpy as np
import pytest

from stages.errors import StageError
from stages.scorers import SCORERS, ScoreInputs, get_scorer

pytestmark = pytest.mark.parametrize("name", SCORERS)


def rows(n: int, seed: int, experts: int | None = None) -> ScoreInputs:
    """Rows of five classes around five directions, with logits that know them; an expert owns every second class.

    Each of two groups says "other" of most rows that are not of its classes.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, n)
    features = (np.eye(5, 12)[labels] + rng.normal(scale=0.2, size=(n, 12))).astype(np.float32)
    logits = (6 * features[:, :5]).astype(np.float32)
    others = np.clip((labels[:, None] % 2 != [0, 1]) + rng.normal(scale=0.2, size=(n, 2)), 0, 1).astype(np.float32)
    if experts is None:
        return ScoreInputs(features, logits, labels, others=others)
    expert = labels % experts
    logits[np.arange(5) % experts != expert[:, None]] = -np.inf
    return ScoreInputs(features, logits, labels, expert, others)


@pytest.fixture(params=[None, 2], ids=["one model", "two experts"])
def experts(request):
    return request.param


@pytest.fixture
def fitted(name, experts):
    return get_scorer(name).fit(rows(80, 0, experts))


def test_a_score_a_row_finite_float32(fitted, experts):
    scores = fitted.score(rows(17, 1, experts))
    assert scores.shape == (17,)
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()


def test_it_names_itself_and_what_it_reads(name, fitted):
    assert fitted.name == name
    assert fitted.needs
    assert fitted.needs <= {"logits", "features", "others", "bank"}


def test_the_score_of_a_row_is_its_own(fitted, experts):
    """Neither the order of the rows nor the other rows of the call matter."""
    x = rows(30, 1, experts)
    scores = fitted.score(x)
    some = np.array([7, 2, 2, 29])
    np.testing.assert_allclose(fitted.score(x.take(some)), scores[some], atol=1e-6)
    np.testing.assert_array_equal(fitted.score(x), scores)
    assert fitted.score(x.take(np.zeros(0, dtype=int))).shape == (0,)


def test_higher_is_more_ood(fitted, experts):
    inside, noise = rows(200, 1, experts), np.random.default_rng(2)
    outside = ScoreInputs(
        features=noise.normal(size=(200, 12)).astype(np.float32),
        logits=np.where(np.isfinite(inside.logits), noise.normal(scale=0.2, size=(200, 5)), -np.inf),
        expert=inside.expert,
        others=noise.uniform(0.6, 1, size=(200, 2)),
    )
    assert np.median(fitted.score(outside)) > np.median(fitted.score(inside))


def test_fitting_returns_itself_and_again_gives_the_same(name, experts):
    train, x = rows(80, 0, experts), rows(9, 1, experts)
    scorer = get_scorer(name)
    assert scorer.fit(train) is scorer
    np.testing.assert_array_equal(scorer.fit(train).score(x), get_scorer(name).fit(train).score(x))


def test_it_needs_no_more_than_it_says(name, experts):
    def only(x: ScoreInputs, *wanted: str) -> ScoreInputs:
        return ScoreInputs(**{field: getattr(x, field) for field in wanted}, expert=x.expert)

    scorer, train, x = get_scorer(name), rows(80, 0, experts), rows(9, 1, experts)
    read = sorted(scorer.needs - {"bank"})
    expected = get_scorer(name).fit(train).score(x)
    scorer.fit(only(train, "features", "labels") if "bank" in scorer.needs else train)
    np.testing.assert_array_equal(scorer.score(only(x, *read)), expected)


def test_what_it_needs_and_does_not_get_is_named(name, fitted):
    read = sorted(fitted.needs - {"bank"})
    with pytest.raises(StageError, match=f"{read[0]}"):
        fitted.score(ScoreInputs(labels=np.zeros(3, dtype=int)))


def test_inputs_are_left_as_they_are(fitted, experts):
    x = rows(9, 1, experts)
    before = rows(9, 1, experts)
    fitted.score(x)
    for array in ("features", "logits", "others"):
        np.testing.assert_array_equal(getattr(x, array), getattr(before, array))


def test_half_precision_is_near_single(fitted, experts):
    x = rows(40, 1, experts)
    half = ScoreInputs(
        x.features.astype(np.float16), x.logits.astype(np.float16), x.labels, x.expert, x.others.astype(np.float16)
    )
    np.testing.assert_allclose(fitted.score(half), fitted.score(x), atol=1e-2)


def test_its_settings_can_be_written_into_the_table(fitted):
    assert json.loads(json.dumps(fitted.params())) == fitted.params()
