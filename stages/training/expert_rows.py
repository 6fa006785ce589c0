"""What each expert learns from a batch of cached rows: drawn on the host, sent to where it learns in a few tensors."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.id_data.rows import Labels
from stages.mixture.mixup import Mixing, draw_mixing


class ExpertRows(NamedTuple):
    """What one expert learns from a batch, rows counted in the batch; all but `inside` is this process's share."""

    expert: int
    inside: NDArray[np.int64]  # rows of its group, of all processes
    mixing: Mixing  # of all of them
    own: NDArray[np.int64]  # rows of its group
    partners: NDArray[np.int64]  # what each of `own` is mixed with
    lam: NDArray[np.float32]  # their λ
    other: NDArray[np.int64]  # rows of other groups


class PlacedRows(NamedTuple):
    """The same on the device where the expert learns, rows counted among those that were read."""

    expert: int
    own: Tensor
    partners: Tensor
    other: Tensor
    lam: Tensor


class Draw(NamedTuple):
    """What is drawn for a batch.

    Attributes:
        parts: of the experts that have rows in it.
        needed: ``[n]`` rows of the batch that this process computes with, ascending.
        state: of the generator, once this is drawn.
    """

    parts: list[ExpertRows]
    needed: NDArray[np.int64]
    state: dict[str, Any]

    def columns(self, labels: Labels) -> dict[str, Tensor]:
        """What is sent of it: where its rows stand among `needed`, their λ, and the labels of `needed`.

        Args:
            labels: ``[B]`` of the batch.
        """
        rows = [own for part in self.parts for own in (part.own, part.partners, part.other)]
        routed = np.sort(np.concatenate([part.own for part in self.parts]))
        return {
            "places": torch.from_numpy(np.searchsorted(self.needed, np.concatenate([*rows, routed]))),
            "lam": torch.from_numpy(np.concatenate([part.lam for part in self.parts])),
            "truth": torch.from_numpy(labels[self.needed]).long(),
        }

    def placed(self, columns: dict[str, Tensor]) -> tuple[list[PlacedRows], Tensor]:
        """The parts, and the rows that the router learns from, once `columns` are on the device."""
        sizes = [len(own) for part in self.parts for own in (part.own, part.partners, part.other)]
        n_routed = sum(len(part.own) for part in self.parts)
        *places, routed = columns["places"].split([*sizes, n_routed])
        lams = columns["lam"].split([len(part.lam) for part in self.parts])
        ways = zip(self.parts, places[::3], places[1::3], places[2::3], lams, strict=True)
        return [PlacedRows(part.expert, own, partners, other, lam) for part, own, partners, other, lam in ways], routed


def draw_rows(
    labels: Labels,
    group: NDArray[np.int64],
    alpha: NDArray[np.float64],
    share: slice,
    others: bool,
    rng: np.random.Generator,
) -> Draw:
    """Draw what each expert learns from a batch of rows with these labels, and which of it this process computes.

    Args:
        labels: ``[B]`` of the batch.
        group: ``[C]`` of each class.
        alpha: ``[C]`` how strongly rows of each class are mixed.
        share: of the rows of each expert, those of this process.
        others: whether as many rows of other groups teach an expert what is not its own.
        rng: the same in every process.
    """
    own_group = group[labels]
    parts = []
    for expert in range(int(group.max()) + 1):
        inside, outside = np.flatnonzero(own_group == expert), np.flatnonzero(own_group != expert)
        if len(inside) == 0:
            continue
        outside = rng.permutation(outside)[: len(inside) if others else 0]
        mixing = draw_mixing(alpha[labels[inside]], rng)
        own = np.arange(len(inside) + len(outside))[share]
        mine, other = own[own < len(inside)], own[own >= len(inside)] - len(inside)
        drawn = Mixing(mixing.lam[mine], mixing.partner[mine])
        parts.append(ExpertRows(expert, inside, mixing, inside[mine], inside[drawn.partner], drawn.lam, outside[other]))
    needed = np.unique(np.concatenate([own for part in parts for own in (part.own, part.partners, part.other)]))
    return Draw(parts, needed, dict(rng.bit_generator.state))
