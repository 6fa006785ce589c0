"""Between the host's memory and a GPU's: copies from pinned memory, on a stream of their own, while networks compute.

A copy from ordinary memory makes the host wait for everything that the GPU has been given to do before. A copy from
pinned memory on the stream that computes makes the GPU wait for the copy. Neither happens here. For the CPU nothing is
copied, and all is there at once.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tensors = dict[str, Tensor]  # tensors by their names, the same rows of each or not


@cache
def stream_of(device: torch.device, use: str) -> torch.cuda.Stream:
    """A stream of this process, the same for one use: what torch has cached of a GPU's memory belongs to a stream."""
    return torch.cuda.Stream(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on a device; the host waits for nothing."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return tensor.to(device)
    return _sent(tensor, device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on a GPU once the current stream has copied it."""
    return (tensor.pin_memory() if tensor.numel() else tensor).to(device, non_blocking=True)


def array_for(device: torch.device) -> Callable[..., NDArray[Any]]:
    """Makes arrays, as `numpy.empty` does, that are best sent to a device: what is read into them is copied once.

    For a GPU they lie in pinned memory, which torch keeps for the next ones of that size: a fresh array would be mapped
    page by page as it is filled, and copied into pinned memory then.
    """
    if device.type != "cuda":
        return np.empty

    def pinned(shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        of_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        array: NDArray[Any] = torch.empty(tuple(shape), dtype=of_dtype, pin_memory=True).numpy()
        return array

    return pinned


class Sent:
    """Tensors on their way to a device.

    Args:
        tensors: there.
        arrived: what says that they are; None where they are at hand.
    """

    def __init__(self, tensors: Tensors, arrived: torch.cuda.Event | None) -> None:
        self._tensors = tensors
        self._arrived = arrived

    def take(self) -> Tensors:
        """The tensors, for the stream that computes in this thread: it waits for them, the host does not."""
        if self._arrived is not None:
            for tensor in self._tensors.values():
                stream = torch.cuda.current_stream(tensor.device)
                stream.wait_event(self._arrived)
                tensor.record_stream(stream)  # their memory is not taken for the next ones before it is read
        return self._tensors


class Sender:
    """Sends tensors of the host to a device; any thread may.

    Args:
        device: with its number, where it has one: threads have a current device each.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = stream_of(device, "send") if device.type == "cuda" else None

    def do(self, job: Callable[[], Mapping[str, Tensor]]) -> Sent:
        """Begin to copy what a job gives; what that pins, it pins for this device."""
        with nullcontext() if self._stream is None else torch.cuda.device(self._device):
            return self.send(job())

    def send(self, tensors: Mapping[str, Tensor]) -> Sent:
        """Begin to copy them."""
        if self._stream is None:
            return Sent({name: tensor.to(self._device) for name, tensor in tensors.items()}, None)
        with torch.cuda.stream(self._stream):
            sent = {name: _sent(tensor, self._device) for name, tensor in tensors.items()}
            return Sent(sent, self._stream.record_event())


def sent_ahead(
    jobs: Iterable[Callable[[], Mapping[str, Tensor]]], device: torch.device, ahead: int | None = None
) -> Iterator[Tensors]:
    """What each job gives, on a device and in order; on a GPU a thread does the next jobs and sends what they give.

    Args:
        jobs: taken from in this thread, `ahead` before their turn.
        device: see `Sender`.
        ahead: how many are done before they are asked for; by default two for a GPU and none for the CPU, whose cores
            have no time to spare.
    """
    sender, ahead = Sender(device), (2 if device.type == "cuda" else 0) if ahead is None else ahead
    if not ahead:
        for job in jobs:
            yield sender.do(job).take()
        return
    with ThreadPoolExecutor(1) as thread:
        sent: deque[Future[Sent]] = deque()
        try:
            for job in jobs:
                sent.append(thread.submit(sender.do, job))
                if len(sent) > ahead:
                    yield sent.popleft().result().take()
            while sent:
                yield sent.popleft().result().take()
        finally:
            for future in sent:
                future.cancel()


class Fetched:
    """A tensor on its way to the host; who reads it waits until it was computed, and for nothing after that."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrived = None
        if tensor.device.type != "cuda":
            self._host = tensor
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.current_stream(tensor.device).record_event()

    def tolist(self) -> list[float]:
        """Its values."""
        values: list[float] = self.array().tolist()
        return values

    def array(self) -> NDArray[Any]:
        """The same as an array."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.numpy()
