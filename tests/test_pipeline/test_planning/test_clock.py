"""What a listener learns of a task that it stops, and of one that is slow at first."""

import pytest

from pipeline.planning import clock as module
from pipeline.planning.clock import Clock, EnoughError


@pytest.fixture
def wait(monkeypatch):
    """Lets seconds pass, as many as are said and no more."""
    now = [100.0]

    def seconds(n):
        now[0] += n

    monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    return seconds


def spent_on(clock, task):
    return clock.taken(task)[task]


def test_a_task_that_is_stopped_tells_how_long_the_whole_takes(wait):
    clock = Clock()
    clock.start(10, "image", "finetune seed 0")
    wait(5)
    clock.advance(epoch=0)
    clock.limit = 0.0
    wait(1)
    with pytest.raises(EnoughError):
        clock.advance(epoch=0)
    spent = spent_on(clock, "finetune")
    assert (spent.units, spent.total, spent.seconds) == (2, 10, 6)
    assert (spent.each, spent.starting, spent.whole) == (1, 4, 6 + 8 * 1)
    assert spent_on(clock, "finetune").total == 0


def test_what_is_done_is_not_stopped():
    clock = Clock()
    clock.limit = 0.0
    clock.start(1, "image", "extract train")
    clock.advance()
    assert spent_on(clock, "extract").units == 1


def test_the_usual_pace_is_that_of_the_last_epoch_and_of_the_judging_before_it(wait):
    """Of two models of one mixture, whose first steps take long: kernels are chosen."""
    clock = Clock()
    for _ in range(2):
        clock.start(4, "image", "train final")
        clock.advance(0)  # where it goes on, which is at the start
        for epoch, seconds in ((0, 10), (0, 8), (1, 2 + 1), (1, 1)):
            wait(seconds)
            clock.advance(epoch=epoch)
        wait(2)
        clock.advance(0, accuracy=0.5)  # judged
    spent = spent_on(clock, "train")
    assert (spent.units, spent.total, spent.seconds) == (8, 8, 48)
    assert (spent.each, spent.starting) == (2, 48 - 8 * 2)


def test_an_epoch_may_be_one_step(wait):
    clock = Clock()
    clock.start(10, "image", "train final")
    for epoch, seconds in enumerate((7, 5)):
        wait(seconds)
        clock.advance(5, epoch=epoch)
    assert spent_on(clock, "train").each == 1


def test_of_one_step_nothing_is_known_but_the_whole(wait):
    clock = Clock()
    clock.start(5, "image", "train final")
    wait(10)
    clock.advance(5, epoch=0)
    spent = spent_on(clock, "train")
    assert (spent.each, spent.starting, spent.whole) == (2, 0, 10)
