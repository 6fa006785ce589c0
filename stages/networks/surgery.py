"""Where a timm model's blocks or stages stand, and what is done with them: cut, frozen, compiled.

A transformer's are the entries of ``blocks``, a convolutional net's those of ``blocks`` or ``stages``, or children
``layer1``, ``layer2``, … of the model itself.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stages.errors import InputError

_SEQUENCES = ("blocks", "stages")
_NUMBERED = frozenset(f"layer{i}" for i in range(1, 9))


@dataclass(frozen=True)
class Cut:
    """Where a model is cut in two, and how its end is taken out.

    Attributes:
        module: the first of the end; what enters it are the tokens at the tap.
        before: children of the model that the end leaves out.
        sequence: child of which the end keeps the last entries; None where all that is left out are children.
    """

    module: nn.Module
    before: tuple[str, ...]
    sequence: str | None


def find_cut(model: nn.Module, expert_blocks: int, name: str) -> Cut | None:
    """The place before a model's last blocks or stages; None where its family has no such sequence.

    Args:
        model: timm's.
        expert_blocks: how many are to lie behind the tap.
        name: of the model, for the error.

    Raises:
        InputError: the model has no more than these.
    """
    for sequence in _SEQUENCES:
        parts = getattr(model, sequence, None)
        if isinstance(parts, nn.Sequential | nn.ModuleList) and len(parts) > 1:
            _check_depth(expert_blocks, len(parts), name)
            return Cut(parts[-expert_blocks], children_before(model, sequence), sequence)
    numbered = [child for child, _ in model.named_children() if child in _NUMBERED]
    if len(numbered) > 1:
        _check_depth(expert_blocks, len(numbered), name)
        first = numbered[-expert_blocks]
        return Cut(getattr(model, first), children_before(model, first), None)
    return None


def _check_depth(expert_blocks: int, depth: int, name: str) -> None:
    if expert_blocks >= depth:
        raise InputError(f"cache.expert_blocks: {expert_blocks} given, {name} has {depth}: give at most {depth - 1}")


def children_before(model: nn.Module, child: str) -> tuple[str, ...]:
    """Names of a model's children before one of them."""
    names = [name for name, _ in model.named_children()]
    return tuple(names[: names.index(child)])


def end_copy(model: nn.Module, before: Sequence[str], sequence: str | None, keep: int) -> nn.Module:
    """A deep copy of a model's end alone: what is left out is not copied first.

    Args:
        model: whole, and whole again afterwards.
        before: children that are the identity in the copy.
        sequence: child of whose parts the copy has only the last ones, if any.
        keep: how many.
    """
    instead: dict[str, Any] = {name: nn.Identity() for name in before}
    if sequence is not None:
        instead[sequence] = getattr(model, sequence)[-keep:]
    kept = {name: getattr(model, name) for name in instead}
    for name, module in instead.items():
        setattr(model, name, module)
    try:
        return copy.deepcopy(model)
    finally:
        for name, module in kept.items():
            setattr(model, name, module)


def tap_points(model: nn.Module) -> list[nn.Module]:
    """The blocks or stages after which tokens can be read; none where the model's family has no such sequence."""
    for sequence in (*_SEQUENCES, "layers"):  # Swin's stages
        parts = getattr(model, sequence, None)
        if isinstance(parts, nn.Sequential | nn.ModuleList) and len(parts) > 1:
            return list(parts)
    numbered = [module for name, module in model.named_children() if name in _NUMBERED]
    return numbered if len(numbered) > 1 else []


def _parts(model: nn.Module) -> list[nn.Module]:
    """The blocks or stages that a backbone is made of."""
    for sequence in _SEQUENCES:
        if isinstance(parts := getattr(model, sequence, None), nn.Sequential | nn.ModuleList):
            return list(parts)
    return [module for name, module in model.named_children() if name.startswith("layer")] or [model]


def n_parts(model: nn.Module) -> int:
    """How many blocks (transformer) or stages (convolutional net) a timm model is made of."""
    return len(_parts(model))


def freeze_first(model: nn.Module, n: int, key: str) -> None:
    """Keep the first n blocks or stages of a timm model as they are, and all that stands before them; train the rest.

    Args:
        model: with its head.
        n: 0 freezes nothing.
        key: what asked for it, for the error.

    Raises:
        InputError: there are not as many, or the family has no such sequence.
    """
    model.requires_grad_(True)
    if n == 0:
        return
    parts = _parts(model)
    if n > len(parts) or parts == [model]:
        raise InputError(f"{key}: {n} given, the backbone has {len(parts)} blocks or stages that can stay as they are")
    names = [name for name, _ in model.named_children()]
    last = next(name for name in reversed(names) if getattr(model, name) is parts[-1] or name in _SEQUENCES)
    after = [getattr(model, name) for name in names[names.index(last) + 1 :]]
    model.requires_grad_(False)
    for part in [*parts[n:], *after]:
        part.requires_grad_(True)


def compile_parts(model: nn.Module, dynamic: bool | None = None) -> None:
    """Let torch.compile replace the forward pass of each block or stage, and not what holds them together.

    Args:
        model: timm's.
        dynamic: whether batches differ in their size; None finds out.
    """
    for part in _parts(model):
        part.forward = torch.compile(part.forward, dynamic=dynamic)


def uncompile_parts(model: nn.Module) -> None:
    """Take back what `compile_parts` has done."""
    for part in _parts(model):
        part.__dict__.pop("forward", None)


def restore_forward(model: nn.Module) -> None:
    """Take hooks and compiled forward passes off a copy: they are the original's."""
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()
        module._forward_hooks.clear()
        module.__dict__.pop("forward", None)
