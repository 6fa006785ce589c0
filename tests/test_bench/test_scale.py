"""What grows faster than the rows is marked, and steps say what they cost."""

import mmap
import time

import pytest

from tests.bench.bench_scale import slopes
from tests.bench.scale.measured import Cost, cost_of
from tests.bench.scale.steps import STEPS


def test_what_is_more_than_linear_or_not_flat_is_marked():
    few = Cost(1.0, 1.0, 10_000)
    found = slopes([(100, few), (1000, Cost(100.0, 100.0, 10_000 + 900 * 2000))])
    assert (found.time, found.bytes_per_row) == pytest.approx((2, 2000))
    assert found.says == "more than linear; not flat"
    assert slopes([(100, few), (1000, Cost(10.0, 10.0, 10_000))]).says == ""
    assert slopes([(100, few)]) is None


def test_memory_that_was_let_go_is_counted():
    def work():
        with mmap.mmap(-1, 64 << 20) as rows:  # never what this process had, let go and kept for later
            rows.write(bytes(64 << 20))
            time.sleep(0.2)  # it is looked at every now and then

    assert cost_of(work).peak_bytes > 50 << 20


@pytest.mark.parametrize("step", ["hold rows out", "overlap", "metrics", "score msp"])
def test_a_step_runs_on_drawn_rows(step, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "scale"  # one study for all
    assert STEPS[step].cost_of(folder, rows=2000).cpu_s > 0
