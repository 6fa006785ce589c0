"""Flags that make a GPU repeat itself: set while it computes, given back; gradients of fixed order, where possible."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stages.networks.repeatable import Backward, repeatable


def state() -> dict[str, object]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "tf32": (matmul.allow_tf32, cudnn.allow_tf32),
        "half sums": (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction),
        "timed": cudnn.benchmark,
        "deterministic": (cudnn.deterministic, torch.are_deterministic_algorithms_enabled()),
        "only warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "filled": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn's attention": torch.backends.cuda.cudnn_sdp_enabled(),
    }


def test_flags_hold_while_a_gpu_computes_and_no_longer(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    before = state()
    seen = []

    def fails():
        with repeatable("cuda", trains=True):
            seen.append(state())
            with repeatable("cuda:1"):
                seen.append(state())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert state() == before
    inside, within = seen
    assert within == inside
    assert inside == {
        "tf32": (False, False),
        "half sums": (False, False),
        "timed": False,
        "deterministic": (True, True),
        "only warns": True,
        "filled": False,
        "cudnn's attention": False,
    }
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
    with repeatable("cpu"):
        assert state() == before


class OnGpu:
    """Stands for a loss on a GPU, some of whose gradients have no kernel of fixed order."""

    device = torch.device("cuda")

    def __init__(self, parameter, refuses):
        self.parameter, self.refuses, self.tried = parameter, refuses, []

    def __call__(self):
        return self, len(self.tried)

    def backward(self):
        strict = not torch.is_deterministic_algorithms_warn_only_enabled()
        self.tried.append(strict)
        self.parameter.grad = torch.ones(1) if self.parameter.grad is None else self.parameter.grad + 1
        if strict and self.refuses:
            raise RuntimeError(self.refuses)


@pytest.mark.parametrize(
    ("refuses", "tried"),
    [
        ("", [True, True, True]),
        ("pool_backward does not have a deterministic implementation", [True, False, False, False]),
    ],
)
def test_gradients_have_one_order_where_every_operation_has_one(refuses, tried):
    parameter = nn.Parameter(torch.zeros(1))
    loss, backward = OnGpu(parameter, refuses), Backward([parameter])
    with repeatable("cuda", trains=True):
        found = [backward(loss) for _ in range(3)]
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert loss.tried == tried
    assert found == ([0, 1, 2] if not refuses else [1, 2, 3])
    assert parameter.grad == 3  # what the pass that was given up has left is taken away


def test_another_error_is_not_taken_for_one_of_order():
    loss = OnGpu(nn.Parameter(torch.zeros(1)), "CUDA error: an illegal memory access")
    with repeatable("cuda"), pytest.raises(RuntimeError, match="illegal"):
        Backward([loss.parameter])(loss)


def test_on_the_cpu_it_is_backward():
    parameter = nn.Parameter(torch.tensor([3.0]))
    forward = lambda: ((parameter**2).sum(), SimpleNamespace(right=1))  # noqa: E731
    assert Backward([parameter])(forward).right == 1
    assert parameter.grad == 6
