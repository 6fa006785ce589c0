"""Where a linear head's sums are computed, by what a context offers."""

from pathlib import Path

from stages.context import Context
from stages.heads.handed import Others
from stages.heads.summing import HERE, Summing


def summing_of(context: Context, folder: Path) -> Summing:
    """On a GPU where one is at hand, which is much faster than all else; else by a cluster, if any, and here.

    Args:
        context: of the work that the head is part of.
        folder: that the cluster's workers see.
    """
    if context.place.startswith("cuda"):
        from stages.heads.on_device import OnDevice  # which loads torch

        return OnDevice(context.place)
    return HERE if context.cluster is None else Others(context.cluster, folder)
