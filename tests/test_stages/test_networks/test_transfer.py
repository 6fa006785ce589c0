"""What is sent ahead arrives in order, each job done once, whoever leaves early; the same with and without a thread."""

import threading
from functools import partial

import numpy as np
import pytest
import torch

from stages.networks.transfer import Fetched, Sender, array_for, sent_ahead, to_device

CPU = torch.device("cpu")


def numbered(done, n=7):
    def job(number):
        done.append((number, threading.current_thread() is threading.main_thread()))
        return {"number": torch.tensor([number]), "rows": torch.empty(0)}

    return (partial(job, number) for number in range(n))


@pytest.mark.parametrize("ahead", [0, 2, 20])
def test_jobs_arrive_in_order(ahead):
    done = []
    arrived = [columns["number"].item() for columns in sent_ahead(numbered(done), CPU, ahead)]
    assert arrived == [number for number, _ in done] == list(range(7))
    assert {here for _, here in done} == {ahead == 0}


def test_no_more_is_done_than_was_asked_for():
    """On the CPU nothing is done ahead: its cores are those that compute."""
    done = []
    sent = sent_ahead(numbered(done), CPU)
    assert next(sent)["number"] == 0
    assert len(done) == 1
    sent = sent_ahead(numbered(done := []), CPU, ahead=2)
    next(sent)
    sent.close()
    assert len(done) <= 3


@pytest.mark.parametrize("ahead", [0, 2])
def test_what_a_job_raises_is_raised_in_its_turn(ahead):
    def fails():
        raise OSError("the disk")

    sent = sent_ahead([*numbered([], 2), fails, *numbered([], 2)], CPU, ahead)
    assert [next(sent)["number"].item() for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the disk"):
        next(sent)


def test_on_the_cpu_nothing_is_copied():
    tensor = torch.arange(4.0)
    assert to_device(tensor, CPU).data_ptr() == tensor.data_ptr()
    assert Sender(CPU).send({"x": tensor}).take()["x"].data_ptr() == tensor.data_ptr()
    assert Fetched(tensor).tolist() == [0, 1, 2, 3]
    assert array_for(CPU) is np.empty


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU answers here")
def test_on_a_gpu_what_was_sent_ahead_is_what_was_read():
    """Large and small, used while the next are copied, and read back later."""
    device = torch.device("cuda", torch.cuda.current_device())
    jobs = [partial(lambda n: {"x": torch.full((1 << 20,), n), "none": torch.empty(0, 3)}, n) for n in range(20)]
    sums = [Fetched(columns["x"].sum()[None]) for columns in sent_ahead(jobs, device)]
    assert [found.tolist() for found in sums] == [[n << 20] for n in range(20)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU answers here")
def test_what_is_read_into_pinned_memory_is_not_overwritten_before_it_is_sent():
    """Each array is let go of at once, so that the next may lie where its bytes are still being copied from."""
    device = torch.device("cuda", torch.cuda.current_device())
    new = array_for(device)

    def job(number):
        array = new((1 << 22,), np.dtype("<f2"))
        array[:] = number
        assert torch.from_numpy(array).is_pinned()
        return {"x": torch.from_numpy(array)}

    found = [Fetched((columns["x"] - n).abs().max()[None]) for n, columns in enumerate(ahead_of(job, device))]
    assert [largest.tolist() for largest in found] == [[0.0]] * 20


def ahead_of(job, device):
    return sent_ahead((partial(job, number) for number in range(20)), device)
