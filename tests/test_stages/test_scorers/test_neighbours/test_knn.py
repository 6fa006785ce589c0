"""kNN against all distances sorted, in the bank of each expert."""

import numpy as np
import pytest

from stages.errors import InputError, StageError
from stages.scorers.inputs import ScoreInputs
from stages.scorers.neighbours.bank import FeatureBank
from stages.scorers.neighbours.knn import ExpertBanks, KNNScorer, knn_score
from tests.test_stages.test_scorers.drawn import inputs


def test_knn_is_the_distance_to_the_kth_neighbour():
    train, x = inputs(), inputs(n=9, seed=1)
    cosine = (x.features @ train.features.T) / np.outer(*(np.linalg.norm(r.features, axis=1) for r in (x, train)))
    plain = np.sort(np.sqrt(2 - 2 * cosine), axis=1)
    for k in (1, 4, 60):
        np.testing.assert_allclose(KNNScorer(k).fit(train).score(x), plain[:, k - 1], atol=1e-6)
        np.testing.assert_allclose(knn_score(x.features, FeatureBank(train.features), k), plain[:, k - 1], atol=1e-6)


def test_each_row_is_searched_in_the_bank_of_its_expert():
    train, x = inputs(experts=2), inputs(n=20, experts=2, seed=1)
    scores = KNNScorer(k=3).fit(train).score(x)
    for e in (0, 1):
        own = KNNScorer(k=3).fit(ScoreInputs(features=train.features[train.expert == e]))
        expected = own.score(ScoreInputs(features=x.features[x.expert == e]))
        np.testing.assert_allclose(scores[x.expert == e], expected, atol=1e-6)


def test_k_larger_than_a_bank_is_clipped_and_said():
    train = inputs(n=10, classes=5, experts=2)  # 6 rows of expert 0, 4 of expert 1
    scorer = KNNScorer(k=5).fit(train)
    assert scorer.params() == {"k": 5, "k_used": {"1": 4}}
    assert scorer.remarks() == ["fewer rows than k: the farthest is the k-th"]
    assert KNNScorer(k=4).fit(train).remarks() == []
    clipped = train.expert == 1
    np.testing.assert_array_equal(scorer.score(train)[clipped], KNNScorer(4).fit(train).score(train)[clipped])
    columns = ExpertBanks(train).distances(train, k_max=8)
    assert (np.diff(columns, axis=1) >= 0).all()
    np.testing.assert_allclose(columns[:, 4], scorer.score(train), atol=1e-6)


def test_knn_refuses_what_it_cannot_search():
    train = inputs(experts=2)
    with pytest.raises(StageError, match=r"^knn .*fit"):
        KNNScorer().score(train)
    with pytest.raises(InputError, match=r"^knn\.k: 0 .* 1$"):
        KNNScorer(k=0)
    with pytest.raises(InputError, match="name an expert"):
        KNNScorer(1).fit(train).score(inputs())
    with pytest.raises(InputError, match=r"experts \[7\]"):
        KNNScorer(1).fit(train).score(ScoreInputs(features=np.ones((1, 8)), expert=np.array([7])))
    with pytest.raises(InputError, match="none given"):
        KNNScorer(1).fit(train.take(np.zeros(60, dtype=bool)))
