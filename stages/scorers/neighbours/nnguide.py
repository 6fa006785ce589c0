"""NNGuide: energy guided by the similarity to ID training features."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.special import logsumexp

from stages.errors import InputError
from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.arrays import l2_normalise, scaled_logits
from stages.scorers.shared.moments import checked_dim
from stages.scorers.shared.pairs import bank_blocks, keep_largest, query_blocks, seeded_share


def nnguide_score(features: ArrayLike, logits: ArrayLike, bank: ScoreInputs, k: int) -> Floats:
    """−logsumexp(l) · mean over the k largest of z̄·z̄ᵢ·logsumexp(lᵢ); higher = more OOD.

    Park, Jung and Teoh, "Nearest Neighbor Guidance for Out-of-Distribution Detection", ICCV 2023.

    Args:
        features: [n, D], any float type.
        logits: [n, C].
        bank: ID training rows with ``features`` and ``logits``, read by blocks.
        k: how many of the largest products are averaged, at most the bank's rows.

    Returns:
        [n] float32.

    Raises:
        InputError: ``k`` outside 1 … rows of the bank, another D, NaN or inf.

    >>> bank = ScoreInputs(features=np.eye(2), logits=np.array([[3.0], [5.0]]))
    >>> nnguide_score([[0.0, 2.0]], [[4.0]], bank, k=1), nnguide_score([[0.0, 2.0]], [[4.0]], bank, k=2)
    (array([-20.], dtype=float32), array([-10.], dtype=float32))
    """
    if not 1 <= k <= len(bank):
        raise InputError(f"nnguide.k: {k} given, must be 1 to {len(bank)}, the ID training rows")
    unit = l2_normalise(checked_dim(features, bank.need_unread("nnguide").shape[1]))
    found = np.full((len(unit), k), -np.inf, dtype=np.float32)
    for rows in bank_blocks(bank):
        guide = l2_normalise(rows.need("features", "nnguide")) * _energies(rows.need("logits", "nnguide"))[:, None]
        for block, (queries,) in query_blocks(unit):
            products = queries @ guide.T
            found[block] = keep_largest(found[block], products[: block.stop - block.start])
    return np.asarray(-found.mean(axis=1, dtype=np.float64) * _energies(logits), dtype=np.float32)


def _energies(logits: ArrayLike) -> NDArray[np.float32]:
    return np.asarray(logsumexp(scaled_logits(logits, 1.0), axis=1), dtype=np.float32)


@dataclass(eq=False)
class NNGuideScorer(Scorer):
    """`nnguide_score` with its k and the ID training rows.

    Attributes:
        k: how many of the largest products are averaged; where there are fewer rows, ``params()`` says ``k_used``.
        share: of the ID training rows, drawn at random once and for all. The paper takes 1 % of ImageNet's, to be
            fast; OpenOOD the first 1 % that its shuffled loader gives.
    """

    name: ClassVar[str] = "nnguide"
    title: ClassVar[str] = "NNGuide"
    says: ClassVar[str] = "energy times similarity to ID rows"
    paper: ClassVar[str] = "Park 2023"
    cost: ClassVar[str] = "N·D"
    costly: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"features", "logits", "bank"})
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({"openood": {"k": 100, "share": 0.01}})

    k: Annotated[int, Field(ge=1)] = 10
    share: Annotated[float, Field(gt=0, le=1)] = 1.0

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> ScoreInputs:
        """The rows themselves: they are read again for each block of rows to score."""
        own = train.only("features", "logits", "head")
        return own if self.share == 1 else own.take(seeded_share(len(own), self.share))

    def judge(self, x: ScoreInputs, memory: ScoreInputs) -> Floats:
        """Negative guided energy, [n]."""
        features, logits = x.need("features", self.name), x.need("logits", self.name)
        return nnguide_score(features, logits, memory, min(self.k, len(memory)))

    def facts(self, memory: ScoreInputs) -> dict[str, Any]:
        """``k_used``, where there are fewer than k rows."""
        return {"k_used": len(memory)} if len(memory) < self.k else {}

    def remark(self, memory: ScoreInputs) -> str:
        """Whether there are fewer than k rows."""
        return "fewer rows than k: all are averaged" if len(memory) < self.k else ""
