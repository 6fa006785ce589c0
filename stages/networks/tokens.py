"""What a backbone gives of a batch of images, and which part of it a cache keeps. Needs torch alone."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.errors import InputError


@dataclass(frozen=True)
class Tokens:
    """What is known of a batch of images: the final class embedding and the tokens at the tap, un-normalised.

    Attributes:
        cls: ``[B, D]`` final, normalised class embedding (or pooled vector where there is no class token).
        tap_cls: ``[B, D']`` class token at the tap; mean of `patches` where there is no class token.
        registers: ``[B, R, D']`` other prefix tokens at the tap.
        patches: ``[B, P, D']`` patch tokens at the tap, row-major; for a convolutional net the pixels of the map.
    """

    cls: Tensor
    tap_cls: Tensor
    registers: Tensor
    patches: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        """Apply one function to every field."""
        return Tokens(*(function(getattr(self, field.name)) for field in fields(self)))

    def combine(self, other: "Tokens", function: Callable[[Tensor, Tensor], Tensor]) -> "Tokens":
        """Apply one function to every field of both."""
        return Tokens(*(function(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    def concatenate(self, other: "Tokens") -> "Tokens":
        """The rows of both."""
        return self.combine(other, lambda x, y: torch.cat([x, y]))

    def __getitem__(self, rows: Any) -> "Tokens":
        return self.map(lambda x: x[rows])

    def __len__(self) -> int:
        return len(self.cls)


def reduce_patches(tokens: Tokens, grid: tuple[int, int], option: str) -> Tokens:
    """Apply the cache's ``patches`` option: ``"full"``, ``"pool:G"`` or ``"none"``."""
    if option == "full":
        return tokens
    if option == "none":
        return Tokens(tokens.cls, tokens.tap_cls, tokens.registers, tokens.patches[:, :0])
    maps = tokens.patches.transpose(1, 2).unflatten(2, grid)
    pooled = F.adaptive_avg_pool2d(maps, stored_grid(grid, option)).flatten(2).transpose(1, 2)
    return Tokens(tokens.cls, tokens.tap_cls, tokens.registers, pooled)


def stored_grid(grid: tuple[int, int], option: str) -> tuple[int, int]:
    """``(h, w)`` of the patch tokens that the ``patches`` option leaves.

    Raises:
        InputError: it asks for more than there are: pooled, some would be there several times.
    """
    if option == "none":
        return (0, 0)
    if option == "full":
        return grid
    side = int(option.removeprefix("pool:"))
    if side > min(grid):
        raise InputError(
            f'cache.patches: "{option}" given, but the network makes {grid[0]} x {grid[1]} patch tokens: give "full", '
            "or fewer"
        )
    return (side, side)
