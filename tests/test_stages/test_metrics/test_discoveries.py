"""Benjamini and Hochberg's procedure, beside scipy's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from stages.errors import InputError
from stages.metrics.discoveries import discoveries


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=40), st.sampled_from([0.05, 0.1, 0.3]))
def test_it_rejects_what_scipys_adjusted_p_values_do(p_values, rate):
    adjusted = false_discovery_control(p_values)
    clear = ~np.isclose(adjusted, rate, rtol=1e-9)
    np.testing.assert_array_equal(discoveries(p_values, rate)[clear], (adjusted <= rate)[clear])


@pytest.mark.parametrize("images", [1, 3, 7, 100, 999])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.3])
def test_a_p_value_on_its_bound_is_rejected_however_the_bound_is_rounded(images, rate):
    for flagged in {1, max(1, images // 3), images}:
        p_values = np.ones(images)
        p_values[:flagged] = rate * flagged / images
        assert discoveries(p_values, rate).sum() == flagged
        p_values[:flagged] *= 1 + 1e-9
        assert not discoveries(p_values, rate).any()


def test_of_nothing_nothing_is_rejected_and_a_rate_is_a_share():
    assert discoveries([], 0.05).shape == (0,)
    with pytest.raises(InputError, match="rate of 5 given"):
        discoveries([0.1], 5)
