"""Networks of one architecture run at once: what they compute is what each computes alone."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from stages.networks.stacked import CONVOLVED, MOST_PADDED, Stacked, pays
from stages.networks.tokens import Tokens
from tests.test_stages.test_networks.networks import SMALL, untrained

# Each has parts that others have not: batch norm, LayerScale, relative positions, rotary ones, squeeze and excitation.
ENDS = [
    ("resnet10t", {}),
    ("convnext_atto", {}),
    ("efficientnet_b0", {}),
    ("beit_base_patch16_224", {"img_size": 64} | SMALL),
    ("eva02_tiny_patch14_224", {"img_size": 64} | SMALL),
]


def changed(ends):
    """Each other than the one that all are copies of."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for end in ends:
            for tensor in (*end.parameters(), *(b for b in end.buffers() if b.is_floating_point())):
                tensor.mul_(1 + 0.2 * torch.rand(tensor.shape, generator=generator))
    return ends


def drawn(backbone, *shape):
    """Tokens at its tap."""
    n_patches = backbone.grid[0] * backbone.grid[1]
    sizes = [(backbone.dim,), (backbone.tap_dim,), (backbone.n_registers, backbone.tap_dim)]
    generator = torch.Generator().manual_seed(1)
    return Tokens(
        *(torch.randn(*shape, *size, generator=generator) for size in (*sizes, (n_patches, backbone.tap_dim)))
    )


@pytest.mark.parametrize(("name", "kwargs"), ENDS, ids=[name for name, _ in ENDS])
def test_ends_of_any_family_compute_and_learn_what_each_does_alone(name, kwargs):
    backbone = untrained(name, **kwargs)
    ends = changed([backbone.end().eval() for _ in range(3)])
    tokens = drawn(backbone, 2, 2).map(lambda x: x.requires_grad_())
    stacked = Stacked(ends, reads_patches=True)
    assert stacked.runs_on(drawn(backbone, 1))
    members = [0, 2]
    ours = stacked(members, tokens)
    alone = torch.stack([ends[member](tokens[place]) for place, member in enumerate(members)])
    assert (ours - alone).abs().max() <= 1e-5 * alone.abs().max()
    learned = [parameter for member in members for parameter in ends[member].parameters()] + [tokens.patches]
    weight = torch.randn(alone.shape, generator=torch.Generator().manual_seed(2))
    for found, expected in zip(
        torch.autograd.grad((ours * weight).sum(), learned, allow_unused=True),
        torch.autograd.grad((alone * weight).sum(), learned, allow_unused=True),
        strict=True,
    ):
        assert (found is None) or (found - (0 if expected is None else expected)).abs().max() <= 1e-4 * max(
            1, found.abs().max()
        )


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_in_mixed_precision_they_are_as_far_off_as_each_alone(name):
    backbone = untrained(name)
    ends, tokens = changed([backbone.end().eval() for _ in range(2)]), drawn(backbone, 2, 3)
    with torch.no_grad():
        exact = torch.stack([end(tokens[place]) for place, end in enumerate(ends)])
        with torch.autocast("cpu", torch.bfloat16):
            ours = Stacked(ends, reads_patches=True)(range(2), tokens)
            alone = torch.stack([end(tokens[place]) for place, end in enumerate(ends)])
    assert ours.dtype == alone.dtype
    assert (ours - exact).abs().max() <= 2 * (alone - exact).abs().max()


class Linear(nn.Module):
    """A head on ``cls``."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(5, outputs)

    def forward(self, tokens: Tokens) -> torch.Tensor:
        return self.linear(tokens.cls)


def cls(*shape):
    x = torch.randn(*shape, 5, generator=torch.Generator().manual_seed(0))
    return Tokens(x, x[..., :0], x[..., None, :0], x[..., None, :0])


def test_heads_of_different_lengths_end_in_zeros():
    heads = [Linear(outputs) for outputs in (2, 4, 3)]
    tokens = cls(3, 7)
    ours = Stacked(heads, reads_patches=False)(range(3), tokens)
    assert ours.shape == (3, 7, 4)
    for place, head in enumerate(heads):
        alone = head(tokens[place])
        assert torch.allclose(ours[place, :, : alone.shape[1]], alone, atol=1e-6)
        assert (ours[place, :, alone.shape[1] :] == 0).all()
    ours.sum().backward()
    assert [head.linear.weight.grad.shape for head in heads] == [(2, 5), (4, 5), (3, 5)]


def test_weights_are_read_in_every_call():
    """They may have been trained, loaded, or moved since."""
    heads = [Linear(2), Linear(2)]
    stacked, tokens = Stacked(heads, reads_patches=False), cls(7)
    stacked(range(2), tokens, shared=True)
    heads[1].load_state_dict(heads[0].state_dict())
    heads[0].double().float()
    with torch.no_grad():
        heads[0].linear.bias.add_(1)
    first, second = stacked(range(2), tokens, shared=True)
    assert torch.allclose(first, second + 1)


class Peeks(Linear):
    """Its way depends on a number."""

    def forward(self, tokens: Tokens) -> torch.Tensor:
        return super().forward(tokens) * (1 if tokens.cls.mean() + self.linear.bias[0] > 0 else 2)


class Sorts(Linear):
    """vmap runs an operation that it has no rule for once a network, and warns."""

    def forward(self, tokens: Tokens) -> torch.Tensor:
        out = super().forward(tokens)
        return out * torch.histc(out, bins=4).sum()


class Stuck(Linear):
    """It has no way back."""

    def forward(self, tokens: Tokens) -> torch.Tensor:
        return OneWay.apply(super().forward(tokens))


class OneWay(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no way back")


@pytest.mark.parametrize("network", [Peeks, Sorts, Stuck])
def test_what_vmap_cannot_do_is_known_before(network):
    assert not Stacked([network(2), network(2)], reads_patches=False).runs_on(cls(1))
    assert Stacked([Linear(2), Linear(2)], reads_patches=False).runs_on(cls(1))
    with torch.inference_mode():
        assert Stacked([Linear(2), Linear(2)], reads_patches=False).runs_on(cls(1))


def test_attention_with_a_mask_is_the_same():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(1, 2, 4, 4))

        def forward(self, tokens: Tokens) -> torch.Tensor:
            x = tokens.patches.unflatten(2, (2, 3)).transpose(1, 2)
            return F.scaled_dot_product_attention(x, x, x, attn_mask=self.bias, scale=0.3)

    networks = [Attends(), Attends()]
    patches = torch.randn(2, 3, 4, 6)
    tokens = Tokens(patches[:, :, 0], patches[:, :, 0], patches[:, :, :0], patches)
    ours = Stacked(networks, reads_patches=True)(range(2), tokens)
    alone = torch.stack([network(tokens[place]) for place, network in enumerate(networks)])
    assert torch.allclose(ours, alone, atol=1e-6)


MEASURED = [  # stacked / one after another: `make check-gpu` on an H100, forwards and backwards
    ("vit_small_patch14_dinov2", 4, 64, 1.7),
    ("vit_small_patch14_dinov2", 4, 256, 0.93),
    ("vit_small_patch14_dinov2", 16, 64, 3.9),
    ("vit_small_patch14_dinov2", 16, 256, 2.9),
    ("tf_efficientnet_lite0", 4, 64, 0.95),
    ("tf_efficientnet_lite0", 4, 256, 0.48),
    ("tf_efficientnet_lite0", 16, 64, 2.4),
    ("tf_efficientnet_lite0", 16, 256, 1.4),
]


@pytest.fixture(scope="module")
def work():
    """Of a row of an expert at 224 px, as `Stacked` counts it."""

    def of_block(block: nn.Module, *n_patches: int) -> float:
        class Reads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = block

        row = Tokens(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 0, 1), torch.zeros(1, *n_patches, 1))
        return Stacked([Reads()], reads_patches=True).work_of(row)

    lite0 = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    block = timm.create_model("vit_small_patch14_dinov2", depth=1, num_classes=0).blocks[0]
    end = nn.Sequential(lite0.blocks[6], lite0.conv_head, lite0.bn2)
    return {"vit_small_patch14_dinov2": of_block(block, 256), "tf_efficientnet_lite0": of_block(end, 49)}


@pytest.mark.parametrize(("name", "experts", "batch", "ratio"), MEASURED)
def test_on_a_gpu_it_pays_where_it_was_measured_to_be_faster(work, name, experts, batch, ratio):
    own = np.bincount(np.random.default_rng(0).integers(0, experts, batch), minlength=experts)
    counts = [2 * int(count) for count in own]  # and as many of other experts' groups
    assert pays(counts, work[name], torch.device("cuda")) == (ratio > 1)


def test_windows_that_are_not_depthwise_are_left_one_after_another():
    def network(**options) -> nn.Module:
        return nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, **options)])

    works = {
        name: Stacked([network(**options)], reads_patches=False).work_of(cls(1))
        for name, options in {
            "of one": {"kernel_size": 1},
            "depthwise": {"kernel_size": 3, "groups": 8},
            "dense": {"kernel_size": 3},
            "in groups": {"kernel_size": 3, "groups": 2},
        }.items()
    }
    assert works["of one"] == 2 * (64 + 8)
    assert works["depthwise"] == CONVOLVED * (64 + 8 + 72 + 8)
    assert not pays([1] * 16, works["dense"], torch.device("cuda"))
    assert works["dense"] == works["in groups"] == math.inf


def test_on_a_cpu_it_never_pays_and_on_a_gpu_until_rows_take_longer_than_launches():
    gpu, work = torch.device("cuda"), 5e8
    assert pays([8, 8, 8, 8], work, gpu)
    assert not pays([8, 8, 8, 8], work, torch.device("cpu"))
    assert pays([6, 10, 0, 8], work, gpu)
    assert not pays([400, 400, 10, 10], work, gpu)
    assert pays([400, 400, 10, 10], work / 1e4, gpu)
    assert not pays([1000, *[1] * 15], 1, gpu)  # for nothing, but in MOST_PADDED times the memory
    assert MOST_PADDED * 1015 < 1000 * 16
    assert not pays([400, 0, 0, 0], work, gpu)  # nothing to save
    assert not pays([1, 1], 1, gpu)  # to stack costs as much
    assert not pays([0, 0], work, gpu)


def test_whether_it_is_used_can_be_forced():
    stacked = Stacked([Linear(2), Linear(2)], reads_patches=False)
    assert not stacked.is_used([1, 1], lambda: cls(1))
    stacked.forced = True
    assert stacked.is_used([1, 0], lambda: cls(1))
    assert not stacked.is_used([0, 0], lambda: cls(1))
