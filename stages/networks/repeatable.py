"""What makes a GPU give the same bits twice, and float32 mean float32: the one place that sets torch's flags for it.

By default torch lets a GPU round the inputs of float32 convolutions to the 10 bits of TF32, sum partial products of
half precision in half precision, time kernels against each other and take whichever won, and add gradients in
whatever order threads arrive. Inside `repeatable` it does none of these. What is left:

- Some operations have no other kernel on a GPU (the gradients of max-pooling and of adaptive pooling to more than one
  cell): torch warns of them, once each, and two trainings then differ by rounding.
- Another GPU, driver or version of torch has other kernels: equal to rounding, not to the bit.

On the CPU nothing is set: its kernels are these already.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Found = TypeVar("_Found")

# The flag of torch, by the names under which it holds still.
_FLAGS: tuple[tuple[Any, str, bool], ...] = (
    (torch.backends.cuda.matmul, "allow_tf32", False),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    (torch.backends.cudnn, "allow_tf32", False),
    (torch.backends.cudnn, "benchmark", False),
    (torch.backends.cudnn, "deterministic", True),
    (torch.utils.deterministic, "fill_uninitialized_memory", False),  # it finds bugs of kernels, and costs their speed
)


@contextmanager
def torch_threads(n: int) -> Iterator[int]:
    """So many threads for each of torch's operations, which fixes their order of summation; gives those there were."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


@contextmanager
def repeatable(device: str | torch.device, trains: bool = False) -> Iterator[None]:
    """Compute on a GPU as exactly, and as much the same every time, as flags make it; afterwards they are as before.

    The flags are the process's: what other threads compute meanwhile is computed so, too.

    Args:
        device: where networks run.
        trains: whether gradients are computed. cuDNN's attention is left out then: its gradients have no fixed order.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS picks its sums by what memory is free
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
    flags = _exchange_flags([value for *_, value in _FLAGS])
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cuda.enable_cudnn_sdp(cudnn_attention and not trains)
        yield
    finally:
        _exchange_flags(flags)
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)


def _exchange_flags(values: Sequence[bool]) -> list[bool]:
    """Set the flags; gives what they were."""
    with warnings.catch_warnings():
        # The newer names of the TF32 flags are not known before torch 2.9, and its compiler reads the older ones.
        warnings.filterwarnings("ignore", message=".*new API settings to control TF32", category=UserWarning)
        before = [getattr(owner, name) for owner, name, _ in _FLAGS]
        for (owner, name, _), value in zip(_FLAGS, values, strict=True):
            setattr(owner, name, value)
    return before


class Backward:
    """Backpropagation whose sums have one order, within `repeatable`.

    The gradient of attention has a kernel of fixed order, which torch takes only where every operation has one. So the
    first pass insists on that. Where an operation has none it is done again, and all later passes do without: torch
    then warns of each such operation, once.

    Args:
        parameters: whose gradients are computed; before the first pass they have none.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._insists: bool | None = None  # None: not tried yet

    def __call__(self, forward: Callable[[], tuple[Tensor, _Found]]) -> _Found:
        """Add the gradients of a loss to those that there are.

        Args:
            forward: gives the loss and whatever else it finds; called a second time, it must give the same.

        Returns:
            What else it found.
        """
        loss, found = forward()
        if loss.device.type != "cuda" or self._insists is False:
            loss.backward()
            return found
        torch.use_deterministic_algorithms(True)
        try:
            loss.backward()
            self._insists = True
            return found
        except RuntimeError as error:
            if self._insists or "deterministic" not in str(error):
                raise
            self._insists = False
        finally:
            torch.use_deterministic_algorithms(True, warn_only=True)
        for parameter in self._parameters:  # what the pass that was given up has left
            parameter.grad = None
        return self(forward)
