"""The end of a backbone, from the tap's tokens to ``cls``: what every expert starts from a copy of."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cache.spec import square_grid
from stages.networks.surgery import Cut, children_before, end_copy
from stages.networks.tokens import Tokens

_EMBEDDINGS = ("pos_embed", "cls_token", "reg_token", "dist_token")  # parameters of a transformer before its blocks


class TransformerEnd(nn.Module):
    """The last blocks of a transformer with its final norm and pooling: tap tokens to ``cls [B, D]``."""

    tail: Any

    def __init__(self, model: nn.Module, blocks: int, block_kwargs: Mapping[str, Any], has_class_token: bool) -> None:
        super().__init__()
        self.has_class_token = has_class_token
        # Rotary embeddings and the like that a block is called with travel with the end.
        self.constants = {k: v for k, v in block_kwargs.items() if v is not None and not isinstance(v, Tensor)}
        self.buffer_names = [k for k, v in block_kwargs.items() if isinstance(v, Tensor)]
        for name in self.buffer_names:
            self.register_buffer(f"block_{name}", block_kwargs[name].cpu().clone(), persistent=False)
        tail: Any = end_copy(model, children_before(model, "blocks"), "blocks", blocks)
        for parameter in _EMBEDDINGS:
            if getattr(tail, parameter, None) is not None:
                setattr(tail, parameter, None)
        self.tail = tail

    def forward(self, tokens: Tokens) -> Tensor:
        """Tap tokens to the final class embedding ``[B, D]``."""
        return self.tail.forward_head(self._refined(tokens), pre_logits=True)

    def patch_tokens(self, tokens: Tokens) -> Tensor:
        """Tap tokens to the patch tokens after the final norm, ``[B, P, D]``."""
        x = self._refined(tokens)
        return x[:, x.shape[1] - tokens.patches.shape[1] :]

    def _refined(self, tokens: Tokens) -> Tensor:
        parts = [tokens.registers, tokens.patches]
        if self.has_class_token:
            parts.insert(0, tokens.tap_cls[:, None])
        x = torch.cat(parts, dim=1)  # (B, 1 + R + P, D')
        kwargs = self.constants | {name: getattr(self, f"block_{name}") for name in self.buffer_names}
        for block in self.tail.blocks:
            x = block(x, **kwargs)
        return self.tail.norm(x)


class ConvolutionalEnd(nn.Module):
    """The last stages of a convolutional net with its head convolution, norm and pooling: tap map to ``cls [B, D]``."""

    tail: Any

    def __init__(self, model: nn.Module, cut: Cut, keep: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.tail = end_copy(model, cut.before, cut.sequence, keep)

    def forward(self, tokens: Tokens) -> Tensor:
        """Tap tokens to the pooled final vector ``[B, D]``."""
        return self.tail.forward_head(self._map(tokens), pre_logits=True)

    def patch_tokens(self, tokens: Tokens) -> Tensor:
        """Tap tokens to the pixels of the map that is pooled, ``[B, P, D]``."""
        return self._map(tokens).flatten(2).transpose(1, 2)

    def _map(self, tokens: Tokens) -> Tensor:
        patches = tokens.patches if tokens.patches.shape[1] else tokens.tap_cls[:, None]
        height, width = self.grid if patches.shape[1] == self.grid[0] * self.grid[1] else square_grid(patches.shape[1])
        x = patches.transpose(1, 2).unflatten(2, (height, width))  # (B, D', h, w)
        x = x.contiguous(memory_format=torch.channels_last)
        return self.tail.forward_features(x)


class ResidualEnd(nn.Module):
    """Stands in where a backbone's end cannot be cut out: ``cls`` plus a block whose last layer starts at zero."""

    def __init__(self, dim: int, tap_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim + tap_dim)
        self.hidden = nn.Linear(dim + tap_dim, dim)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def patch_tokens(self, tokens: Tokens) -> Tensor:
        """The patches as they were cached: such a backbone's are those that the whole network ends in."""
        return tokens.patches

    def forward(self, tokens: Tokens) -> Tensor:
        """``cls`` and the tap's class token to refined ``cls``, ``[B, D]``."""
        x = self.norm(torch.cat([tokens.cls, tokens.tap_cls], dim=1))
        return tokens.cls + self.out(F.gelu(self.hidden(x)))


BackboneEnd = TransformerEnd | ConvolutionalEnd | ResidualEnd
