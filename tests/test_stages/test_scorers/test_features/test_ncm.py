"""NCM against class means written out plainly, of each expert's classes."""

import numpy as np
import pytest

from stages.errors import InputError, StageError
from stages.scorers.features.ncm import NCMScorer
from stages.scorers.inputs import ScoreInputs
from tests.test_stages.test_scorers.drawn import inputs


def test_ncm_is_the_distance_to_the_nearest_class_mean():
    train, x = inputs(), inputs(n=9, seed=1)
    unit = train.features / np.linalg.norm(train.features, axis=1, keepdims=True)
    means = np.stack([unit[train.labels == c].mean(0) for c in range(5)])
    cosine = (x.features @ means.T) / np.outer(*(np.linalg.norm(r, axis=1) for r in (x.features, means)))
    scorer = NCMScorer().fit(train)
    np.testing.assert_allclose(scorer.score(x), np.sqrt(2 - 2 * cosine).min(1), atol=1e-6)
    longer = ScoreInputs(features=train.features * np.arange(1, 61)[:, None], labels=train.labels)
    np.testing.assert_allclose(NCMScorer().fit(longer).score(x), scorer.score(x), atol=1e-6)  # directions alone count


def test_each_row_is_compared_with_the_classes_of_its_expert():
    train, x = inputs(experts=2), inputs(n=20, experts=2, seed=1)
    scores = NCMScorer().fit(train).score(x)
    for e in (0, 1):
        own = NCMScorer().fit(
            ScoreInputs(features=train.features[train.expert == e], labels=train.labels[train.expert == e])
        )
        expected = own.score(ScoreInputs(features=x.features[x.expert == e]))
        np.testing.assert_allclose(scores[x.expert == e], expected, atol=1e-6)


def test_ncm_refuses_what_has_no_means():
    with pytest.raises(StageError, match=r"^ncm .*fit"):
        NCMScorer().score(inputs())
    with pytest.raises(InputError, match="labels"):
        NCMScorer().fit(ScoreInputs(features=np.ones((3, 8))))
    with pytest.raises(InputError, match="none given"):
        NCMScorer().fit(inputs().take(np.zeros(60, dtype=bool)))
    with pytest.raises(InputError, match=r"^1 of 3 ID training features .* row 1 "):
        NCMScorer().fit(ScoreInputs(features=np.array([[1.0], [np.nan], [2.0]]), labels=np.zeros(3, int)))
    with pytest.raises(InputError, match=r"experts \[7\]"):
        NCMScorer().fit(inputs(experts=2)).score(ScoreInputs(features=np.ones((1, 8)), expert=np.array([7])))
