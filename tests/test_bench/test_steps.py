"""Every step of the check runs, with its real parts, on the CPU in sizes of nothing."""

import pytest

from tests.bench.gpu.steps import STEPS
from tests.test_bench.small import run

ELSEWHERE = ("demo", "demo: fine-tuned", "NCCL: two processes")  # start processes or run a whole study
HERE = [step for step in STEPS if step.name not in ELSEWHERE]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.mark.parametrize("step", HERE, ids=lambda step: step.name)
def test_step(step, shared):
    run(step, shared)


def test_names_are_different():
    assert len({step.name for step in STEPS}) == len(STEPS) == len(HERE) + len(ELSEWHERE)
