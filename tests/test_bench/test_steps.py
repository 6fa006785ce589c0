"""Every step of the check runs, with its real parts, on the CPU in sizes of nothing."""

import pytest

from tests.bench.gpu.steps import STEPS
from tests.test_bench.small import run

PROCESSES = ("demo", "NCCL: two processes")  # take longer: beside these, in a file of their own


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@pytest.mark.parametrize("step", [step for step in STEPS if step.name not in PROCESSES], ids=lambda step: step.name)
def test_step(step, scratch):
    run(step, scratch)


def test_names_are_different():
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert {step.name for step in STEPS} >= set(PROCESSES)
