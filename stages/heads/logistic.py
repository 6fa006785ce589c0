"""Multinomial logistic regression of more rows than memory holds.

The objective, the solver and when it stops are those of scikit-learn's ``LogisticRegression`` (solver ``"lbfgs"``), to
which tests hold it; loss and gradient are summed over blocks of rows that are read anew in every step. Blocks have a
fixed size, are computed with one BLAS thread each and summed in their order, so that the result does not depend on the
number of cores, which work on several blocks side by side.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from threadpoolctl import ThreadpoolController

from stages.heads.affine import Standardisation
from stages.id_data.lazy import Rows2D
from stages.machine import usable_cores

MAX_STEPS = 1000  # of the solver, after which it stops anyway: a weak penalty on separable rows may ask for many
BLOCK = 1024  # rows; a result's last digits depend on it
_KEPT_BYTES = 1 << 28  # of blocks that stay in memory as they are computed with; those beyond are read in every step


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


class LogisticFit(NamedTuple):
    """Weight ``[K, D]`` and bias ``[K]`` float64, and whether the solver came to the minimum."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    converged: bool


def fit_logistic(
    features: Rows2D,
    labels: NDArray[np.integer],
    n_classes: int,
    strength: float,
    standardise: Standardisation,
    tolerance: float = 1e-4,
    max_iter: int | None = None,
) -> LogisticFit:
    """Minimise Σ −log p(label) + ‖weight‖² / (2 · strength); the intercept is not penalised.

    As in scikit-learn, two classes have one vector of coefficients, the difference of their logits, and it is the one
    that is penalised.

    Args:
        features: ``[N, D]``, standardised as they are read.
        labels: ``[N]`` in 0 to K − 1.
        n_classes: K, at least 2.
        strength: scikit-learn's ``C``, the inverse of the penalty.
        standardise: of these rows.
        tolerance: the largest component of the gradient of the objective, divided by N, at which it stops.
        max_iter: steps after which it stops anyway; `MAX_STEPS` by default.

    Returns:
        Weight and bias; each sums to 0 over two classes. Steps that were used up, and a line search that found no
        lower point while the gradient was above `tolerance`, have not come to the minimum.
    """
    with ExitStack() as stack:
        stack.enter_context(one_blas_thread())
        cores = min(usable_cores(), -(-len(labels) // BLOCK))
        pool = stack.enter_context(ThreadPoolExecutor(cores)) if cores > 1 else None
        objective = _Objective(features, labels, n_classes, strength, standardise, pool, cores)
        found = minimize(
            objective,
            np.zeros(objective.n_parameters),
            method="L-BFGS-B",
            jac=True,
            # ftol: as fine as the loss can be told from its rounding
            options={
                "maxiter": max_iter or MAX_STEPS,
                "maxls": 50,
                "gtol": tolerance,
                "ftol": 64 * np.finfo(np.float64).eps,
            },
        )
    weight, bias = objective.split(found.x)
    converged = bool(found.success) or float(np.abs(found.jac).max()) <= tolerance
    if n_classes == 2:
        return LogisticFit(np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2, converged)
    return LogisticFit(weight, bias, converged)


class _Objective:
    """Mean loss with penalty, and its gradient, at given parameters ``[outputs · (D + 1)]``: weight, then bias."""

    def __init__(
        self,
        features: Rows2D,
        labels: NDArray[np.integer],
        n_classes: int,
        strength: float,
        standardise: Standardisation,
        pool: ThreadPoolExecutor | None,
        ahead: int,
    ) -> None:
        self._features, self._labels, self._standardise = features, labels, standardise
        self._n_rows, self._dim = features.shape
        self._outputs = 1 if n_classes == 2 else n_classes
        self._penalty = 1 / (strength * self._n_rows)
        self._pool, self._ahead = pool, ahead
        kept_rows = _KEPT_BYTES // (8 * self._dim)
        self._kept = [
            standardise(np.asarray(features[block]), np.float64)
            for block in blocks(self._n_rows)
            if block.stop <= kept_rows
        ]

    @property
    def n_parameters(self) -> int:
        return self._outputs * (self._dim + 1)

    def split(self, parameters: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Views of weight ``[outputs, D]`` and bias ``[outputs]``."""
        weight, bias = np.split(parameters, [self._outputs * self._dim])
        return weight.reshape(self._outputs, self._dim), bias

    def __call__(self, parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight, bias = self.split(parameters)
        gradient = np.zeros_like(parameters)
        of_weight, of_bias = self.split(gradient)
        loss = 0.0
        for part in self._parts(weight, bias):
            loss += part.loss
            of_weight += part.weight
            of_bias += part.bias
        gradient /= self._n_rows
        of_weight += self._penalty * weight
        return loss / self._n_rows + 0.5 * self._penalty * float(np.vdot(weight, weight)), gradient

    def _parts(self, weight: NDArray[np.float64], bias: NDArray[np.float64]) -> Iterator["_Part"]:
        """Of every block, in their order; read here, computed in the pool, a few of them ahead."""
        waiting: deque[Future[_Part]] = deque()
        for number, block in enumerate(blocks(self._n_rows)):
            work = self._work(number, block, weight, bias)
            if self._pool is None:
                yield work()
                continue
            if len(waiting) > self._ahead:
                yield waiting.popleft().result()
            waiting.append(self._pool.submit(work))
        while waiting:
            yield waiting.popleft().result()

    def _work(
        self, number: int, block: slice, weight: NDArray[np.float64], bias: NDArray[np.float64]
    ) -> Callable[[], "_Part"]:
        labels = self._labels[block]
        if number < len(self._kept):
            return lambda: _part(self._kept[number], labels, weight, bias)
        stored = np.asarray(self._features[block])
        return lambda: _part(self._standardise(stored, np.float64), labels, weight, bias)


class _Part(NamedTuple):
    """A block's sums: of −log p(label), and of its gradients by weight and bias."""

    loss: float
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]


def _part(
    rows: NDArray[np.float64], labels: NDArray[np.integer], weight: NDArray[np.float64], bias: NDArray[np.float64]
) -> _Part:
    logits = rows @ weight.T
    logits += bias
    if len(bias) == 1:  # the difference of two logits, one on either side of 0
        logits = logits * np.array([-0.5, 0.5])
    own = np.arange(len(labels)), labels
    logits -= logits.max(axis=1, keepdims=True)
    loss = -float(logits[own].sum())
    probability = np.exp(logits, out=logits)
    total = probability.sum(axis=1, keepdims=True)
    loss += float(np.log(total).sum())
    probability /= total
    probability[own] -= 1
    by_logit = probability[:, -len(bias) :]
    return _Part(loss, by_logit.T @ rows, by_logit.sum(axis=0))
