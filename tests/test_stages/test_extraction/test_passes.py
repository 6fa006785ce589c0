"""Threads of passes: a GPU's stay, and who leaves them waits for what is begun and drops the rest."""

import threading

import pytest

from stages.extraction.passes import pool_of_passes


def of_threads(pool, n):
    """Which threads run n calls that wait for each other."""
    together = threading.Barrier(n)
    return set(pool.map(lambda _: (together.wait(10), threading.get_ident())[1], range(n)))


def test_those_of_a_gpu_are_the_same_for_every_set():
    with pool_of_passes(2, "cuda") as pool:
        before = of_threads(pool, 2)
    with pool_of_passes(2, "cuda") as pool:
        assert of_threads(pool, 2) == before


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_has_not_begun_is_dropped_and_what_has_is_waited_for(device):
    begun, go_on = threading.Event(), threading.Event()

    def computes():
        begun.set()
        return go_on.wait(10)

    with pool_of_passes(1, device) as pool:
        running, waiting = pool.submit(computes), pool.submit(lambda: True)
        assert begun.wait(10)
        threading.Timer(0.05, go_on.set).start()
    assert running.done()
    assert running.result()
    assert waiting.cancelled()


def test_what_others_do_on_the_same_threads_goes_on():
    go_on = threading.Event()
    with pool_of_passes(1, "cuda") as others:
        theirs = others.submit(go_on.wait, 10)
        with pool_of_passes(1, "cuda") as pool:
            own = pool.submit(lambda: True)
        assert own.cancelled()
        assert not theirs.done()
        go_on.set()
        assert theirs.result()
