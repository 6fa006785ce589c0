"""What is asked of `make study`; alone, so that the command line answers before the rest is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """What of a study file is run, and how it is changed.

    Attributes:
        overrides: ``a.b=value`` for every run.
        only: names of the runs; None for all.
        available: run what has its images and weights, and leave out the others.
    """

    overrides: Sequence[str] = ()
    only: Sequence[str] | None = None
    available: bool = False
