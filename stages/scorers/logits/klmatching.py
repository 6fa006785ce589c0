"""Divergence from the typical softmax of a class."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.errors import InputError
from stages.id_data.lazy import Floats
from stages.id_data.split import rows_by_class
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.fitting import RowsName, fitted_on_train, fitting_rows
from stages.scorers.shared.softmax import Softmax

Unpredicted = Literal["left out", "one-hot"]


def class_templates(blocks: Iterable[ArrayLike], unpredicted: Unpredicted = "left out") -> NDArray[np.float64]:
    """Log of the mean softmax of the rows that are predicted as each class, [K, C].

    Args:
        blocks: logits [n, C], all rows in any number of blocks.
        unpredicted: what stands for a class that no row was predicted as.

    Raises:
        InputError: no rows, and as `scaled_logits`.

    >>> np.exp(class_templates([[[0.0, -np.inf], [5.0, 5.0]]])).tolist()
    [[0.75, 0.25]]
    """
    sums: NDArray[np.float64] = np.zeros((0, 0))
    doubts: NDArray[np.float64] = np.zeros(0)  # sums of 1 − p of the predicted class
    counts: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    for logits in blocks:
        softmax = Softmax.of(logits)
        p, doubt, predicted = softmax.p, np.exp(softmax.log_doubt), softmax.largest
        if not sums.size:
            n_classes = p.shape[1]
            sums, doubts = np.zeros((n_classes, n_classes)), np.zeros(n_classes)
            counts = np.zeros(n_classes, dtype=np.int64)
        for c, own in rows_by_class(predicted):
            sums[c] += p[own].sum(axis=0)
            doubts[c] += doubt[own].sum()
            counts[c] += len(own)
    seen = np.flatnonzero(counts)
    if not seen.size:
        raise InputError("KL matching needs ID rows to take typical softmaxes from, none given")
    # A probability too small for float64 is the smallest that it has: log 0 would make every divergence infinite.
    smallest = np.finfo(np.float64).tiny
    templates = np.log(np.maximum(sums[seen] / counts[seen, None], smallest))
    templates[np.arange(len(seen)), seen] = np.log1p(-doubts[seen] / counts[seen])  # may be nearer to 1 than 1 − 1e-16
    if unpredicted == "one-hot":
        templates = np.concatenate([templates, np.log(np.maximum(np.eye(len(counts))[counts == 0], smallest))])
    return templates


def kl_matching_score(logits: ArrayLike, log_templates: NDArray[np.float64]) -> Floats:
    """min_c KL(p ‖ d_c), p = softmax(l), d_c the mean softmax of class c; higher = more OOD.

    Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022. Of rows much surer of
    a class than its typical ones it sees no difference: towards p_c = 1 the divergence is −log d_cc, and many may tie.

    Args:
        logits: [n, C].
        log_templates: [K, C] of `class_templates`.

    Returns:
        [n] float32, at least 0 up to rounding.

    Raises:
        InputError: as `scaled_logits`.

    >>> kl_matching_score([[5.0, 5.0]], class_templates([[[5.0, 5.0]]])).round(6).tolist()
    [0.0]
    """
    softmax = Softmax.of(logits)
    p, surprise = softmax.p, softmax.surprise
    negative_entropy = -np.multiply(p, surprise, out=np.zeros_like(p), where=p > 0).sum(axis=1)
    cross = p @ log_templates.T
    return np.asarray(np.maximum(negative_entropy - cross.max(axis=1), 0), dtype=np.float32)


class _Memory(NamedTuple):
    log_templates: NDArray[np.float64]
    record: dict[str, Any]


@dataclass(eq=False)
class KLMatchingScorer(Scorer):
    """`kl_matching_score` with the typical softmaxes of ID rows.

    Attributes:
        rows: which ID rows they are taken from: ``"select"``, held out (the paper, OpenOOD), or ``"train"``.
        unpredicted: a class that no row is predicted as is ``"left out"`` (pytorch-ood) or has a ``"one-hot"``
            template (the paper's code, OpenOOD), which only a row saturated on that class is near.
    """

    name: ClassVar[str] = "kl-matching"
    title: ClassVar[str] = "KL matching"
    says: ClassVar[str] = "KL divergence to the nearest class's mean softmax"
    paper: ClassVar[str] = "Hendrycks 2022"
    cost: ClassVar[str] = "C²"
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "bank", "select"})
    profiles: ClassVar = {"pytorch-ood": {"rows": "train", "unpredicted": "left out"}}

    rows: RowsName = "select"
    unpredicted: Unpredicted = "one-hot"

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> _Memory:
        """Typical softmaxes of ID rows."""
        rows, record = fitting_rows(self.rows, train, select, self.name)
        logits = (block.need("logits", self.name) for block in rows.blocks())
        return _Memory(class_templates(logits, self.unpredicted), record)

    def judge(self, x: ScoreInputs, memory: _Memory) -> Floats:
        """Divergence a row, [n]."""
        return kl_matching_score(x.need("logits", self.name), memory.log_templates)

    def facts(self, memory: _Memory) -> dict[str, Any]:
        """Of which rows, and how many templates came of them."""
        return memory.record | {"templates": len(memory.log_templates)}

    def remark(self, memory: _Memory) -> str:
        """Whether it is fitted on other rows than asked for."""
        return fitted_on_train(self.rows, memory.record)
