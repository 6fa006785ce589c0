"""Energy and MSP against their formulas written out plainly, with bounds and symmetries."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stages.errors import InputError
from stages.scorers.logits.energy import energy_score
from stages.scorers.logits.msp import msp_score

logit_rows = arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 7)), elements=st.floats(-50, 50, width=32))
temperatures = st.floats(0.1, 10)


@settings(deadline=None)
@given(logit_rows, temperatures)
def test_energy_and_msp_equal_their_formulas(logits, t):
    exponentials = np.exp(np.longdouble(logits) / t)
    energy = np.float64(-t * np.log(exponentials.sum(1)))
    np.testing.assert_allclose(energy_score(logits, t), energy, rtol=1e-5, atol=1e-5)
    softmax = exponentials / exponentials.sum(1, keepdims=True)
    np.testing.assert_allclose(np.expm1(msp_score(logits, t)), np.float64(-softmax.max(1)), rtol=1e-5)


@settings(deadline=None)
@given(logit_rows, temperatures)
def test_energy_and_msp_stay_within_their_bounds(logits, t):
    largest, classes, slack = logits.max(axis=1), logits.shape[1], 1e-4
    energy, msp = energy_score(logits, t), msp_score(logits, t)
    assert (energy <= -largest + slack).all()
    assert (energy >= -largest - t * np.log(classes) - slack).all()
    assert (np.expm1(msp) <= -1 / classes + slack).all()


@settings(deadline=None)
@given(logit_rows, st.floats(-5, 5), st.randoms(use_true_random=False))
def test_shifts_and_the_order_of_classes(logits, shift, random):
    columns = list(range(logits.shape[1]))
    random.shuffle(columns)
    np.testing.assert_allclose(energy_score(logits[:, columns]), energy_score(logits), rtol=1e-6, atol=1e-6)
    shifted = np.float64(logits) + shift
    np.testing.assert_allclose(energy_score(shifted), energy_score(logits) - shift, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(msp_score(shifted), msp_score(logits), rtol=1e-5, atol=1e-4)


@settings(deadline=None)
@given(logit_rows, temperatures)
def test_a_class_that_does_not_apply_changes_nothing(logits, t):
    padded = np.concatenate([logits, np.full((len(logits), 2), -np.inf, np.float32)], axis=1)
    np.testing.assert_array_equal(energy_score(padded, t), energy_score(logits, t))
    np.testing.assert_allclose(msp_score(padded, t), msp_score(logits, t), rtol=1e-6)


def test_extreme_logits_neither_overflow_nor_vanish():
    assert energy_score(np.float16([[60000, -60000]])).tolist() == [-60000]
    assert msp_score([[1e5, 0], [-1e5, -1e5]]).tolist() == [-1e5, np.float32(np.log(0.5))]


@pytest.mark.parametrize("score", [energy_score, msp_score])
@pytest.mark.parametrize(
    ("logits", "temperature", "says"),
    [
        ([1.0, 2.0], 1, r"shape \(2,\)"),
        (np.empty((3, 0)), 1, r"shape \(3, 0\)"),
        ([[1.0]], 0, "temperature = 0 given"),
        ([[1.0], [np.nan]], 1, "1 of 2 rows of logits hold NaN, .* row 1 first"),
        ([[np.inf, 0]], 1, "1 of 1 rows"),
        ([[-np.inf, -np.inf]], 1, "1 of 1 rows"),
    ],
)
def test_bad_logits_are_refused(score, logits, temperature, says):
    with pytest.raises(InputError, match=says):
        score(logits, temperature)
