"""MOS: minimum over the groups of the probability of "other"."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.errors import InputError
from stages.scorers.base import Floats, ScoreInputs, Scorer


def mos_score(others: ArrayLike) -> NDArray[np.float32]:
    """Smallest p_k("other") over the groups k; higher = more OOD.

    Huang and Li, "MOS: Towards Scaling Out-of-distribution Detection for Large Semantic Space", CVPR 2021, whose S_MOS
    is the negative of this. It wants every group's probability of the same features; the route does not matter.

    Args:
        others: [n, E], each group's softmax probability of its "other".

    Returns:
        [n] float32 in [0, 1].

    Raises:
        InputError: not one column a group, or values that are no probabilities.

    >>> mos_score([[0.9, 0.125], [0.75, 0.5]]).tolist()
    [0.125, 0.5]
    """
    array = np.asarray(others)
    if array.ndim != 2 or array.shape[1] == 0:
        raise InputError(
            f'probabilities of "other" have shape {array.shape}; a row a sample, a column a group expected'
        )
    bad = np.flatnonzero(~((array >= 0) & (array <= 1)).all(axis=1))  # NaN is neither
    if bad.size:
        raise InputError(f'{bad.size} of {len(array)} rows hold no probabilities of "other", row {bad[0]} first')
    return np.asarray(array.min(axis=1), dtype=np.float32)


@dataclass(eq=False)
class MOSScorer(Scorer):
    """`mos_score`; nothing to set and nothing to fit."""

    name: ClassVar[str] = "mos"
    needs: ClassVar[frozenset[str]] = frozenset({"others"})

    def judge(self, x: ScoreInputs, memory: None) -> Floats:
        """Smallest probability of "other" a row, [n]."""
        return mos_score(x.need("others", self.name))
