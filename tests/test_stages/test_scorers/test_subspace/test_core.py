"""CORE at the edges; `tests.test_parity.test_head_scores` holds its values."""

import numpy as np
import pytest

from stages.errors import InputError
from stages.heads.affine import LinearHead
from stages.scorers import get_scorer
from stages.scorers.inputs import ScoreInputs
from stages.scorers.subspace.core import row_space
from tests.test_stages.test_scorers.drawn import inputs

CUT = "what the head looks at is cut to half as many directions as there are features"


def rows(n=60, dim=8, classes=5, seed=0):
    """Rows of some classes, seen by a head on three of the features alone: what it does not see knows the class too."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    features = 3 * np.random.default_rng(9).normal(size=(classes, dim))[labels] + rng.normal(scale=0.2, size=(n, dim))
    weight = np.pad(np.random.default_rng(99).normal(size=(classes, 3)), ((0, 0), (0, dim - 3)))
    head = LinearHead(weight, np.zeros(classes))
    return ScoreInputs(features, head.logits(features), labels, head=head)


def test_a_feature_that_only_leaves_what_the_head_sees_is_found():
    train, held_out, x = rows(), rows(20, seed=1), rows(20, seed=2)
    scorer = get_scorer("core").fit(train, held_out)
    assert scorer.params() == {"rank": None, "rows": "select", "rank_used": 3, "fitted_on": "select", "fitted_rows": 20}
    turned = x.features.copy()
    turned[:, 3:] *= -1  # the same logits
    other = ScoreInputs(turned, x.logits, head=x.head)
    assert scorer.score(other).min() > scorer.score(x).max()
    np.testing.assert_array_equal(get_scorer("energy").score(other), get_scorer("energy").score(x))


def test_a_head_that_looks_at_all_features_is_cut_and_the_rank_said():
    many = rows(200, dim=8, classes=20)
    weight = np.random.default_rng(1).normal(size=(20, 8))
    head = LinearHead(weight, np.zeros(20))
    train = ScoreInputs(many.features, head.logits(many.features), many.labels, head=head)
    scorer = get_scorer("core").fit(train, train)
    assert scorer.params()["rank_used"] == 4
    assert scorer.remarks() == [CUT]
    _, _, directions = np.linalg.svd(weight)
    np.testing.assert_allclose(np.abs(directions[:4] @ row_space(weight)[0]), np.eye(4), atol=1e-12)
    assert get_scorer("core", rank=6).fit(train, train).params().get("rank_used", 6) == 6
    assert get_scorer("core", rank=6).fit(train, train).remarks() == []
    assert get_scorer("core", rank=99).fit(train, train).params()["rank_used"] == 7  # or nothing would be left


@pytest.mark.parametrize(("classes", "rank", "said"), [(1, 1, ""), (5, 5, ""), (7, 7, ""), (8, 4, CUT), (30, 4, CUT)])
def test_ranks_by_the_number_of_classes(classes, rank, said):
    seen, found = row_space(np.random.default_rng(0).normal(size=(classes, 8)))
    assert (seen.shape[1], found) == (rank, said)
    np.testing.assert_allclose(seen.T @ seen, np.eye(rank), atol=1e-12)


def test_the_weights_of_a_softmax_head_add_up_to_nothing_but_for_rounding():
    weight = np.random.default_rng(0).normal(scale=0.05, size=(50, 384))
    single = (weight - weight.mean(axis=0)).astype(np.float32)
    assert row_space(single)[0].shape[1] == 49
    assert row_space(np.zeros((50, 384)))[0].shape[1] == 0


def test_a_residual_that_is_rounding_points_nowhere():
    train = rows()
    scorer = get_scorer("core").fit(train, train)
    seen_alone = np.pad(np.random.default_rng(3).normal(size=(4, 3)), ((0, 0), (0, 5)))
    nowhere = ScoreInputs(np.float32(seen_alone), train.head.logits(seen_alone))
    found = scorer.state().learnt["none"][1]
    (mean, deviation), (cosine, spread) = found["energy"].values(), found["cosine"].values()
    energies = -np.log(np.exp(np.float64(nowhere.logits)).sum(axis=1))
    np.testing.assert_allclose(scorer.score(nowhere), (energies - mean) / deviation + (0 - cosine) / spread, rtol=1e-4)


def test_one_held_out_row_is_no_scale_and_none_leaves_the_training_rows():
    train = inputs()
    one = get_scorer("core").fit(train, inputs(1, seed=3))
    assert np.isfinite(one.score(inputs(9, seed=1))).all()
    none = get_scorer("core").fit(train, train.take(np.zeros(0, dtype=int)))
    assert none.params()["fitted_on"] == "train"
    assert none.remarks()[0].endswith("fitted on ID training rows, for no held-out row is there")
    with pytest.raises(InputError, match="core needs held-out ID rows"):
        get_scorer("core").fit(train)
    np.testing.assert_array_equal(
        get_scorer("core", rows="train").fit(train).score(train), get_scorer("core").fit(train, train).score(train)
    )


def test_scores_of_the_head_want_its_weights_and_classes():
    train = inputs()
    with pytest.raises(InputError, match=r"core .* weights"):
        get_scorer("core").fit(ScoreInputs(train.features, train.logits, train.labels), train)
    train.labels[3] = -1
    with pytest.raises(InputError, match=r"core .* class .*, 1 rows"):
        get_scorer("core").fit(train, train)
