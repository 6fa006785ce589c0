"""Tokens: what a cache keeps of them."""

import pytest
import torch

from stages.errors import InputError
from stages.networks.tokens import Tokens, reduce_patches, stored_grid


def test_pooled_patches_are_means_of_their_cells():
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 24, 5, generator=generator)  # 4 x 6
    tokens = Tokens(torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 0, 5), patches)
    pooled = reduce_patches(tokens, (4, 6), "pool:2").patches
    cells = patches.reshape(2, 2, 2, 2, 3, 5).mean((2, 4))  # batch, 2 x rows, 2 x columns, D'
    assert torch.allclose(pooled, cells.reshape(2, 4, 5), atol=1e-6)
    assert reduce_patches(tokens, (4, 6), "full") is tokens
    assert reduce_patches(tokens, (4, 6), "none").patches.shape == (2, 0, 5)
    assert [stored_grid((4, 6), option) for option in ("full", "pool:2", "none")] == [(4, 6), (2, 2), (0, 0)]


def test_more_tokens_than_there_are_are_refused():
    assert stored_grid((4, 6), "pool:4") == (4, 4)
    with pytest.raises(InputError, match='"pool:5" given, but the network makes 4 x 6 patch tokens: give "full"'):
        stored_grid((4, 6), "pool:5")
