"""Linear heads as maps: shift and scale or none, the classes that apply, and what does not fit."""

import numpy as np
import pytest

from stages.errors import InputError
from stages.heads.affine import LinearHead, Standardisation


@pytest.fixture
def head() -> LinearHead:
    """On five values, of three classes, the second of which does not apply."""
    rng = np.random.default_rng(0)
    mean, scale, weight = (np.float32(rng.normal(size=size)) for size in (5, 1, (3, 5)))
    return LinearHead(weight, np.float32([0.1, -np.inf, 2]), Standardisation(mean, scale))


def rows() -> np.ndarray:
    return np.random.default_rng(1).normal(3, 10, size=(20, 5))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_logits_are_float32_of_rows_of_any_type(head, dtype):
    features = rows().astype(dtype)
    expected = ((features.astype(np.float64) - head.standardise.mean) / head.standardise.scale) @ head.weight.T
    assert head.logits(features).dtype == np.float32
    np.testing.assert_allclose(head.logits(features), expected + head.bias, rtol=1e-4, atol=1e-4)


def test_a_head_on_raw_features_is_the_head(head):
    raw = head.on_raw_features()
    np.testing.assert_allclose(raw.logits(rows()), head.logits(rows()), rtol=1e-4, atol=1e-4)
    assert raw.standardise is None
    assert raw.on_raw_features() is raw


def test_classes_that_apply_can_be_taken(head):
    assert head.classes.tolist() == [0, 2]
    np.testing.assert_array_equal(head.take(head.classes).logits(rows()), head.logits(rows())[:, [0, 2]])


@pytest.mark.parametrize("shape", [(20, 4), (5,), (2, 5, 1)])
def test_rows_of_another_length_are_refused(head, shape):
    with pytest.raises(InputError, match=rf"{shape}.* 5 ".replace("(", r"\(").replace(")", r"\)")):
        head.logits(np.zeros(shape))
