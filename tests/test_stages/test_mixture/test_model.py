"""The mixture: experts that start as the frozen backbone, a router that decides, rows that go where they are sent."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stages.errors import InputError
from stages.mixture.model import soft_cross_entropy
from stages.networks.tokens import Tokens
from tests.test_stages.drawn import DINOV2, DINOV2_REGISTERS, dinov2
from tests.test_stages.small_mixture import GROUPS, encoded, kinds, lite0, mixture_of, small_mixture, small_tokens

# ------------------------------------------------------------------------------------------------ the start


BACKBONES = [(dinov2, DINOV2, 1), (dinov2, DINOV2, 2), (dinov2, DINOV2_REGISTERS, 1), (dinov2, DINOV2_REGISTERS, 2)]
BACKBONES += [(lite0, 1), (lite0, 2)]


@kinds
@pytest.mark.parametrize("source", BACKBONES, ids=lambda source: "-".join([source[0].__name__, *map(str, source[1:])]))
def test_experts_start_as_the_frozen_backbone(source, kind):
    """From the cached tokens every expert gives the class embedding: up to rounding, stored float16 included."""
    make, *arguments = source
    tokens = encoded(make, *arguments)
    mixture = mixture_of(make(*arguments), **kind)
    every_expert = torch.arange(len(tokens)) % mixture.n_experts
    with torch.inference_mode():
        refined = mixture(tokens, every_expert).features
        stored = mixture(tokens.map(lambda x: x.half().float()), every_expert).features
    assert tokens.cls.abs().max() > 1
    assert (refined - tokens.cls).abs().max() <= 1e-5
    assert (stored - tokens.cls).abs().max() <= 5e-3


def test_experts_need_the_registers():
    """Registers are no patches, but the last block attends to them: without them the start would be missed."""
    tokens = encoded(dinov2, DINOV2_REGISTERS, 1)
    without = Tokens(tokens.cls, tokens.tap_cls, tokens.registers[:, :0], tokens.patches)
    with torch.inference_mode():
        refined = mixture_of(dinov2(DINOV2_REGISTERS, 1))(without).features
    assert (refined - tokens.cls).abs().max() > 1e-2


def test_experts_of_a_convolutional_net_can_run_on_pooled_patches():
    tokens = encoded(lite0)
    for patches in (tokens.patches.mean(1, keepdim=True), tokens.patches[:, :0]):
        pooled = Tokens(tokens.cls, tokens.tap_cls, tokens.registers, patches)
        with torch.inference_mode():
            assert mixture_of(lite0())(pooled).features.shape == tokens.cls.shape


def test_experts_do_not_share_weights():
    mixture = mixture_of(lite0())
    first, second, _ = (list(expert.parameters()) for expert in mixture.experts)
    assert not {p.data_ptr() for p in first} & {p.data_ptr() for p in second}
    assert all(parameter.requires_grad for parameter in mixture.parameters())


def test_training_moves_weights_but_never_batch_norm_statistics():
    tokens = encoded(lite0)
    mixture = mixture_of(lite0())
    frozen = {name: b.clone() for name, b in mixture.named_buffers() if "running" in name or "num_batches" in name}
    assert len(frozen) > 10
    mixture.train()
    assert not any(m.training for expert in mixture.experts for m in expert.end.modules())
    optimiser = torch.optim.SGD(mixture.parameters(), lr=0.1)
    for _ in range(2):  # heads start at zero: the end's gradient comes with the second step
        optimiser.zero_grad()
        _, outputs = mixture.experts[0](tokens)
        soft_cross_entropy(outputs, mixture.outputs.class_targets(torch.tensor([1, 4, 1, 4, 0, 0]), 0)).backward()
        optimiser.step()
    buffers = dict(mixture.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in frozen.items())
    with torch.inference_mode():
        moved, kept = (mixture.eval()(tokens, torch.full((6,), e)).features - tokens.cls for e in (0, 1))
    assert moved.abs().max() > 1e-3
    assert kept.abs().max() <= 1e-5


# -------------------------------------------------------------------------------------------- kinds of expert


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_dense_control_has_the_parameters_of_all_experts_and_routes_nothing():
    backbone = lite0()
    routed, dense = mixture_of(backbone), mixture_of(backbone, [0] * 7, kind="dense", copies=3)
    ends = [sum(n_parameters(expert.end) for expert in mixture.experts) for mixture in (routed, dense)]
    assert ends == [3 * n_parameters(backbone.end())] * 2
    # What is left: a head output for each of three "others".
    assert n_parameters(routed) - n_parameters(dense) == 3 * (backbone.dim + 1)
    assert dense(encoded(lite0)).load.tolist() == [6]


def test_copies_of_the_dense_control_learn_different_things():
    """With equal weights their gradients would be equal, and they would stay one network."""
    mixture = small_mixture([0] * 7, kind="dense", copies=3)
    share = mixture.experts[0].end.share
    assert torch.allclose(share.sum(0), torch.ones(5))
    assert (share > 0.1).all()
    mixture(small_tokens(4)).features.sum().backward()
    first, second, third = (end.scale.grad for end in mixture.experts[0].end.ends)
    assert not torch.allclose(first, second)
    assert not torch.allclose(second, third)
    again = small_mixture([0] * 7, kind="dense", copies=3)
    assert torch.equal(again.experts[0].end.share, share)


def test_adapters_are_small_and_refine_cls_alone():
    mixture, tokens = mixture_of(lite0(), kind="adapter"), encoded(lite0)
    dim = lite0().dim
    assert n_parameters(mixture.experts[0].end) == 2 * dim + (dim + 1) * 64 + (64 + 1) * dim
    assert n_parameters(mixture.experts[0].end) < 0.2 * n_parameters(lite0().end())
    up = mixture.experts[0].end.up
    nn.init.ones_(up.weight)
    without = Tokens(tokens.cls, tokens.tap_cls, tokens.registers[:, :0], tokens.patches[:, :0])
    told = torch.zeros(6, dtype=torch.int64)
    assert torch.equal(mixture(without, told).features, mixture(tokens, told).features)
    assert not torch.allclose(mixture(without, told).features, tokens.cls)


def test_frozen_experts_have_heads_alone():
    mixture, tokens = small_mixture(kind="frozen"), small_tokens(6)
    assert {name.split(".")[2] for name, _ in mixture.experts.named_parameters(prefix="experts")} == {"head"}
    assert torch.equal(mixture(tokens).features, tokens.cls)


@pytest.mark.parametrize(
    ("kind", "router_input", "reads"),
    [
        ("end", "cls", ("cls", "tap_cls", "registers", "patches")),
        ("dense", "tap_cls", ("cls", "tap_cls", "registers", "patches")),
        ("adapter", "tap_cls", ("cls", "tap_cls")),
        ("frozen", "cls", ("cls",)),
    ],
)
def test_a_mixture_says_what_it_reads(kind, router_input, reads):
    """What it does not read may hold anything."""
    mixture, tokens = small_mixture(kind=kind, router_input=router_input), small_tokens(9)
    assert mixture.config.reads == reads
    others = {name: torch.full_like(x, torch.nan) for name, x in vars(tokens).items() if name not in reads}
    expected, out = mixture(tokens), mixture(Tokens(**vars(tokens) | others))
    assert torch.equal(out.features, expected.features)
    assert torch.equal(out.gate, expected.gate)


# ----------------------------------------------------------------------------------------------- the router


def test_group_probability_is_the_sum_over_its_classes():
    mixture, tokens = small_mixture(), small_tokens(200)
    out = mixture(tokens)
    plain = torch.stack(
        [out.class_probability[:, [c for c, g in enumerate(GROUPS) if g == e]].sum(1) for e in range(3)]
    )
    assert torch.allclose(out.gate, plain.T)
    assert torch.allclose(out.gate.sum(1), torch.ones(200))
    assert torch.equal(out.class_probability, mixture.router(tokens.tap_cls).softmax(1))
    # The most probable class need not be in the most probable group, and the group decides.
    assert torch.equal(out.expert, out.gate.argmax(1))
    assert (mixture.group[out.class_probability.argmax(1)] != out.expert).any()


def test_router_standardises_and_stays_linear():
    mixture = small_mixture()
    tap_cls = 100 + 7 * small_tokens(50).tap_cls
    tap_cls[:, 2] = 3  # a channel that never varies must not divide by zero
    mixture.router.standardise([tap_cls[:10], tap_cls[10:]])
    weight, bias = mixture.router.linear.weight, mixture.router.linear.bias
    scaled = (tap_cls - tap_cls.mean(0)) / tap_cls.var(0, correction=0).mean().sqrt()
    assert torch.allclose(mixture.router(tap_cls), scaled @ weight.T + bias, atol=1e-4)
    mixture.router.standardise([torch.full((50, 3), 7.0)])  # nor rows that are all alike
    assert torch.isfinite(mixture.router(tap_cls)).all()


@given(
    deviation=st.floats(1e-7, 1e-2),
    value=st.floats(-10, 10),
    channel=st.integers(0, 2),
    reads=st.sampled_from(["tap_cls", "cls"]),
)
def test_a_channel_that_is_nearly_dead_does_not_decide_where_an_ood_row_goes(deviation, value, channel, reads):
    """A value moves the logits by what it is beside the values of all channels, not beside its own deviation."""
    mixture, rows = small_mixture(router_input=reads), small_tokens(200)
    known = getattr(rows, reads).clone()
    known[:, channel] *= deviation / known[:, channel].std()
    mixture.router.standardise([known])
    with torch.no_grad():
        mixture.router.linear.weight.copy_(torch.randn_like(mixture.router.linear.weight))
        ood = known.clone()
        ood[:, channel] = value
        moved = (mixture.router(ood) - mixture.router(known)).abs().max()
        usual = known.var(0, correction=0).mean().sqrt()
        largest = mixture.router.linear.weight[:, channel].abs().max()
    assert moved <= largest * (abs(value) + known[:, channel].abs().max()) / usual * 1.01 + 1e-5


def test_router_statistics_lose_nothing_to_a_far_mean():
    """In blocks of any size; the sum of squares of such numbers would have lost the deviation."""
    rows = 1e4 + 1e-2 * small_tokens(1000).tap_cls.double()
    mixture = small_mixture()
    mixture.router.standardise(rows.split(64))
    assert torch.allclose(mixture.router.mean.double(), rows.mean(0), rtol=1e-7)
    assert torch.allclose(mixture.router.scale.double(), rows.var(0, correction=0).mean().sqrt(), rtol=1e-4)


def test_router_may_read_the_final_cls():
    mixture, tokens = small_mixture(router_input="cls"), small_tokens(9)
    assert torch.equal(mixture.route(tokens)[1], mixture.router(tokens.cls).softmax(1))
    assert mixture.router.linear.in_features == 5


def test_untrained_router_prefers_no_class():
    tokens = encoded(lite0)
    gate, probability = mixture_of(lite0()).route(tokens)
    assert torch.allclose(probability, torch.full((6, 7), 1 / 7))
    assert torch.allclose(gate, torch.tensor([2 / 7, 4 / 7, 1 / 7]).expand(6, 3))


# ------------------------------------------------------------------------------------------------ the mixture


@pytest.mark.parametrize("kind", ["end", "adapter", "frozen"])
def test_only_routed_rows_are_computed(kind):
    mixture, tokens = small_mixture(kind=kind), small_tokens(40)
    seen = {}
    for index, expert in enumerate(mixture.experts):
        expert.end.register_forward_pre_hook(lambda _, args, index=index: seen.update({index: len(args[0])}))
    out = mixture(tokens)
    assert len(seen) > 1
    assert seen == {expert: n for expert, n in enumerate(out.load.tolist()) if n}
    assert sum(seen.values()) == 40
    seen.clear()
    mixture(tokens, torch.full((40,), 2))
    assert seen == {2: 40}


def test_every_row_gets_its_own_experts_answer():
    """Row by row, expert by expert, with nothing clever."""
    mixture, tokens = small_mixture(), small_tokens(30)
    out = mixture(tokens)
    assert len(out.load[out.load > 0]) > 1
    for row in range(30):
        expert = int(out.gate[row].argmax())
        features, outputs = mixture.experts[expert](tokens[row : row + 1])
        logits = torch.full((7,), -torch.inf)
        for output, label in enumerate([c for c, g in enumerate(GROUPS) if g == expert]):
            logits[label] = outputs[0, output]
        assert out.expert[row] == expert
        assert torch.allclose(out.features[row], features[0])
        assert torch.allclose(out.logits[row], logits)
        assert torch.allclose(out.other[row], outputs[0, -1])


def test_oracle_sends_rows_where_it_is_told_and_leaves_the_gate_alone():
    mixture, tokens = small_mixture(), small_tokens(6)
    told = torch.tensor([2, 1, 0, 0, 1, 2])
    out, own = mixture(tokens, told), mixture(tokens)
    assert torch.equal(out.expert, told)
    assert torch.equal(out.gate, own.gate)
    finite = torch.isfinite(out.logits)
    assert torch.equal(finite, mixture.group[None] == told[:, None])  # a head knows its own group alone
    assert torch.equal(out.load, torch.tensor([2, 2, 2]))
    same = told == own.expert
    assert torch.equal(out.features[same], own.features[same])


def test_one_expert_is_the_dense_control_and_has_no_other():
    mixture, tokens = small_mixture([0] * 7), small_tokens(5)
    assert mixture.experts[0].head.out_features == 7
    out = mixture(tokens)
    assert torch.isfinite(out.logits).all()
    assert (out.other == -torch.inf).all()
    assert torch.allclose(out.gate, torch.ones(5, 1))
    assert torch.equal(mixture.outputs.class_targets(torch.arange(7), 0), torch.eye(7))


def test_no_rows_are_no_error():
    out = small_mixture()(small_tokens(0))
    assert (out.features.shape, out.logits.shape, out.load.tolist()) == ((0, 5), (0, 7), [0, 0, 0])


def test_gradients_reach_the_routed_expert_alone():
    mixture = small_mixture()
    mixture(small_tokens(4), torch.ones(4, dtype=torch.int64)).features.sum().backward()
    assert [expert.end.scale.grad is not None for expert in mixture.experts] == [False, True, False]


@given(
    groups=st.integers(1, 4).flatmap(
        lambda e: st.lists(st.integers(0, e - 1), min_size=e, max_size=12).filter(lambda g: set(g) == set(range(e)))
    ),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_targets_stand_where_the_logits_are(groups, smoothing):
    """For every class and every expert: its own column, or "other", the last."""
    mixture = small_mixture(groups)
    labels = torch.arange(len(groups))
    for expert in range(mixture.n_experts):
        targets = mixture.outputs.class_targets(labels, expert, smoothing)
        assert torch.allclose(targets.sum(1), torch.ones(len(groups)))
        own = mixture.classes_of(expert).tolist()
        assert own == [c for c, g in enumerate(groups) if g == expert]
        place = [own.index(c) if c in own else targets.shape[1] - 1 for c in labels.tolist()]
        assert targets.argmax(1).tolist() == place
        assert targets.max(1).values.min() >= 1 - smoothing


def test_soft_cross_entropy_is_torchs_for_hard_targets():
    logits, labels = small_tokens(8).cls, torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    ours = soft_cross_entropy(logits, nn.functional.one_hot(labels, 5).float())
    assert torch.allclose(ours, nn.functional.cross_entropy(logits, labels, reduction="sum"))
    soft = small_tokens(8, seed=1).cls.softmax(1)
    assert torch.allclose(soft_cross_entropy(logits, soft), nn.functional.cross_entropy(logits, soft, reduction="sum"))


def test_group_without_a_class_is_refused():
    with pytest.raises(InputError, match=r"train\.grouping: group 1 "):
        small_mixture([0, 2, 0])


def test_groups_may_be_numpys():
    assert small_mixture(np.array(GROUPS)).config.sizes == (2, 4, 1)
