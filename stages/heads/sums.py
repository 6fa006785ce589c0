"""Sums over more rows than memory holds: the scale of features, their covariance, and a linear head's loss.

Blocks have a fixed size and are computed with one BLAS thread each. They are summed in their order within groups of a
fixed size, and so are the groups: a result does not depend on the number of cores, which work on several blocks side by
side, nor on who computes a group (`stages.heads.handed`).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from stages.heads.affine import Standardisation
from stages.id_data.lazy import Rows2D

BLOCK = 1024  # rows; a result's last digits depend on it
GROUP = 16  # blocks; likewise
KEPT_BYTES = 1 << 28  # of blocks that stay in memory as they are computed with; those beyond are read in every step

AnyFloats = NDArray[np.floating[Any]]
FloatType = type[np.floating[Any]]
Sums = list[NDArray[np.float64]]
_Part = TypeVar("_Part")


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


class BlockSum(Protocol):
    """What is summed over all rows; picklable, for another process may sum a group of blocks."""

    def zeros(self) -> Sums:
        """What no rows give."""
        ...

    def __call__(self, rows: AnyFloats, labels: NDArray[np.integer], /) -> Sequence[Any]:
        """What the rows of a block give, standardised ``[n, D]``, with labels ``[n]``; arrays of the zeros' shapes."""
        ...


class SummedRows(Protocol):
    """Rows that are summed over, standardised in one precision.

    Attributes:
        shape: N and D, or r where they are turned.
        dtype: what they are computed in.
    """

    shape: tuple[int, int]
    dtype: FloatType

    @property
    def whole(self) -> bool:
        """Whether all are in memory, in which case they can be turned."""
        ...

    def turn(self, basis: NDArray[np.float64], /) -> None:
        """From now on they are coordinates along directions ``[D, r]``."""
        ...

    def all(self) -> NDArray[np.float64]:
        """All of them, which are few."""
        ...

    def sums(self, of: BlockSum, /) -> Sums:
        """Over all rows, in float64."""
        ...


class SummedElsewhere(Protocol):
    """Who sums groups of blocks in this process's place, to the same bits."""

    def groups(self, of: BlockSum, dtype: FloatType) -> Iterator[Sums]:
        """The sums of every group, in their order, of rows standardised in a precision."""
        ...


def added(parts: Iterable[Sequence[Any]], zeros: Sums) -> Sums:
    """Their sum, in their order; in place of the zeros."""
    for part in parts:
        for total, own in zip(zeros, part, strict=True):
            total += own
    return zeros


class GivenRows(NamedTuple):
    """Features ``[N, D]`` as they are, labels ``[N]`` in 0 to K − 1, and how features are standardised."""

    features: Rows2D
    labels: NDArray[np.integer]
    standardise: Standardisation

    def block(self, at: slice, dtype: FloatType) -> AnyFloats:
        """Some rows, read and standardised."""
        return self.standardise(np.asarray(self.features[at]), dtype)

    def group(self, number: int, of: BlockSum, dtype: FloatType) -> Sums:
        """The sums over the blocks of a group, by this process and one BLAS thread."""
        own = islice(blocks(len(self.labels)), number * GROUP, (number + 1) * GROUP)
        with one_blas_thread():
            return added((of(self.block(at, dtype), self.labels[at]) for at in own), of.zeros())


def n_groups(n_rows: int) -> int:
    """Groups of blocks that so many rows are."""
    return -(-n_rows // (BLOCK * GROUP))


class StandardisedRows:
    """`SummedRows` by blocks: in memory as far as that is allowed, else read."""

    def __init__(
        self,
        given: GivenRows,
        pool: ThreadPoolExecutor | None,
        ahead: int,
        dtype: FloatType,
        elsewhere: SummedElsewhere | None = None,
    ) -> None:
        self.shape, self.dtype = given.features.shape, dtype
        self._given, self._pool, self._ahead, self._elsewhere = given, pool, ahead, elsewhere
        kept_rows = KEPT_BYTES // (np.dtype(dtype).itemsize * max(self.shape[1], 1))
        if elsewhere is not None and kept_rows < self.shape[0]:
            kept_rows = 0  # they are read there
        self._kept = [given.block(at, dtype) for at in blocks(self.shape[0]) if at.stop <= kept_rows]

    @property
    def whole(self) -> bool:
        """Whether all are in memory."""
        return sum(map(len, self._kept)) == self.shape[0]

    def turn(self, basis: NDArray[np.float64]) -> None:
        """Rows that are all in memory, and stay there as coordinates along directions ``[D, r]``."""
        typed = basis.astype(self.dtype)
        self._kept = list(self.parts(lambda block, _: block @ typed))
        self.shape = self.shape[0], basis.shape[1]

    def all(self) -> NDArray[np.float64]:
        """As `SummedRows`."""
        return np.concatenate([*self.parts(lambda block, _: np.float64(block))])

    def sums(self, of: BlockSum) -> Sums:
        """Over all rows. What is not whole in memory is summed elsewhere, where there is somebody."""
        if self._elsewhere is not None and not self.whole:
            return added(self._elsewhere.groups(of, self.dtype), of.zeros())
        parts = self.parts(of)
        return added((added(islice(parts, GROUP), of.zeros()) for _ in range(n_groups(self.shape[0]))), of.zeros())

    def parts(self, compute: Callable[[AnyFloats, NDArray[np.integer]], _Part]) -> Iterator[_Part]:
        """Of every block, in their order; read here, computed in the pool, a few of them ahead."""
        waiting: deque[Future[_Part]] = deque()
        for number, block in enumerate(blocks(self.shape[0])):
            work = partial(_computed, compute, self._rows(number, block), self._given.labels[block])
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
        return partial(self._given.standardise.__call__, np.asarray(self._given.features[block]), self.dtype)


def _computed(
    compute: Callable[[AnyFloats, NDArray[np.integer]], _Part],
    rows: Callable[[], AnyFloats],
    labels: NDArray[np.integer],
) -> _Part:
    return compute(rows(), labels)


class Directions(NamedTuple):
    """In which features vary: orthonormal directions ``[D, r]`` and the variance along each, ``[r]``, float64."""

    basis: NDArray[np.float64]
    variance: NDArray[np.float64]


def directions(rows: SummedRows) -> Directions:
    """Eigenvectors of the covariance of centred rows ``[N, D]``, those that N rows can span."""
    n_rows, dim = rows.shape
    if n_rows < dim:
        whole = rows.all()
        variance, within = np.linalg.eigh(whole @ whole.T / n_rows)
        spanned = variance > 1e-10 * max(variance[-1], 1e-300)
        variance, within = variance[spanned], within[:, spanned]
        return Directions(whole.T @ within / np.sqrt(n_rows * variance), variance)
    (covariance,) = rows.sums(ProductSum(dim))
    variance, basis = np.linalg.eigh(covariance / n_rows)
    return Directions(basis, np.maximum(variance, 0))


@dataclass(frozen=True)
class ProductSum:
    """xᵀx of rows of D values, ``[D, D]``."""

    dim: int

    def zeros(self) -> Sums:
        """As `BlockSum`."""
        return [np.zeros((self.dim, self.dim))]

    def __call__(self, rows: AnyFloats, _labels: NDArray[np.integer]) -> Sequence[Any]:
        """As `BlockSum`."""
        return [rows.T @ rows]


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


def head_loss(rows: SummedRows, weight: NDArray[np.float64], bias: NDArray[np.float64]) -> HeadLoss:
    """Of a linear head on all rows, whose products are in the rows' precision and whose sums are in float64.

    Args:
        rows: ``[N, D]``.
        weight: ``[outputs, D]``; one output is the difference of two classes' logits.
        bias: ``[outputs]``.
    """
    n_rows, _ = rows.shape
    found, of_weight, of_bias = rows.sums(HeadLossSum(weight.T.astype(rows.dtype), bias.astype(rows.dtype)))
    loss, curvature = (found / n_rows).tolist()
    return HeadLoss(loss, of_weight / n_rows, of_bias / n_rows, curvature)


@dataclass(frozen=True)
class HeadLossSum:
    """Loss and curvature ``[2]``, and the gradient by weight and by bias.

    Attributes:
        weight: ``[D, outputs]``.
        bias: ``[outputs]``.
    """

    weight: AnyFloats
    bias: AnyFloats

    def zeros(self) -> Sums:
        """As `BlockSum`."""
        return [np.zeros(2), np.zeros(self.weight.shape[::-1]), np.zeros(len(self.bias))]

    def __call__(self, rows: AnyFloats, labels: NDArray[np.integer]) -> Sequence[Any]:
        """As `BlockSum`."""
        logits = rows @ self.weight
        logits += self.bias
        if len(self.bias) == 1:  # the difference of two logits, one on either side of 0
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
        by_logit = probability[:, -len(self.bias) :]
        return (loss, curvature), by_logit.T @ rows, by_logit.sum(axis=0, dtype=np.float64)
