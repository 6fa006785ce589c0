"""Several processes that train one mixture: who takes part, and how what each has found is added up.

Started by ``torchrun``, every process runs the same command. All draw the same random numbers and hold the same
weights; each computes its share of the rows of every batch, and gradients are summed over all. Rank 0 alone writes
files and speaks. An ordinary process is one of one (`stages.context.Ranks`).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from stages.context import Ranks
from stages.errors import InputError, PeerLostError

JOINED_BY = "cpu:gloo,cuda:nccl"  # what carries what, where there are GPUs


@dataclass(frozen=True)
class Joined(Ranks):
    """This process among several that have joined."""

    def add(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place.

        Raises:
            PeerLostError: another process has ended.
        """
        with _peers():
            distributed.all_reduce(values)
        return values

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over all processes, in one message.

        A parameter that has no gradient anywhere has none afterwards, so that the optimiser passes over it.
        """
        # A process without a row for an expert has no gradient for it either: flags say who has. They are of the host,
        # which would have to wait for all that a GPU still computes to read them there.
        flags = self.add(torch.tensor([float(p.grad is not None) for p in parameters]))
        gradients = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
        summed = self.add(torch.cat(gradients)).split([p.numel() for p in parameters])
        for parameter, gradient, flag in zip(parameters, summed, flags.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter) if flag else None

    def agree(self, value: Any) -> Any:
        """What rank 0 holds: a plain value, which travels between hosts; only rank 0's argument counts.

        Raises:
            PeerLostError: another process has ended.
        """
        values = [value]
        with _peers():
            distributed.broadcast_object_list(values, src=0)
        return values[0]


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch has no narrower one that Gloo raises
        raise PeerLostError("another of the processes that train together has ended") from error


def current() -> Ranks:
    """This process's place; one of one where nothing was started together."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return Ranks()
    return Joined(distributed.get_rank(), distributed.get_world_size())


def init_from_environment() -> Ranks:
    """Join the other processes where ``torchrun`` has started several: NCCL between GPUs, Gloo between hosts.

    Each takes the GPU of its local rank. What is of the host stays there: NCCL would send plain values by way of GPU
    memory, and keep a GPU busy with waiting for rank 0. `leave` ends it.

    Raises:
        InputError: more processes on this machine than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        gpu = torch.cuda.is_available()
        if gpu:
            local, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= n_gpus:
                raise InputError(f"more processes than GPUs: this machine has {n_gpus}; start one process for each")
            torch.cuda.set_device(local)
        # The others wait while rank 0 refines features and fits heads, which takes hours on a large set.
        store, rank, world = next(distributed.rendezvous("env://", timeout=_JOIN))
        # Who joins again, after `leave`, must not meet what the time before has left in the same store.
        store = distributed.PrefixStore(f"joined {len(_stores)}", store)
        _stores.append(store)
        backend = JOINED_BY if gpu else "gloo"
        group = distributed.PrefixStore("group", store)
        distributed.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=timedelta(days=2))
    return current()


def first_to_fail() -> bool:
    """Whether no other of the joined processes has asked this before: of all that fail, one says why."""
    try:
        return _stores[-1].add("failed", 1) == 1
    except RuntimeError:  # what held the count has ended
        return False


_JOIN = timedelta(minutes=30)  # until all are there
_stores: list[Any] = []  # of torch.distributed's kinds; the last is the one that the processes share


def leave() -> None:
    """Part from the other processes, if there are any."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
