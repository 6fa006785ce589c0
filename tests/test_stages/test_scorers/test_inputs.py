"""Rows that a score may look at: what is missing is named."""

import numpy as np
import pytest

from stages.errors import InputError
from stages.scorers import get_scorer
from stages.scorers.inputs import ScoreInputs


def test_missing_inputs_are_named():
    with pytest.raises(InputError, match="energy needs logits"):
        get_scorer("energy").score(ScoreInputs(features=np.ones((2, 2))))
    with pytest.raises(InputError, match="one number of rows"):
        ScoreInputs(features=np.ones((2, 2)), labels=np.zeros(3, int))
    with pytest.raises(InputError, match="no array"):
        ScoreInputs()
