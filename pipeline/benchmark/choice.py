"""What is asked of `make results` and `make map`; alone, so that the command line answers before the rest is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """What of the benchmark is run, and how it is changed.

    Attributes:
        overrides: ``a.b=value`` for every study.
        benchmarks: names of those that are run; None for all.
        controls: names of the variants to run beside the default and the baselines'; None for all.
        finetune: run the end-to-end fine-tunes as well, and what follows from their features.
        unchecked: run on other images than the listed ones as well; the results say so.
    """

    overrides: Sequence[str] = ()
    benchmarks: Sequence[str] | None = None
    controls: Sequence[str] | None = None
    finetune: bool = False
    unchecked: bool = False


@dataclass(frozen=True)
class MapChoice:
    """Which cells of the map are run.

    Attributes:
        classes: numbers of ID classes.
        images: numbers of training images a class.
        overrides: ``a.b=value`` for every cell's study.
        unchecked: as of `Choice`.
    """

    classes: Sequence[int] = (20, 40, 80, 157)
    images: Sequence[int] = (25, 50, 100)
    overrides: Sequence[str] = ()
    unchecked: bool = False
