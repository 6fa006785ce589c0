"""Every step of the check runs, with its real parts, on the CPU in sizes of nothing."""

import pytest

from tests.bench.gpu.step import TINY, Bench
from tests.bench.gpu.steps import STEPS
from tests.bench.gpu.worker import run_step


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@pytest.mark.parametrize("step", STEPS, ids=[step.name for step in STEPS])
def test_step(step, scratch):
    values, ends = [], []
    run_step(step, Bench("cpu", TINY, scratch, values.append), lambda *said: ends.append(said))
    ((kind, what),) = ends
    assert kind in ("done", "not run"), what
    assert [value for value in values if not value.holds] == []
    assert values or kind == "not run"


def test_names_are_different():
    assert len({step.name for step in STEPS}) == len(STEPS)
