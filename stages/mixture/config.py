"""The shape of a mixture: what its modules are built from."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stages.config import ExpertKind, RouterInput
from stages.errors import InputError


@dataclass(frozen=True)
class MixtureConfig:
    """Shape of a mixture; every module of it takes this.

    Attributes:
        dim: D, width of the refined features.
        tap_dim: D', width of the tokens at the tap.
        groups: ``[C]`` the group (= expert) of each class, 0 to E − 1, none empty.
        kind: what the experts are made of, see `stages.mixture.model`.
        router_input: what the router reads.
        copies: of the backbone's end in the one expert of kind ``"dense"``.

    Raises:
        InputError: a group without a class.
    """

    dim: int
    tap_dim: int
    groups: tuple[int, ...]
    kind: ExpertKind = "end"
    router_input: RouterInput = "tap_cls"
    copies: int = 1

    def __post_init__(self) -> None:
        if 0 in self.sizes:
            raise InputError(f"train.grouping: group {self.sizes.index(0)} has no class")

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """``[E]`` classes of each group."""
        return tuple(np.bincount(np.asarray(self.groups)).tolist())

    @property
    def n_experts(self) -> int:
        """E."""
        return len(self.sizes)

    @property
    def n_classes(self) -> int:
        """C."""
        return len(self.groups)

    @property
    def has_other(self) -> bool:
        """Whether heads have an output "other": a single expert has nothing outside its group."""
        return self.n_experts > 1

    def n_outputs(self, expert: int) -> int:
        """Of one expert's head: its classes and, last, "other"."""
        return self.sizes[expert] + int(self.has_other)

    @property
    def router_dim(self) -> int:
        """Width of what the router reads."""
        return self.tap_dim if self.router_input == "tap_cls" else self.dim

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of `Tokens` that the mixture needs; the others may be left unread."""
        if self.kind in ("end", "dense"):
            return ("cls", "tap_cls", "registers", "patches")
        return ("cls", "tap_cls") if self.router_input == "tap_cls" else ("cls",)
