"""Energy of features rectified from both sides."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stages.errors import InputError
from stages.heads.affine import LinearHead
from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.logits.energy import energy_score
from stages.scorers.scorer import Scorer
from stages.scorers.shared.fitting import RowsName, fitted_on_train, fitting_rows
from stages.scorers.shared.quantiles import column_quantiles, quantiles
from stages.scorers.shared.shaping import activations

Below = Literal["zero", "clip"]


def vra_score(features: ArrayLike, head: LinearHead, low: ArrayLike, high: ArrayLike, below: Below = "zero") -> Floats:
    """Energy of the head on z rectified into [α, β]; higher = more OOD.

    Xu et al., "VRA: Variational Rectified Activation for Out-of-distribution Detection", NeurIPS 2023: what is above β
    becomes β, what is below α becomes 0. OpenOOD and pytorch-ood clip it to α instead. Made for activations that are
    not negative; weak on a ViT's features.

    Args:
        features: [n, D].
        head: weights and bias on them.
        low: α, a number or one for each feature [D].
        high: β, likewise.
        below: what becomes of activations below α.

    Returns:
        [n] float32.

    Raises:
        InputError: NaN or inf, or another D than the head's.

    >>> head = LinearHead(np.eye(3), np.zeros(3))
    >>> vra_score([[0.5, 2.0, 9.0]], head, 1.0, 3.0).tolist() == energy_score([[0.0, 2.0, 3.0]]).tolist()
    True
    """
    z, bottom = activations(features, "VRA's"), np.asarray(low, dtype=np.float32)
    raised = np.where(z < bottom, 0 if below == "zero" else bottom, z)
    return energy_score(head.logits(np.minimum(raised, np.asarray(high, dtype=np.float32))))


class _Memory(NamedTuple):
    head: LinearHead
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    record: dict[str, Any]


@dataclass(eq=False)
class VRAScorer(Scorer):
    """`vra_score` with α and β percentiles of ID activations.

    Attributes:
        low: percentile for α; the paper's, on CIFAR.
        high: percentile for β.
        each: whether every feature has its own α and β (the paper's code, pytorch-ood) or all have one (OpenOOD).
        below: as in `vra_score`.
        rows: ``"train"`` (the paper, pytorch-ood) or ``"select"``, held-out rows (OpenOOD).
    """

    name: ClassVar[str] = "vra"
    title: ClassVar[str] = "VRA"
    says: ClassVar[str] = "energy of features clipped on both sides"
    paper: ClassVar[str] = "Xu 2023"
    cost: ClassVar[str] = "C·D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "head", "bank", "select"})
    profiles: ClassVar = {
        "openood": {"low": 10.0, "high": 90.0, "each": False, "below": "clip", "rows": "select"},
        "pytorch-ood": {"low": 1.0, "high": 99.0, "below": "clip"},
    }

    low: Annotated[float, Field(ge=0, le=100)] = 60.0
    high: Annotated[float, Field(ge=0, le=100)] = 95.0
    each: bool = True
    below: Below = "zero"
    rows: RowsName = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise InputError(f"vra.low: {self.low:g} given, must be at most high = {self.high:g}")

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> _Memory:
        """α, β and the head."""
        rows, record = fitting_rows(self.rows, train, select, self.name)
        shares = [self.low / 100, self.high / 100]
        if self.each:
            low, high = column_quantiles(rows.need_unread(self.name), shares)
        else:
            found = quantiles(lambda: (block.need("features", self.name) for block in rows.blocks()), shares)
            low, high = np.asarray(found, dtype=np.float32)[:, None]
        return _Memory(train.need_head(self.name), low, high, record)

    def judge(self, x: ScoreInputs, memory: _Memory) -> Floats:
        """Energy of the rectified row, [n]."""
        return vra_score(x.need("features", self.name), memory.head, memory.low, memory.high, self.below)

    def facts(self, memory: _Memory) -> dict[str, Any]:
        """Of which rows; α and β where all features have one."""
        one = {} if self.each else {"alpha": float(memory.low[0]), "beta": float(memory.high[0])}
        return one | memory.record

    def remark(self, memory: _Memory) -> str:
        """Whether it is fitted on other rows than asked for."""
        return fitted_on_train(self.rows, memory.record)
