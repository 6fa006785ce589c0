"""AURC and AUGRC against the authors' definition written out row by row, their closed form, and what they promise."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from stages.errors import InputError
from stages.metrics.selective import SELECTIVE, augrc, aurc, selective_metrics

# Few distinct scores, so that rows tie in every example.
rows = st.lists(st.tuples(st.integers(-4, 4).map(float), st.booleans()), min_size=1, max_size=30).map(
    lambda pairs: tuple(map(np.array, zip(*pairs, strict=True)))
)


def plain_areas(scores, failures):
    """As fd-shifts has it: from all rows down, a point where the next more confident row has another confidence.

    Traub et al. 2024; the point at coverage 0 has the risk of the last one (AURC), or none (AUGRC).
    """
    confidence, n = -scores, len(scores)
    order = np.argsort(confidence)
    confidence, residuals = confidence[order], failures[order].astype(float)
    coverages, selective, generalised = [1.0], [residuals.mean()], [residuals.mean()]
    for row in range(1, n):
        if confidence[row] != confidence[row - 1]:
            coverages.append((n - row) / n)
            selective.append(residuals[row:].sum() / (n - row))
            generalised.append(residuals[row:].sum() / n)
    coverages.append(0.0)
    selective.append(selective[-1])
    generalised.append(0.0)
    return -np.trapezoid(selective, coverages), -np.trapezoid(generalised, coverages)


@given(rows)
def test_areas_are_those_of_the_authors(pair):
    assert (aurc(*pair), augrc(*pair)) == pytest.approx(plain_areas(*pair), abs=1e-12)


@given(rows)
def test_augrc_is_what_its_closed_form_says(pair):
    scores, failures = pair
    error = failures.mean()
    if error in (0, 1):
        assert augrc(*pair) == error / 2
        return
    wins = roc_auc_score(failures, scores)  # a wrong row is less sure than a right one, ties half
    assert augrc(*pair) == pytest.approx((1 - error) * error * (1 - wins) + error**2 / 2, abs=1e-12)


@given(rows, st.randoms())
def test_neither_order_nor_scale_of_the_scores_matters(pair, random):
    scores, failures = pair
    order = list(range(len(scores)))
    random.shuffle(order)
    for area in (aurc, augrc):
        assert area(scores[order], failures[order]) == area(scores, failures)
        assert area(np.exp(scores) * 7 + 1, failures) == area(scores, failures)


@given(rows)
def test_bounds(pair):
    error = pair[1].mean()
    assert error**2 / 2 - 1e-12 <= augrc(*pair) <= error - error**2 / 2 + 1e-12
    assert 0 <= augrc(*pair) <= aurc(*pair) + 1e-12
    assert aurc(*pair) <= 1


def test_a_tie_counts_in_augrc_as_the_mean_over_all_ways_to_break_it():
    scores, failures = np.array([1, 2, 2, 2, 3.0]), np.array([0, 1, 0, 0, 1])
    broken = [np.add(scores, [0, *order, 0]) for order in permutations([0.0, 0.1, 0.2])]
    assert augrc(scores, failures) == pytest.approx(np.mean([augrc(each, failures) for each in broken]))


def test_values_by_hand():
    assert (aurc([1, 2], [False, True]), augrc([1, 2], [False, True])) == (1 / 8, 1 / 8)
    assert (aurc([1, 2], [True, False]), augrc([1, 2], [True, False])) == (7 / 8, 3 / 8)
    assert (aurc([5, 5, 5, 5], [0, 0, 0, 1]), augrc([5, 5, 5, 5], [0, 0, 0, 1])) == (1 / 4, 1 / 8)
    assert (aurc([3], [1]), augrc([3], [1])) == (1, 1 / 2)
    assert (aurc([3, 4], [0, 0]), augrc([3, 4], [0, 0])) == (0, 0)


def test_rows_of_which_nobody_knows_whether_they_are_wrong_count_for_nothing():
    found = selective_metrics([0.1, 9, 0.2, 0.3], [0, -1, 1, 0])
    assert found == {"aurc": aurc([0.1, 0.2, 0.3], [0, 1, 0]), "augrc": augrc([0.1, 0.2, 0.3], [0, 1, 0])}
    assert selective_metrics([0.1, 9], [-1, -1]) == {"aurc": None, "augrc": None} == dict.fromkeys(SELECTIVE)


@pytest.mark.parametrize(("scores", "failures"), [([1, 2], [1]), ([1, 2], [0, 2]), ([], []), ([np.nan], [1])])
def test_what_cannot_be_judged_is_refused(scores, failures):
    for area in (aurc, augrc):
        with pytest.raises(InputError, match=r"scores"):
            area(scores, failures)
