"""CADRef at the edges; `tests.test_parity.test_head_scores` holds its values."""

from dataclasses import replace

import numpy as np
import pytest

from stages.errors import InputError
from stages.heads.affine import LinearHead
from stages.scorers import get_scorer
from stages.scorers.features.cadref import Reference, cadref_score
from stages.scorers.inputs import ScoreInputs
from tests.test_stages.test_scorers.drawn import inputs


def rows(n=60, seed=0, bias=0.0):
    """Rows with the logits of their head; ``bias`` is added to all."""
    x = inputs(n, seed=seed)
    head = LinearHead(x.head.weight, np.full(5, bias))
    return replace(x, logits=head.logits(x.features), head=head)


def test_a_row_of_its_class_mean_scores_nothing():
    train = rows()
    predicted = train.logits.argmax(axis=1)
    means = np.stack([train.features[predicted == c].mean(axis=0) for c in range(5)])
    scores = get_scorer("cadref").fit(train).score(ScoreInputs(means, 9 * np.eye(5)))
    np.testing.assert_allclose(scores, 0, atol=1e-7)


def test_labels_are_not_read():
    train, x = rows(), rows(9, seed=1)
    alone = ScoreInputs(train.features, train.logits, head=train.head)
    np.testing.assert_array_equal(get_scorer("cadref").fit(alone).score(x), get_scorer("cadref").fit(train).score(x))


def test_what_speaks_for_the_class_counts_more_where_the_head_is_less_sure():
    two = Reference(np.ones((1, 2)), np.zeros((1, 2)), length=1.0, energy=4.0)
    towards, away = [[1.0, 1.0]], [[-1.0, -1.0]]
    for sure in (2.0, 4.0, 8.0):
        assert cadref_score(towards, [[sure]], two).tolist() == [np.float32(1 / sure)]
        assert cadref_score(away, [[sure]], two).tolist() == [0.25]


def test_a_class_that_is_never_predicted_has_the_mean_of_all_rows_and_it_says_so():
    train, x = rows(), rows(9, seed=1)
    train.logits[:, 2] = -50
    scorer = get_scorer("cadref").fit(train)
    assert scorer.params() == {"classes_never_predicted": 1}
    assert scorer.remarks() == ["classes that no ID training row is predicted to be of have the mean of all rows"]
    x.logits[:, 2] = 50
    everywhere = replace(train, logits=np.repeat(50 * np.eye(5)[2:3], 60, axis=0))
    usual = np.log(np.exp(np.float64(train.logits)).sum(axis=1)).mean()
    one = Reference(train.head.weight, np.tile(train.features.mean(axis=0), (5, 1)), 1.0, usual)
    np.testing.assert_allclose(scorer.score(x), cadref_score(x.features, x.logits, one), rtol=1e-6)
    assert get_scorer("cadref").fit(everywhere).params() == {"classes_never_predicted": 4}


def test_a_zero_row_and_one_without_energy_are_far_and_no_more():
    scorer = get_scorer("cadref").fit(rows())
    x = rows(9, seed=1)
    usual = scorer.score(x)
    zero = scorer.score(ScoreInputs(np.zeros((1, 8)), x.logits[:1]))
    unsure = scorer.score(replace(x, logits=x.logits - 100))
    assert np.isfinite([*zero, *unsure]).all()
    assert zero > usual.max()
    assert (unsure > usual).all()
    none = cadref_score(np.zeros((1, 2)), [[0.0]], Reference(np.ones((1, 2)), np.zeros((1, 2)), 0.0, 1.0))
    assert none.tolist() == [0]


def test_heads_whose_logits_are_below_0_are_taken_as_what_they_are_but_for_a_constant():
    train, x = rows(bias=-30), rows(9, seed=1, bias=-30)
    scorer = get_scorer("cadref").fit(train)
    said = "energies are of logits less their mean, for those of ID training rows are not above 0"
    assert scorer.remarks() == [said]
    same = [replace(each, logits=each.logits + 5) for each in (train, x)]
    np.testing.assert_allclose(get_scorer("cadref").fit(same[0]).score(same[1]), scorer.score(x), rtol=1e-5)
    one = LinearHead(train.head.weight[:1], np.float64([-30]))  # one class: there is nothing to be sure of
    alone = replace(train, logits=one.logits(train.features), head=one, labels=None)
    assert np.isfinite(get_scorer("cadref").fit(alone).score(alone)).all()


def test_id_rows_with_hardly_any_energy_are_said():
    train = rows()
    train.logits[4] -= 100
    said = "ID training rows with hardly any energy count as having a hundredth of the mean"
    train.logits[5:] += 10  # all others have
    assert get_scorer("cadref").fit(train).remarks() == [said]


def test_what_is_refused():
    train, x = rows(), rows(9, seed=1)
    with pytest.raises(InputError, match=r"cadref .* weights"):
        get_scorer("cadref").fit(ScoreInputs(train.features, train.logits, train.labels))
    with pytest.raises(InputError, match=r"have 5 .* 8"):
        get_scorer("cadref").fit(train).score(ScoreInputs(x.features[:, :5], x.logits))
    train.features[7, 0] = np.nan
    with pytest.raises(InputError, match=r"1 of 60 .*row 7 first"):
        get_scorer("cadref").fit(train)
