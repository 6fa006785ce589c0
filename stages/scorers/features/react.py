"""Energy of rectified features."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from stages.heads.affine import LinearHead
from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.logits.energy import energy_score
from stages.scorers.scorer import Scorer
from stages.scorers.shared.fitting import RowsName, fitted_on_train, fitting_rows
from stages.scorers.shared.quantiles import quantiles
from stages.scorers.shared.shaping import activations


def react_score(features: ArrayLike, head: LinearHead, threshold: float) -> Floats:
    """Energy of the head on min(z, c); higher = more OOD.

    Sun et al., "ReAct: Out-of-distribution Detection With Rectified Activations", NeurIPS 2021. Made for activations
    that are not negative; weak on a ViT's features, of which it cuts one side.

    Args:
        features: [n, D].
        head: weights and bias on them.
        threshold: c.

    Returns:
        [n] float32.

    Raises:
        InputError: NaN or inf, or another D than the head's.

    >>> head = LinearHead(np.eye(2), np.zeros(2))
    >>> react_score([[9.0, 0.0]], head, 1.0).tolist() == energy_score([[1.0, 0.0]]).tolist()
    True
    """
    return energy_score(head.logits(np.minimum(activations(features, "ReAct's"), np.float32(threshold))))


class _Memory(NamedTuple):
    head: LinearHead
    threshold: float
    record: dict[str, Any]


@dataclass(eq=False)
class ReActScorer(Scorer):
    """`react_score` with c a percentile of ID activations.

    Attributes:
        percentile: of all activations of the rows together.
        rows: ``"train"`` (the paper, pytorch-ood) or ``"select"``, held-out rows (OpenOOD).
    """

    name: ClassVar[str] = "react"
    title: ClassVar[str] = "ReAct"
    says: ClassVar[str] = "energy of clipped features"
    paper: ClassVar[str] = "Sun 2021"
    cost: ClassVar[str] = "C·D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "head", "bank", "select"})
    profiles: ClassVar = {"openood": {"rows": "select"}}

    percentile: Annotated[float, Field(gt=0, le=100)] = 90.0
    rows: RowsName = "train"

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> _Memory:
        """C and the head."""
        rows, record = fitting_rows(self.rows, train, select, self.name)
        found = quantiles(
            lambda: (block.need("features", self.name) for block in rows.blocks()), [self.percentile / 100]
        )
        return _Memory(train.need_head(self.name), found[0], record)

    def judge(self, x: ScoreInputs, memory: _Memory) -> Floats:
        """Energy of the rectified row, [n]."""
        return react_score(x.need("features", self.name), memory.head, memory.threshold)

    def facts(self, memory: _Memory) -> dict[str, Any]:
        """c, and of which rows."""
        return {"threshold": memory.threshold} | memory.record

    def remark(self, memory: _Memory) -> str:
        """Whether it is fitted on other rows than asked for."""
        return fitted_on_train(self.rows, memory.record)
