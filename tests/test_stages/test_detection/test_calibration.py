"""Scores onto one scale."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.detection.calibration import ExpertCalibration, Standardiser, sum_scores
from stages.errors import InputError


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=30))
def test_standardised_calibration_rows_have_mean_0_and_std_1(scores):
    scaled = Standardiser.fit(scores).apply(scores).astype(float)
    assert scaled.mean() == pytest.approx(0, abs=1e-3)
    assert np.isclose(scaled.std(), 1, atol=1e-3) or np.allclose(scaled, 0, atol=1e-4)  # the latter: constant


def test_a_constant_part_adds_nothing_to_a_sum():
    knn, energy = np.array([0.1, 0.5, 0.3]), np.full(3, -7.1)
    fitted = [Standardiser.fit(knn), Standardiser.fit(energy)]
    np.testing.assert_allclose(sum_scores([knn, energy], fitted), fitted[0].apply(knn), atol=1e-6)
    assert Standardiser.fit([1.5]) == Standardiser(1.5, 1.0)
    assert Standardiser.remark(1)
    assert not Standardiser.remark(2)


def test_calibration_puts_experts_on_one_scale():
    rng = np.random.default_rng(0)
    expert = np.repeat([0, 1], 500)
    raw = np.where(expert == 0, rng.normal(5, 0.1, 1000), rng.normal(-3, 20, 1000))
    calibrated = ExpertCalibration.fit(raw, expert, n_experts=2).apply(raw, expert)
    for e in (0, 1):
        assert np.median(calibrated[expert == e]) == pytest.approx(0, abs=0.1)
        assert np.std(calibrated[expert == e]) == pytest.approx(1, abs=0.25)
        order = np.argsort(raw[expert == e])
        assert (np.diff(calibrated[expert == e][order]) >= 0).all()  # within an expert the order stays


def test_an_expert_with_few_rows_leans_on_all_rows():
    values = np.concatenate([np.linspace(-1, 1, 101), [8.0] * 10])
    expert = np.repeat([0, 2], [101, 10])  # expert 1 has none, expert 2 ten constant ones
    calibration = ExpertCalibration.fit(values, expert, n_experts=3)
    everybody = float(np.median(values)), 1.4826 * float(np.median(np.abs(values - np.median(values))))
    assert (calibration.centre[1], calibration.scale[1]) == pytest.approx(everybody)
    assert calibration.centre[2] == pytest.approx((8 + everybody[0]) / 2)  # 10 rows against 10 pseudo-rows
    assert calibration.scale[2] == pytest.approx(everybody[1] / 2)


def test_calibration_of_constants_stays_finite_and_bad_experts_are_refused():
    constant = ExpertCalibration.fit(np.full(8, 3.3), np.zeros(8, int), n_experts=2)
    assert constant.apply([3.3, 4.3], np.array([0, 1])).tolist() == pytest.approx([0, 1])
    with pytest.raises(InputError, match="experts 0 to 2 given, there are 0 to 1"):
        constant.apply([1.0, 2.0], np.array([0, 2]))
    with pytest.raises(InputError, match="one expert a row"):
        ExpertCalibration.fit([1.0, 2.0], np.array([0]), n_experts=1)
