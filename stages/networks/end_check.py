"""Whether a backbone's end and tokens belong together: whether it runs on them, and gives the ``cls`` beside them."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from stages.errors import InputError
from stages.networks.tokens import Tokens

if TYPE_CHECKING:
    from stages.inputs.arrays import ArrayTable
    from stages.networks.backbone import Backbone

# Largest difference, relative to the largest value of `cls`, at which the cut-out end counts as the backbone's own.
END_TOLERANCE = 1e-4

_CHECKED_ROWS = 16  # of a table, run through the backbone's end


@torch.inference_mode()
def reproduces(end: nn.Module, tokens: Tokens) -> bool:
    """Whether an end gives the ``cls`` of tokens.

    Raises:
        Exception: it does not run by itself; each architecture fails in its own way.
    """
    error = (end(tokens) - tokens.cls).abs().max()
    return bool(error <= END_TOLERANCE * tokens.cls.abs().max())


@torch.inference_mode()
def runs_on(end: nn.Module, tokens: Tokens) -> bool:
    """Whether an end (or what is made of ends) runs on such tokens, and tells two images or more apart by them."""
    try:
        features = end(tokens)
    except (RuntimeError, ValueError, AssertionError):  # as the architecture's own code has it
        return False
    return bool(torch.isfinite(features).all() and (features != features[:1]).any())


def check_end(table: "ArrayTable", backbone: "Backbone") -> None:
    """Refuse tokens that do not lead to ``cls`` through the backbone's end: experts would start from a wrong place.

    Args:
        table: rows of a file of features that hold tokens; the first of them are looked at.
        backbone: whose end the experts would be.

    Raises:
        InputError: other shapes than the backbone's, or other features.
    """
    raw = {name: column.read(0, min(_CHECKED_ROWS, len(table))) for name, column in table.columns.items()}
    read = {name: torch.from_numpy(array.astype(np.float32)) for name, array in raw.items()}
    patches = read["patches"].flatten(1, -2)
    tokens = Tokens(read["cls"], read["tap_cls"], read.get("registers", patches[:, :0]), patches)
    given = {
        "D": (tokens.cls.shape[1], backbone.dim),
        "D'": (tokens.tap_cls.shape[1], backbone.tap_dim),
        "R": (tokens.registers.shape[1], backbone.n_registers),
        "h, w": (table.grid, backbone.grid),
    }
    name = f"{backbone.config.name} at {backbone.config.image_size} px"
    for what, (ours, theirs) in given.items():
        if ours != theirs:
            raise InputError(f"{table.path}: {what} of its tokens is {ours}, that of {name} {theirs}")
    if not backbone.cut:
        return
    with torch.inference_mode():
        error = (backbone.end()(tokens) - tokens.cls).abs().max() / tokens.cls.abs().max()
    # What float16 rounds off, a block carries on to the features.
    if not error <= (END_TOLERANCE if table.dtype == "float32" else 50 * END_TOLERANCE):
        raise InputError(
            f"{table.path}: its tokens do not lead to its cls through the last {backbone.expert_blocks} block(s) of "
            f"{name} (off by {100 * float(error):.2g} % of the largest value): give the un-normalised tokens that "
            "enter them, registers included, and the same weights; or leave [backbone] out"
        )
