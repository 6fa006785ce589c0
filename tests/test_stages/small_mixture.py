"""Mixtures that tests build: of real backbones on photographs, and of ends that are a single vector."""

from functools import cache

import pytest
import torch
from torch import nn

from stages.config import BackboneConfig
from stages.mixture.config import MixtureConfig
from stages.mixture.model import MixtureOfFeatureExperts, build_mixture
from stages.networks.backbone import Backbone, load_backbone
from stages.networks.tokens import Tokens
from tests.test_stages.drawn import photos

GROUPS = [1, 0, 1, 2, 0, 1, 1]  # group of each of seven classes


@cache
def lite0(expert_blocks: int = 1) -> Backbone:
    return load_backbone(BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=48), expert_blocks)


@cache
def encoded(source, *arguments) -> Tokens:
    backbone = source(*arguments)
    return backbone.encode(photos(backbone, 6)).map(torch.clone)  # ordinary tensors, as a cache gives them


def mixture_of(backbone: Backbone, groups=GROUPS, **kwargs) -> MixtureOfFeatureExperts:
    return build_mixture(MixtureConfig(backbone.dim, backbone.tap_dim, tuple(groups), **kwargs), backbone.end).eval()


class MeanEnd(nn.Module):
    """The smallest end that learns: for tests of what stands around it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, tokens: Tokens) -> torch.Tensor:
        return tokens.patches.mean(1) * self.scale


def small_tokens(n: int, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Tokens(draw(n, 5), draw(n, 3), draw(n, 0, 5), draw(n, 4, 5))


def small_mixture(groups=GROUPS, seed: int = 0, **kwargs) -> MixtureOfFeatureExperts:
    mixture = build_mixture(MixtureConfig(5, 3, tuple(groups), **kwargs), MeanEnd)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return mixture.eval()


KINDS = [{}, {"kind": "adapter"}, {"kind": "frozen"}, {"kind": "dense", "groups": [0] * 7, "copies": 3}]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["end", "adapter", "frozen", "dense"])
