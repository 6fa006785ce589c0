"""The same of those steps that start other processes or run a whole study."""

import pytest

from tests.bench.gpu.steps import STEPS
from tests.test_bench.small import run
from tests.test_bench.test_steps import PROCESSES


@pytest.mark.parametrize("step", [step for step in STEPS if step.name in PROCESSES], ids=lambda step: step.name)
def test_step(step, tmp_path):
    run(step, tmp_path)
