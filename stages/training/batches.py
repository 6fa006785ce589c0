"""Batches of images: which are learnt from together, who is mixed with whom, and who computes what."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.id_data.split import Rows


class Batch(NamedTuple):
    """One step of the optimiser: which images, and who is mixed with whom."""

    number: int  # in its epoch
    rows: Rows  # [B] places in the training set
    partner: NDArray[np.int64]  # [B] place in the batch; a row without a partner is its own


class Share(NamedTuple):
    """What one pass of one process computes of a batch.

    Attributes:
        place: ``[b]`` of each row in the batch.
        paired: how many of them, at the start, are pairs: the i-th and the i-th from their end, as timm's Mixup has it.
    """

    place: NDArray[np.int64]
    paired: int


def plan_epoch(n: int, batch_size: int, seed: int, epoch: int, groups: NDArray[np.int64] | None = None) -> list[Batch]:
    """Batches of an epoch over n images, as equal as can be, so that no small one weighs as much as a whole one.

    The first of a batch is mixed with its last, the second with the one before, and so on, as in timm.

    Args:
        n: images.
        batch_size: the most that a batch may have.
        seed: fixes the order,
        epoch: another one in each.
        groups: ``[n]``: images are mixed with images of their own group alone.
    """
    order = np.random.default_rng((seed, epoch)).permutation(n)
    batches = []
    for number, rows in enumerate(np.array_split(order, -(-n // batch_size))):
        partner = np.arange(len(rows))
        own = np.zeros(len(rows), dtype=np.int64) if groups is None else groups[rows]
        for group in np.unique(own):
            members = np.flatnonzero(own == group)
            partner[members] = members[::-1]
        batches.append(Batch(number, rows, partner))
    return batches


def share_of(batch: Batch, part: int, parts: int) -> Share:
    """One of several parts of a batch; pairs stay together, so that no image is needed in two places."""
    index = np.arange(len(batch.rows))
    first, single = index[index < batch.partner], index[index == batch.partner]
    mine = first[part::parts]
    # Rows without a partner go where fewest pairs went.
    alone = single[(part - len(first)) % parts :: parts]
    return Share(np.concatenate([mine, batch.partner[mine][::-1], alone]), 2 * len(mine))
