"""MOS: the smallest odds of "other" over the groups."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.errors import InputError
from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer


def mos_score(others: ArrayLike) -> NDArray[np.float32]:
    """Smallest log odds of "other", log p_k / (1 − p_k), over the groups k; higher = more OOD.

    Huang and Li, "MOS: Towards Scaling Out-of-distribution Detection for Large Semantic Space", CVPR 2021, whose S_MOS
    is the negative of the smallest p_k: the same order, but p_k rounds to 1 where the odds are large. It wants every
    group's "other" of the same features; the route does not matter.

    Args:
        others: [n, E], each group's log odds of its "other".

    Returns:
        [n] float32.

    Raises:
        InputError: not one column a group, NaN or inf.

    >>> mos_score([[2.0, -1.5], [1.0, 0.5]]).tolist()
    [-1.5, 0.5]
    """
    array = np.asarray(others)
    if array.ndim != 2 or array.shape[1] == 0:
        raise InputError(f'log odds of "other" have shape {array.shape}; a row a sample, a column a group expected')
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        raise InputError(f'{bad.size} of {len(array)} rows of log odds of "other" hold NaN or inf, row {bad[0]} first')
    return np.asarray(array.min(axis=1), dtype=np.float32)


@dataclass(eq=False)
class MOSScorer(Scorer):
    """`mos_score`; nothing to set and nothing to fit."""

    name: ClassVar[str] = "mos"
    title: ClassVar[str] = "MOS"
    says: ClassVar[str] = 'smallest log odds of "other" over the groups'
    paper: ClassVar[str] = "Huang 2021"
    cost: ClassVar[str] = "E"
    needs: ClassVar[frozenset[str]] = frozenset({"others"})

    def judge(self, x: ScoreInputs, memory: None) -> Floats:
        """Smallest log odds of "other" a row, [n]."""
        return mos_score(x.need("others", self.name))
