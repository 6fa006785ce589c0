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
    """All that experts learn, on the device where they do, in the order of the experts; rows of those that were read.

    Attributes:
        counts: ``[E]`` rows of each expert, n in all.
        own, partners: ``[n]`` rows and what they are mixed with; those of other groups with themselves.
        lam: ``[n]`` their λ; 1 for those of other groups.
        expert: ``[n]`` whose they are.
        is_other: ``[n]`` which are of other groups.
        routed: rows that the router learns from.
    """

    counts: list[int]
    own: Tensor
    partners: Tensor
    lam: Tensor
    expert: Tensor
    is_other: Tensor
    routed: Tensor


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
        """What is sent of it: where its rows stand among `needed`, whose they are, their λ, and the labels of `needed`.

        Args:
            labels: ``[B]`` of the batch.
        """
        parts = self.parts
        own = np.concatenate([rows for part in parts for rows in (part.own, part.other)])
        partners = np.concatenate([rows for part in parts for rows in (part.partners, part.other)])
        routed = np.sort(np.concatenate([part.own for part in parts]))
        expert = np.repeat([part.expert for part in parts], [len(part.own) + len(part.other) for part in parts])
        lam = [lam for part in parts for lam in (part.lam, np.ones(len(part.other), np.float32))]
        is_other = [np.repeat([False, True], [len(part.own), len(part.other)]) for part in parts]
        places = np.searchsorted(self.needed, np.concatenate([own, partners, routed]))
        return {
            "places": torch.from_numpy(np.concatenate([places, expert])),
            "lam": torch.from_numpy(np.concatenate(lam)),
            "is_other": torch.from_numpy(np.concatenate(is_other)),
            "truth": torch.from_numpy(labels[self.needed]).long(),
        }

    def placed(self, columns: dict[str, Tensor], n_experts: int) -> PlacedRows:
        """What `columns` says, once they are on the device."""
        counts = [0] * n_experts
        for part in self.parts:
            counts[part.expert] = len(part.own) + len(part.other)
        n, n_routed = sum(counts), sum(len(part.own) for part in self.parts)
        own, partners, routed, expert = columns["places"].split([n, n, n_routed, n])
        return PlacedRows(counts, own, partners, columns["lam"], expert, columns["is_other"], routed)


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
