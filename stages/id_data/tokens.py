"""Rows of a cache as the tokens that networks read."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache import FeatureCache
from stages.id_data.split import Rows
from stages.networks.tokens import Tokens

ALL_TOKENS = ("cls", "tap_cls", "registers", "patches")


def read_tokens(
    cache: FeatureCache,
    rows: Rows | slice,
    device: str | torch.device = "cpu",
    reads: Sequence[str] = ALL_TOKENS,
) -> Tokens:
    """Rows of a cache as float32 `Tokens`; what the cache does not hold, or was not asked for, has length 0."""
    return as_tokens({name: stored.to(device) for name, stored in stored_tokens(cache, rows, reads).items()})


def stored_tokens(
    cache: FeatureCache,
    rows: Rows | slice,
    reads: Sequence[str] = ALL_TOKENS,
    new: Callable[..., NDArray[Any]] = np.empty,
) -> dict[str, Tensor]:
    """Rows of a cache on the host, in the type that they are stored in: what `as_tokens` makes tokens of, anywhere.

    Args:
        cache: to read from.
        rows: which of it.
        reads: which tokens, as far as the cache has them; ``cls`` in any case.
        new: makes the arrays that they are read into, see `cache.FeatureCache.read`.
    """
    known = [name for name in reads if name in cache.spec.datasets()]
    return {name: torch.from_numpy(cache.read(name, rows, new)) for name in dict.fromkeys(("cls", *known))}


def bytes_of_row(cache: FeatureCache, reads: Sequence[str] = ALL_TOKENS) -> int:
    """Bytes that `stored_tokens` reads of a row."""
    stored = cache.spec.datasets()
    return sum(math.prod(stored[name][0]) * stored[name][1].itemsize for name in reads if name in stored)


def as_tokens(stored: Mapping[str, Tensor]) -> Tokens:
    """Float32 `Tokens` of what `stored_tokens` gave, wherever that is now; other names are passed over."""
    cls = stored["cls"].float()
    tap_cls = stored["tap_cls"].float() if "tap_cls" in stored else cls[:, :0]
    absent = tap_cls[:, None][:, :0]
    registers = stored["registers"].float() if "registers" in stored else absent
    patches = stored["patches"].float() if "patches" in stored else absent
    return Tokens(cls, tap_cls, registers, patches)
