"""Experts of a batch, stacked as one network: what they say and learn is what they say and learn one after another."""

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode

from stages.mixture.model import DenseEnd, soft_cross_entropy
from tests.test_stages.drawn import DINOV2_REGISTERS, dinov2
from tests.test_stages.small_mixture import encoded, kinds, lite0, mixture_of, small_mixture, small_tokens

ENDS = pytest.mark.parametrize("source", [(lite0,), (dinov2, DINOV2_REGISTERS)], ids=["convolutional", "transformer"])
ROUTES = [[0, 1, 2, 0, 1, 2], [0, 2, 0, 0, 2, 0], [1, 1, 1, 1, 1, 1]]  # balanced, unbalanced with one empty, one alone


def both_ways(mixture):
    """It with its experts one after another, and a copy with them stacked."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    stacked = copy.deepcopy(mixture)
    dense = [expert.end for expert in stacked.experts if isinstance(expert.end, DenseEnd)]
    for each in dense or [stacked]:
        each.stacked.forced = True
    return mixture, stacked


def learn(mixture, tokens, route):
    """Its output, after a backward pass."""
    out = mixture(tokens, route)
    known = torch.isfinite(out.logits)
    loss = soft_cross_entropy(out.logits.where(known, -100), torch.ones_like(out.logits) / 7)
    (loss + out.other.where(torch.isfinite(out.other), 0).square().sum() + out.features.square().sum()).backward()
    return out


def assert_near(ours, alone, tolerance):
    ours, alone, finite = ours.detach(), alone.detach(), torch.isfinite(alone)
    assert torch.equal(torch.isfinite(ours), finite)
    ours, alone = (x.double().where(finite, 0) for x in (ours, alone))
    assert (ours - alone).abs().max() <= tolerance * max(1, alone.abs().max())


@kinds
@ENDS
def test_they_say_and_learn_the_same(source, kind):
    tokens = encoded(*source)
    for number, route in enumerate(ROUTES):
        route = torch.tensor(route) if "copies" not in kind else torch.zeros(6, dtype=torch.int64)
        loop, stacked = both_ways(mixture_of(source[0](*source[1:]), **kind))
        expected, out = learn(loop, tokens, route), learn(stacked, tokens, route)
        for name, value in vars(expected).items():
            assert_near(vars(out)[name], value, 1e-5)
        for (name, parameter), own in zip(loop.named_parameters(), stacked.parameters(), strict=True):
            if parameter.grad is None:  # an expert without rows learns nothing: not even its weights decay
                assert own.grad is None, name
            else:
                assert_near(own.grad, parameter.grad, 1e-4)
        if "copies" in kind or (kind and number):
            break  # one way of routing will do


@ENDS
def test_in_mixed_precision_too(source):
    tokens, route = encoded(*source), torch.tensor(ROUTES[1])
    loop, stacked = both_ways(mixture_of(source[0](*source[1:])))
    with torch.inference_mode():
        exact = loop(tokens, route)
        with torch.autocast("cpu", torch.bfloat16):
            alone, ours = loop(tokens, route), stacked(tokens, route)
    assert ours.features.dtype == alone.features.dtype == torch.float32
    error = (alone.features - exact.features).abs().max()
    assert (ours.features - exact.features).abs().max() <= 2 * error
    assert (ours.other - alone.other).abs().max() <= 0.05 * alone.other.abs().max()


@pytest.mark.parametrize("forced", [False, True])
def test_rows_that_fill_a_pass_change_nothing(forced):
    tokens, route = small_tokens(11), torch.tensor([0] * 9 + [2, 2])
    exact, ours = small_mixture(), small_mixture()
    ours.few_sizes, ours.stacked.forced, exact.stacked.forced = True, forced, forced
    expected, out = learn(exact, tokens, route), learn(ours, tokens, route)
    for name, value in vars(expected).items():
        assert_near(vars(out)[name], value, 1e-6)
    for alone, own in zip(exact.parameters(), ours.parameters(), strict=True):
        if alone.grad is not None:
            assert_near(own.grad, alone.grad, 1e-5)


def test_stacking_leaves_no_trace():
    """What is stored, averaged and handed to an optimiser is the experts' own."""
    mixture = small_mixture()
    names = list(mixture.state_dict())
    mixture.stacked.forced = True
    mixture(small_tokens(9))
    assert list(mixture.state_dict()) == names
    average = copy.deepcopy(mixture)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.zero_()
    assert (average(small_tokens(9), torch.zeros(9, dtype=torch.int64)).features == 0).all()
    assert (mixture(small_tokens(9)).features != 0).any()


def test_experts_that_were_given_other_numbers_keep_their_rows():
    tokens, route = small_tokens(9), torch.arange(9) % 3
    for forced in (False, True):
        mixture = small_mixture()
        mixture.stacked.forced = forced
        before = mixture(tokens, route)
        mixture.renumber([2, 0, 1])
        mixture.stacked.forced = forced
        after = mixture(tokens, torch.tensor([2, 0, 1])[route])
        assert torch.equal(after.features, before.features)
        assert torch.equal(after.logits, before.logits)
        assert torch.equal(after.other, before.other)
        targets = mixture.outputs.class_targets(torch.arange(7), mixture.group, 0.1)
        assert torch.equal(targets.argmax(1), mixture.column)


class Asked(TorchFunctionMode):
    """What a GPU would have to be waited for."""

    WAITS = ("tolist", "item", "nonzero", "bincount", "unique", "cpu", "numpy", "__bool__", "__int__", "__float__")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.WAITS:
            self.names.append(func.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("forced", [None, True])
def test_a_gpu_is_waited_for_once(forced):
    mixture = small_mixture()
    mixture.stacked.forced = forced
    with Asked() as asked:
        mixture(small_tokens(40))
    assert asked.names == ["tolist"]


def test_targets_of_rows_of_several_experts_are_those_of_each():
    mixture, labels, expert = small_mixture(), torch.arange(7).repeat(3), torch.arange(3).repeat_interleave(7)
    soft = torch.nn.functional.one_hot(labels, 7).float()
    for smoothing in (0.0, 0.1):
        ours = mixture.outputs.class_targets(labels, expert, smoothing)
        own = mixture.outputs.smooth(mixture.outputs.group_targets(soft, expert), expert, smoothing)
        for number in range(3):
            n_outputs = mixture.config.n_outputs(number)
            alone = mixture.outputs.class_targets(labels[:7], number, smoothing)
            assert torch.equal(ours[expert == number][:, :n_outputs], alone)
            assert (ours[expert == number][:, n_outputs:] == 0).all()
            inside = (expert == number) & (mixture.group[labels] == number)
            assert torch.equal(own[inside], ours[inside])
