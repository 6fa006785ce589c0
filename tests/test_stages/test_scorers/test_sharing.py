"""Scores that are fitted on the same rows together: each learns what it learns alone, and moments are gathered once."""

from dataclasses import replace

import numpy as np
import pytest

from stages.scorers import SCORERS, get_scorer
from stages.scorers.shared.moments import FeatureMoments
from tests.test_contracts.test_scorer_contract import rows


@pytest.mark.parametrize("experts", [None, 2], ids=["one model", "two experts"])
@pytest.mark.parametrize("n", [80, 15], ids=["rows enough", "covariances are shrunk"])
def test_beside_all_others_a_score_learns_what_it_learns_alone(n, experts):
    train, select = rows(n, 0, experts), rows(40, 3, experts)
    shared = replace(train, shared={})
    for name in [*SCORERS, *reversed([*SCORERS])]:  # after those before it in the list, and after all others
        together, alone = (get_scorer(name).fit(own, select).state() for own in (shared, train))
        assert together.learnt == alone.learnt, name
        assert together.arrays.keys() == alone.arrays.keys()
        for key, array in alone.arrays.items():
            np.testing.assert_array_equal(together.arrays[key], array, err_msg=f"{name}: {key}")
    assert shared.shared


def test_moments_of_all_rows_are_gathered_once(monkeypatch):
    added, add = [], FeatureMoments.add
    monkeypatch.setattr(FeatureMoments, "add", lambda self, *given: added.append(len(given[0])) or add(self, *given))
    train = rows(80, 0)
    for own, passes in ((train, 4), (replace(train, shared={}), 2)):
        added.clear()
        for name in ("mahalanobis", "relative-mahalanobis", "mahalanobis-pp", "wdiscood"):  # two of rows as they are
            get_scorer(name).fit(own)
        assert sum(added) == passes * 80


def test_other_rows_share_nothing():
    """What is taken of rows, or made of a few of them, is fitted on those alone."""
    train = replace(rows(80, 0), shared={})
    get_scorer("mahalanobis").fit(train)
    few = train.take(slice(40))
    assert few.shared is None
    x = rows(9, 1)
    np.testing.assert_array_equal(
        get_scorer("mahalanobis").fit(few).score(x), get_scorer("mahalanobis").fit(rows(80, 0).take(slice(40))).score(x)
    )
