"""Taps: class token and mean patch after some blocks or stages of a network, read in the one forward pass.

::

    image ── stem ── block 1 ── … ── block 3 ── … ── block 12 ── norm, pooling ── cls
                                        │               │
                                     taps[:, 0]      taps[:, 1]        of taps = [3, 12]

They are the tokens as they are there, un-normalised. Nobody who does not ask for them pays for them.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.errors import InputError
from stages.networks.surgery import tap_points

AskedTaps = Sequence[int] | Literal["all"] | None


class Kept(TypedDict, total=False):
    """What a cache keeps of a network's tokens, and how, see `Backbone.feature_spec`.

    Attributes:
        dtype: as features are stored; ``"float16"`` by default.
        patches: ``"full"``, the default, ``"pool:G"`` or ``"none"``.
        taps: blocks or stages after which class token and mean patch are kept, counted from 1, or ``"all"``.
    """

    dtype: Literal["float16", "float32"]
    patches: str
    taps: AskedTaps


class TapLayout(NamedTuple):
    """Which taps a cache holds and what each is, as `cache.FeatureSpec` has them.

    Attributes:
        taps: blocks or stages, counted from 1, ascending; empty for none.
        tap_widths: features of each.
        tap_tokens: 2: class token and mean patch; 1: the mean alone; 0 for none.
    """

    taps: tuple[int, ...] = ()
    tap_widths: tuple[int, ...] = ()
    tap_tokens: int = 0


class Taps:
    """Hooks on the blocks or stages of a network; several threads may run it, and each reads its own pass.

    Args:
        model: timm's.

    Attributes:
        count: how many there are; 0 where its family has no such sequence.
        n_tokens: of a sequence with its class token and registers, where they are known: another sequence is not read.
    """

    def __init__(self, model: nn.Module) -> None:
        self.n_tokens: int | None = None
        self._class_token = getattr(model, "cls_token", None) is not None
        self._prefix = int(getattr(model, "num_prefix_tokens", int(self._class_token)))
        self._channels_last = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")
        self._pass = _Pass()
        parts = tap_points(model)
        self.count = len(parts)
        for number, part in enumerate(parts, start=1):
            part.register_forward_hook(partial(self._keep, number))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Taps":
        return self  # a copy of the network is read by hooks of its own

    def numbers(self, asked: Sequence[int] | Literal["all"], name: str) -> tuple[int, ...]:
        """Blocks or stages that are asked for, ascending.

        Args:
            asked: numbers from 1, or all there are.
            name: of the network, for the error.

        Raises:
            InputError: there are not as many, or the family has no such sequence.
        """
        if not self.count:
            raise InputError(f"cache.taps: {name} is no sequence of blocks or stages: leave it out, or take another")
        if asked == "all":
            return tuple(range(1, self.count + 1))
        if not asked or min(asked) < 1 or max(asked) > self.count:
            raise InputError(f"cache.taps: {[*asked]} given, {name} has {self.count} blocks or stages, counted from 1")
        return tuple(sorted({*asked}))

    @contextmanager
    def reading(self, numbers: Sequence[int]) -> Iterator[dict[int, Tensor | None]]:
        """Around a forward pass of this thread: fills in what stands after each, ``[B, tokens, D]`` float32.

        None stays where a part gives no tokens that could be told apart.
        """
        found: dict[int, Tensor | None] = dict.fromkeys(numbers)
        self._pass.found = found
        try:
            yield found
        finally:
            self._pass.found = None

    def _keep(self, number: int, _part: nn.Module, _inputs: Any, output: Any) -> None:
        if self._pass.found is not None and number in self._pass.found:
            self._pass.found[number] = self._tokens(output)

    def _tokens(self, output: Any) -> Tensor | None:
        """``[B, tokens, D]``: class token and mean patch, or the mean; pooled here, so that no map is held longer."""
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            return None
        if output.ndim == 4:
            return output.mean((1, 2) if self._channels_last else (2, 3), dtype=torch.float32)[:, None]
        if self._prefix and output.shape[1] != self.n_tokens:
            return None
        mean = output[:, self._prefix :].mean(1, dtype=torch.float32)
        return torch.stack([output[:, 0].float(), mean], dim=1) if self._class_token else mean[:, None]


class _Pass(threading.local):
    """What the forward pass that this thread runs is asked for."""

    found: dict[int, Tensor | None] | None = None


def layout_of(found: Mapping[int, Tensor | None], name: str) -> TapLayout:
    """Which taps a network gives, from what was read of a pass.

    Raises:
        InputError: there are none after one of the blocks or stages that were asked for.
    """
    shapes = {number: None if tokens is None else tokens.shape[1:] for number, tokens in found.items()}
    if unread := [number for number, shape in shapes.items() if shape is None]:
        raise InputError(f"cache.taps: what {name} makes after block or stage {unread[0]} cannot be read: leave it out")
    known = [shape for shape in shapes.values() if shape is not None]
    if len(tokens := {shape[0] for shape in known}) != 1:
        raise InputError(f"cache.taps: {name} has class tokens after some of its stages alone: it cannot be read")
    return TapLayout(tuple(shapes), tuple(shape[1] for shape in known), tokens.pop())


def stacked(found: Mapping[int, Tensor | None]) -> Tensor:
    """What was read, as a cache holds it: ``[B, L, 2, D]``, of one token ``[B, L, D]``; zeros beyond a tap's width."""
    read = [tokens for tokens in found.values() if tokens is not None]
    width = max(tokens.shape[2] for tokens in read)
    taps = torch.stack([F.pad(tokens, (0, width - tokens.shape[2])) for tokens in read], dim=1)
    return taps if taps.shape[2] == 2 else taps[:, :, 0]
