"""NAC at the edges; `tests.test_parity.test_head_scores` holds its values."""

import numpy as np
import pytest

from stages.errors import InputError
from stages.scorers import get_scorer
from stages.scorers.features.nac import bin_edges, nac_score
from stages.scorers.inputs import ScoreInputs
from tests.test_stages.test_scorers.drawn import inputs


@pytest.mark.parametrize("dense", ["middle", "ends"])
@pytest.mark.parametrize("bins", [4, 6, 50, 500])
def test_edges_are_symmetric_and_one_is_in_the_middle(bins, dense):
    edges = bin_edges(bins, dense)
    assert len(edges) == bins - (3 if dense == "middle" else 1)
    assert (np.diff(edges) > 0).all()
    np.testing.assert_allclose(edges, 1 - edges[::-1], rtol=0, atol=1e-15)
    assert edges[len(edges) // 2] == 0.5


def test_a_neuron_that_is_always_0_is_covered_and_counts_for_all_rows():
    train, x = inputs(), inputs(9, seed=1)
    for each in (train, x):
        each.features[:, 3] = 0
    scores = get_scorer("nac", full=60).fit(train).score(x)
    assert (scores <= -1 / 8).all()
    assert (get_scorer("nac", "pytorch-ood", full=60).fit(train).score(x) <= -1 / 8).all()


def test_a_row_that_was_fitted_on_is_covered_at_least_once_in_every_neuron():
    train = inputs()
    scores = get_scorer("nac", full=60).fit(train).score(train)
    assert (scores <= -1 / 60 + 1e-6).all()
    assert (scores >= -1).all()
    np.testing.assert_array_equal(get_scorer("nac", full=1).fit(train).score(train), -1)


def test_states_that_no_row_had_are_not_covered():
    train, x = inputs(), inputs(9, seed=1)
    far = ScoreInputs(-1e6 * x.features, x.logits)
    scorer = get_scorer("nac").fit(train)
    assert scorer.score(far).mean() > scorer.score(x).mean()
    assert nac_score([[0.1], [0.9]], [0.5], [[0.0, 0.5]]).tolist() == [0, -0.5]


def test_fewer_rows_than_cover_a_bin_are_said():
    few = get_scorer("nac").fit(inputs(10))
    assert few.remarks() == ["no bin is covered in full, for there are fewer rows than that takes"]
    assert get_scorer("nac").fit(inputs(50)).remarks() == []
    assert few.score(inputs(9, seed=1)).min() >= np.float32(-10 / 50)


def test_counts_do_not_depend_on_the_order_of_rows():
    train, x = inputs(), inputs(9, seed=1)
    turned = train.take(np.arange(60)[::-1])
    np.testing.assert_array_equal(get_scorer("nac").fit(turned).score(x), get_scorer("nac").fit(train).score(x))


def test_what_is_refused():
    train, x = inputs(), inputs(9, seed=1)
    with pytest.raises(InputError, match=r"nac .* weights"):
        get_scorer("nac").fit(ScoreInputs(train.features, train.logits, train.labels))
    with pytest.raises(InputError, match=r"nac\.bins: 7 given, must be a multiple of 2"):
        get_scorer("nac", bins=7)
    with pytest.raises(InputError, match=r"have 5 .* 8"):
        get_scorer("nac").fit(train).score(ScoreInputs(x.features[:, :5], x.logits))
    train.features[7, 0] = np.inf
    with pytest.raises(InputError, match=r"1 of 60 .*row 7 first"):
        get_scorer("nac").fit(train)
