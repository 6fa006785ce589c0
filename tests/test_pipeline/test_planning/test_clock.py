"""What a listener learns of a task that it stops."""

import time

import pytest

from pipeline.planning.clock import Clock, EnoughError


def test_a_task_that_is_stopped_tells_how_long_the_whole_takes():
    clock = Clock()
    clock.start(10, "image", "finetune seed 0")
    clock.advance()
    clock.limit = 0.0
    time.sleep(0.01)
    with pytest.raises(EnoughError):
        clock.advance()
    spent = clock.taken("finetune")["finetune"]
    assert (spent.units, spent.total) == (2, 10)
    assert spent.starting < spent.each < spent.seconds
    assert spent.whole == pytest.approx(spent.seconds + 8 * spent.each)
    assert clock.taken("finetune")["finetune"].total == 0


def test_what_is_done_is_not_stopped():
    clock = Clock()
    clock.limit = 0.0
    clock.start(1, "image", "extract train")
    clock.advance()
    assert clock.taken("extract")["extract"].units == 1
