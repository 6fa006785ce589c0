"""Many ask one at a time, and are answered together."""

import asyncio
import time
from functools import partial
from threading import Barrier, Event, Lock

import pytest

from pipeline.serving.batches import Batches


def together(answer, most, *prepare, side_by_side=1, whole=None, patience=0.1):
    """What comes of each of those that ask at once: an answer, or an error."""

    async def crowd():
        batches = Batches(answer, most, patience, side_by_side, whole)
        running = asyncio.create_task(batches.run())
        try:
            return await asyncio.gather(*map(batches.ask, prepare), return_exceptions=True)
        finally:
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

    return asyncio.run(crowd())


def test_each_has_its_own_answer_in_batches_of_the_most_at_most():
    sizes = []

    def doubled(items):
        sizes.append(len(items))
        return [2 * item for item in items]

    found = together(doubled, 8, *(lambda number=number: number for number in range(100)))
    assert found == [2 * number for number in range(100)]
    assert max(sizes) == 8
    assert sum(sizes) == 100


def test_a_batch_of_more_than_a_pass_has_whole_passes():
    """What is beyond them goes with the next, alone where nothing comes."""
    sizes = []

    def same(items):
        sizes.append(len(items))
        return items

    for n in (40, 20, 16, 5):
        sizes.clear()
        prepare = [lambda number=number: number for number in range(n)]
        assert together(same, 32, *prepare, whole=16, patience=20) == [*range(n)]
        *passes, last = sizes
        assert sum(sizes) == n
        assert set(passes) <= {16, 32}
        assert last == (n % 16 or 16)


def test_a_pass_waits_for_as_long_as_the_next_comes():
    """However slowly all are decoded that fill it."""
    turn, sizes = Lock(), []

    def slow(number):
        with turn:
            time.sleep(0.2)
        return number

    def same(items):
        sizes.append(len(items))
        return items

    together(same, 4, *(partial(slow, number) for number in range(4)), patience=0.6)
    assert sizes == [4]


def test_batches_run_side_by_side():
    """Each begins before the other ends, or neither would."""
    meeting = Barrier(2)

    def met(items):
        meeting.wait(timeout=20)
        return items

    assert together(met, 1, lambda: "one", lambda: "other", side_by_side=2) == ["one", "other"]


def test_what_cannot_be_prepared_is_its_askers_alone():
    found = together(lambda items: [1 / item for item in items], 8, lambda: 4, lambda: 1 / 0, lambda: 2)
    assert found[::2] == [0.25, 0.5]
    assert isinstance(found[1], ZeroDivisionError)


def test_a_batch_that_fails_is_told_to_all_in_it_and_the_next_goes_on():
    found = together(lambda items: [1 / item for item in items], 1, lambda: 4, lambda: 0, lambda: 2)
    assert found[::2] == [0.25, 0.5]
    assert isinstance(found[1], ZeroDivisionError)


def test_it_is_known_what_is_computed_for_how_long():
    async def crowd():
        batches, begun, done = Batches(lambda items: items, 8, patience=0.1), Event(), Event()
        assert batches.at_work() is None

        def slow():
            begun.set()
            done.wait()

        asking = asyncio.create_task(batches.prepared(slow))
        await asyncio.to_thread(begun.wait)
        await asyncio.sleep(0.02)
        found = batches.at_work()
        done.set()
        await asking
        return found, batches.at_work()

    found, after = asyncio.run(crowd())
    assert found.what == "decoding"
    assert found.seconds >= 0.02
    assert after is None
