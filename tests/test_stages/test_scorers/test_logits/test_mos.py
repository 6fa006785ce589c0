"""MOS is small where one group knows the row."""

import numpy as np
import pytest

from stages.errors import InputError
from stages.scorers.logits.mos import mos_score


def test_mos_is_low_where_one_group_knows_the_row():
    assert mos_score([[5.0, -9.0, 4.0], [5.0, 3.0, 4.0]]).tolist() == [-9, 3]
    assert mos_score(np.zeros((0, 3))).shape == (0,)
    for others, says in (
        ([[0.5, np.inf]], "1 of 1 rows of log odds"),
        ([[0.5], [np.nan]], "row 1 first"),
        (np.zeros((2, 0)), r"shape \(2, 0\)"),
    ):
        with pytest.raises(InputError, match=says):
            mos_score(others)
