"""Promises within groups: what is compared with what, and that each cell's holds, however groups were merged."""

import math

import numpy as np
import pytest

from stages.detection.conformal import conformal_p_values, threshold_at
from stages.detection.mondrian import GroupedCalibration
from stages.errors import InputError


def test_a_group_of_many_rows_is_compared_with_its_own():
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1], [50, 30])
    scores = rng.normal(size=80) + 10 * group
    calibration = GroupedCalibration(scores, group, n_groups=2)
    new, of = np.array([0.0, 10.0, 2.0]), np.array([0, 1, 1])
    expected = [conformal_p_values([score], scores[group == own])[0] for score, own in zip(new, of, strict=True)]
    assert calibration.p_values(new, of).tolist() == expected
    assert calibration.threshold(1) == threshold_at(scores[group == 1])
    assert calibration.p_values([], np.array([], int)).shape == (0,)


def test_small_groups_share_their_rows_and_what_is_needed_beside():
    group = np.repeat([0, 1, 2, 3], [40, 12, 5, 20])
    calibration = GroupedCalibration(np.arange(77.0), group, n_groups=5)
    assert [calibration.cell(own).tolist() for own in range(5)] == [
        [0],
        [1, 2, 3, 4],  # 12 + 5 and the new one are no more than 19: the next smallest group joins
        [1, 2, 3, 4],
        [1, 2, 3, 4],
        [1, 2, 3, 4],  # predicted for no calibration row
    ]
    few = GroupedCalibration(np.arange(6.0), np.array([0, 0, 0, 1, 1, 2]), n_groups=3)
    assert [few.cell(own).tolist() for own in range(3)] == [[0, 1, 2]] * 3
    assert few.threshold(0).too_few


def test_the_partition_does_not_tell_the_new_row_from_the_others():
    """What makes it exact: with each row of a bag as the new one, a row's cell is the same."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        bag = rng.choice(6, size=40, p=[0.4, 0.3, 0.12, 0.1, 0.05, 0.03])
        cells = {}
        for index in range(len(bag)):
            others = np.delete(bag, index)
            calibration = GroupedCalibration(np.zeros(39), others, n_groups=6, least=6)
            cells.setdefault(int(bag[index]), set()).add(tuple(calibration.cell(int(bag[index]))))
        assert all(len(found) == 1 for found in cells.values())
        partition = {next(iter(found)) for found in cells.values()}
        assert all(not set(a) & set(b) for a in partition for b in partition if a != b)


def test_each_group_of_many_rows_and_each_cell_keeps_its_promise():
    """Four groups whose scores lie apart; small ones are merged in some draws and stand alone in others."""
    rng, alpha, share = np.random.default_rng(2), 0.1, np.array([0.5, 0.25, 0.15, 0.1])
    draws, flagged, total = 1500, np.zeros(4), np.zeros(4)
    for _ in range(draws):
        group = rng.choice(4, size=100, p=share)
        scores = rng.normal(size=100) * (1 + group) + 5 * (group % 2)
        calibration = GroupedCalibration(scores, group, n_groups=4, least=15)
        new = rng.choice(4, size=8, p=share)
        p = calibration.p_values(rng.normal(size=8) * (1 + new) + 5 * (new % 2), new)
        merged = np.array([len(calibration.cell(own)) > 1 for own in range(4)])
        for place in np.where(merged[new], 3, new):  # what was merged is judged together
            total[place] += 1
        np.add.at(flagged, np.where(merged[new], 3, new), p <= alpha)
    deviation = np.sqrt(alpha * (1 - alpha) / total) * math.sqrt(2)  # images of a draw share their rows
    assert (flagged / total <= alpha + 2.576 * deviation).all()
    together = conformal_p_values(rng.normal(size=500) * 3, rng.normal(size=100) * (1 + rng.choice(4, 100, p=share)))
    assert np.mean(together <= alpha) > 0.13  # what group 2 would meet without groups


def test_bad_groups_are_refused():
    with pytest.raises(InputError, match="groups 0 to 2 given, there are 0 to 1"):
        GroupedCalibration([1.0, 2.0], np.array([0, 2]), n_groups=2)
    with pytest.raises(InputError, match="one group a row"):
        GroupedCalibration([1.0, 2.0], np.array([0]), n_groups=2)
    with pytest.raises(InputError, match="least = 0"):
        GroupedCalibration([1.0], np.array([0]), n_groups=1, least=0)
