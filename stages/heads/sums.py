"""Sums over more rows than memory holds: the scale of features, their covariance, and a linear head's loss.

Blocks have a fixed size, are computed with one BLAS thread each and summed in their order, so that a result does not
depend on the number of cores, which work on several blocks side by side.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from stages.heads.affine import Standardisation
from stages.id_data.lazy import Rows2D

BLOCK = 1024  # rows; a result's last digits depend on it
_KEPT_BYTES = 1 << 28  # of blocks that stay in memory as they are computed with; those beyond are read in every step

AnyFloats = NDArray[np.floating[Any]]
FloatType = type[np.floating[Any]]
_Sum = TypeVar("_Sum")


def one_blas_thread() -> AbstractContextManager[object]:
    """Products whose last digits do not depend on the number of cores."""
    limit: AbstractContextManager[object] = _blas().limit(limits=1, user_api="blas")
    return limit


@cache
def _blas() -> ThreadpoolController:
    """Of the libraries that numpy and scipy have loaded; finding them takes longer than a small fit's step."""
    return ThreadpoolController()


def blocks(n_rows: int) -> Iterator[slice]:
    """Slices of at most `BLOCK` rows, in order."""
    return (slice(start, min(start + BLOCK, n_rows)) for start in range(0, n_rows, BLOCK))


def standardisation(features: Rows2D) -> Standardisation:
    """Mean and common scale of features ``[N, D]``, N > 0: one pass in float64, in which nothing cancels.

    Blocks are merged as by Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979.
    """
    n_rows, dim = features.shape
    mean, squares, seen = np.zeros(dim), 0.0, 0
    for block in blocks(n_rows):
        rows = np.asarray(features[block], dtype=np.float64)
        own = rows.mean(axis=0)
        step, before, seen = own - mean, seen, block.stop
        squares += float(np.square(rows - own).sum() + np.square(step).sum() * before * len(rows) / seen)
        mean += step * (len(rows) / seen)
    scale = max(float(np.sqrt(squares / (n_rows * dim))), 1e-6)
    return Standardisation(mean.astype(np.float32), np.full(1, scale, dtype=np.float32))


class StandardisedRows:
    """Features ``[N, D]`` by blocks, standardised in one precision: in memory as far as that is allowed, else read.

    Attributes:
        shape: N and D, or r where they are turned.
        dtype: what they are computed in.
    """

    def __init__(
        self,
        features: Rows2D,
        standardise: Standardisation,
        pool: ThreadPoolExecutor | None,
        ahead: int,
        dtype: FloatType,
    ) -> None:
        self.shape, self.dtype = features.shape, dtype
        self._features, self._standardise, self._pool, self._ahead = features, standardise, pool, ahead
        kept_rows = _KEPT_BYTES // (np.dtype(dtype).itemsize * max(features.shape[1], 1))
        self._kept: list[AnyFloats] = [
            standardise(np.asarray(features[block]), dtype)
            for block in blocks(features.shape[0])
            if block.stop <= kept_rows
        ]

    @property
    def whole(self) -> bool:
        """Whether all are in memory."""
        return sum(map(len, self._kept)) == self.shape[0]

    def turn(self, basis: NDArray[np.float64]) -> None:
        """Rows that are all in memory, and stay there as coordinates along directions ``[D, r]``."""
        typed = basis.astype(self.dtype)
        self._kept = list(self.parts(lambda block, _: block @ typed))
        self.shape = self.shape[0], basis.shape[1]

    def parts(self, compute: Callable[[AnyFloats, slice], _Sum]) -> Iterator[_Sum]:
        """Of every block, in their order; read here, computed in the pool, a few of them ahead."""
        waiting: deque[Future[_Sum]] = deque()
        for number, block in enumerate(blocks(self.shape[0])):
            work = partial(_computed, compute, self._rows(number, block), block)
            if self._pool is None:
                yield work()
                continue
            if len(waiting) > self._ahead:
                yield waiting.popleft().result()
            waiting.append(self._pool.submit(work))
        while waiting:
            yield waiting.popleft().result()

    def _rows(self, number: int, block: slice) -> Callable[[], AnyFloats]:
        """How to have a block: what is not kept is read now, and standardised where it is computed with."""
        if number < len(self._kept):
            return partial(self._kept.__getitem__, number)
        return partial(self._standardise.__call__, np.asarray(self._features[block]), self.dtype)


def _computed(compute: Callable[[AnyFloats, slice], _Sum], rows: Callable[[], AnyFloats], block: slice) -> _Sum:
    return compute(rows(), block)


class Directions(NamedTuple):
    """In which features vary: orthonormal directions ``[D, r]`` and the variance along each, ``[r]``, float64."""

    basis: NDArray[np.float64]
    variance: NDArray[np.float64]


def directions(rows: StandardisedRows) -> Directions:
    """Eigenvectors of the covariance of centred rows ``[N, D]``, those that N rows can span."""
    n_rows, dim = rows.shape
    if n_rows < dim:
        whole = np.concatenate([*rows.parts(lambda block, _: np.float64(block))])
        variance, within = np.linalg.eigh(whole @ whole.T / n_rows)
        spanned = variance > 1e-10 * max(variance[-1], 1e-300)
        variance, within = variance[spanned], within[:, spanned]
        return Directions(whole.T @ within / np.sqrt(n_rows * variance), variance)
    covariance = np.zeros((dim, dim))
    for part in rows.parts(lambda block, _: block.T @ block):
        covariance += part
    variance, basis = np.linalg.eigh(covariance / n_rows)
    return Directions(basis, np.maximum(variance, 0))


class HeadLoss(NamedTuple):
    """The mean of −log p(label), without penalty, and what a step from there is chosen by.

    Attributes:
        loss: mean over the rows.
        weight, bias: its gradient, ``[outputs, D]`` and ``[outputs]`` float64.
        curvature: mean over rows and classes of p · (1 − p), by which the loss curves along a logit.
    """

    loss: float
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    curvature: float


def head_loss(
    rows: StandardisedRows, labels: NDArray[np.integer], weight: NDArray[np.float64], bias: NDArray[np.float64]
) -> HeadLoss:
    """Of a linear head on all rows, whose products are in the rows' precision and whose sums are in float64.

    Args:
        rows: ``[N, D]``.
        labels: ``[N]``.
        weight: ``[outputs, D]``; one output is the difference of two classes' logits.
        bias: ``[outputs]``.
    """
    found, of_weight, of_bias = np.zeros(2), np.zeros_like(weight), np.zeros_like(bias)
    typed = weight.T.astype(rows.dtype), bias.astype(rows.dtype)
    for part in rows.parts(lambda block, at: _part(block, labels[at], *typed)):
        found += part.loss, part.curvature
        of_weight += part.weight
        of_bias += part.bias
    n_rows = len(labels)
    loss, curvature = (found / n_rows).tolist()
    return HeadLoss(loss, of_weight / n_rows, of_bias / n_rows, curvature)


def _part(rows: AnyFloats, labels: NDArray[np.integer], weight: Any, bias: Any) -> HeadLoss:
    """A block's sums; weight ``[D, outputs]``."""
    logits = rows @ weight
    logits += bias
    if len(bias) == 1:  # the difference of two logits, one on either side of 0
        logits = logits * np.array([-0.5, 0.5], dtype=logits.dtype)
    own = np.arange(len(labels)), labels
    logits -= logits.max(axis=1, keepdims=True)
    loss = -float(logits[own].sum(dtype=np.float64))
    probability = np.exp(logits, out=logits)
    total = probability.sum(axis=1, keepdims=True)
    loss += float(np.log(total).sum(dtype=np.float64))
    probability /= total
    curvature = (len(labels) - float(np.vdot(probability, probability))) / probability.shape[1]
    probability[own] -= 1
    by_logit = probability[:, -len(bias) :]
    return HeadLoss(loss, by_logit.T @ rows, by_logit.sum(axis=0, dtype=np.float64), curvature)
