"""Golden values of scores, a file for each kind: a changed number is a changed score."""

import json
from pathlib import Path

import numpy as np
import pytest

from stages.scorers import get_scorer
from tests.test_stages.test_scorers.drawn import inputs

GOLDEN = Path(__file__).parents[2] / "golden" / "scores"
CASES = {name: case for path in sorted(GOLDEN.glob("*.json")) for name, case in json.loads(path.read_text()).items()}


@pytest.mark.parametrize("name", CASES)
def test_golden_values(name):
    """Change the file on purpose or not at all."""
    train, select, x = (inputs(n=n, experts=2, seed=seed) for n, seed in ((40, 2021), (20, 2023), (5, 2022)))
    scores = get_scorer(name, **CASES[name]["params"]).fit(train, select).score(x)
    np.testing.assert_allclose(scores, CASES[name]["scores"], rtol=1e-5)
