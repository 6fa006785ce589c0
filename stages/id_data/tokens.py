"""Rows of a cache as the tokens that networks read."""

from collections.abc import Sequence

import torch

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

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(cache.read(name, rows)).to(device).float()

    cls = read("cls")
    known = [name for name in reads if name in cache.spec.datasets()]
    tap_cls = read("tap_cls") if "tap_cls" in known else cls[:, :0]
    absent = tap_cls[:, None][:, :0]
    registers = read("registers") if "registers" in known else absent
    patches = read("patches") if "patches" in known else absent
    return Tokens(cls, tap_cls, registers, patches)
