"""Multinomial logistic regression of more rows than memory holds, at one strength or along a path of them.

The objective is that of scikit-learn's ``LogisticRegression``, to whose minimum tests hold it. So is the solver,
L-BFGS, but what it is given differs:

- It moves in coordinates in which the loss is about as steep one way as another: W = V · (c · Σ + λI)^(−½), where Σ is
  the features' covariance, λ the penalty and c the mean of p · (1 − p) over rows and classes, by which the loss curves
  along a logit (the Hessian is c · Σ + λI where all rows and classes are alike).
- A path goes from the strongest penalty to the weakest. Each starts where the two before it point to, since the
  optimum moves about evenly with the logarithm of the strength.
- On the path products are in float32, as good as is needed to compare strengths. The one that is chosen goes to its
  minimum in float64.
- In these coordinates half the gradient's square is what the loss is above its minimum, about. It stops by that, and
  not by the largest component of the gradient, which says little where the penalty is weak.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.heads.summing import HERE, RowsIn, Summing
from stages.heads.sums import AnyFloats, GivenRows, HeadLoss, SummedRows, directions, head_loss

MAX_STEPS = 1000  # of the solver, after which it stops anyway: a weak penalty on separable rows may ask for many
HEAD_TOLERANCE = 1e-9  # in mean loss, above the minimum
ROUGH = 3e-5  # the same on a path: held-out likelihoods are known to a hundredth at best


class LogisticFit(NamedTuple):
    """A minimum, or what came near it.

    Attributes:
        weight: ``[K, D]`` float64.
        bias: ``[K]`` float64.
        converged: whether the loss is above its minimum by no more than was asked for, as far as can be told.
        curvature: mean over rows and classes of p · (1 − p) there.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    converged: bool
    curvature: float


@contextmanager
def logistic_problem(given: GivenRows, n_classes: int, summing: Summing = HERE) -> Iterator["LogisticProblem"]:
    """Minimise Σ −log p(label) + ‖weight‖² / (2 · strength); the intercept is not penalised.

    As in scikit-learn, two classes have one vector of coefficients, the difference of their logits, and it is the one
    that is penalised.

    Args:
        given: the rows, standardised as they are read.
        n_classes: K, at least 2.
        summing: who sums over the rows; this process by default.
    """
    with summing.rows(given, n_classes) as rows_in:
        yield LogisticProblem(n_classes, rows_in)


class LogisticProblem:
    """Rows, and the minima that belong to strengths of the penalty; made by `logistic_problem`."""

    def __init__(self, n_classes: int, rows_in: RowsIn) -> None:
        self._n_classes, self._rows_in = n_classes, rows_in
        self._rows = rows_in(np.float32)
        self._n_rows, self._dim = self._rows.shape
        self._directions = directions(self._rows)
        self._turn_rows()

    def _turn_rows(self) -> None:
        """Rows that are all in memory are turned once, and not weights and gradients in every step."""
        if self._rows.whole:
            self._rows.turn(self._directions.basis)

    def path(self, strengths: Sequence[float], tolerance: float = ROUGH) -> Iterator[LogisticFit]:
        """A fit for each strength, one when it is asked for.

        Args:
            strengths: ascending, which is from the strongest penalty to the weakest.
            tolerance: how far the mean loss may be above its minimum, as far as float32 can tell.
        """
        earlier: list[tuple[float, _Point]] = []
        for strength in strengths:
            start = _pointed_to(earlier, strength) if earlier else self._origin()
            found = self._descended(strength, start, tolerance, MAX_STEPS)
            earlier = [*earlier[-1:], (strength, found)]
            yield self._fit(found)

    def minimum(
        self,
        strength: float,
        start: LogisticFit | None = None,
        tolerance: float = HEAD_TOLERANCE,
        max_iter: int | None = None,
    ) -> LogisticFit:
        """The minimum, in float64 where float32 cannot tell it any more.

        Args:
            strength: scikit-learn's ``C``.
            start: what the path found for it; from zero, and in float32 first, where there is none.
            tolerance: how far the mean loss may be above it; with `ROUGH` or more float32 is enough.
            max_iter: steps after which it stops anyway; `MAX_STEPS` by default.
        """
        steps = max_iter or MAX_STEPS
        rough = max(tolerance, ROUGH)
        near = self._point(start) if start is not None else self._descended(strength, self._origin(), rough, steps)
        if tolerance >= ROUGH and near.converged:
            return self._fit(near)
        del self._rows  # before others take as much memory again
        self._rows = self._rows_in(np.float64)
        self._turn_rows()
        return self._fit(self._descended(strength, near, tolerance, steps))

    def _origin(self) -> "_Point":
        outputs = 1 if self._n_classes == 2 else self._n_classes
        even = 1 / self._n_classes
        return _Point(np.zeros((outputs, self._dim)), np.zeros(outputs), False, even * (1 - even))

    def _fit(self, point: "_Point") -> LogisticFit:
        weight, bias, converged, curvature = point
        if self._n_classes == 2:
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        return LogisticFit(weight, bias, converged, curvature)

    def _point(self, fit: LogisticFit) -> "_Point":
        weight, bias, converged, curvature = fit
        if self._n_classes == 2:
            weight, bias = 2 * weight[1:], 2 * bias[1:]
        return _Point(weight, bias, converged, curvature)

    def _descended(self, strength: float, start: "_Point", tolerance: float, max_steps: int) -> "_Point":
        from scipy.optimize import minimize  # not where heads are read alone: it takes long to import

        penalty = 1 / (strength * self._n_rows)
        coordinates = self._coordinates(start.curvature, penalty)
        objective = _Objective(self._rows, penalty, coordinates)

        def stop(intermediate_result: Any) -> None:
            if objective.above(intermediate_result.x) <= tolerance:
                raise StopIteration

        found = minimize(
            objective,
            coordinates.of_point(start),
            method="L-BFGS-B",
            jac=True,
            callback=stop,
            options={"maxiter": max_steps, "maxfun": 50 * max_steps, "maxls": 50, "gtol": 0, "ftol": 0},
        )
        weight, bias = coordinates.weights(found.x)
        if coordinates.turning is None:
            weight = weight @ coordinates.basis.T
        return _Point(weight, bias, objective.above(found.x) <= tolerance, objective.last.curvature)

    def _coordinates(self, curvature: float, penalty: float) -> "_Coordinates":
        # Where all rows are certain nothing curves any more, and a bias, which has no penalty, would know no scale.
        curvature = max(curvature, 1e-9)
        basis, variance = self._directions
        turning: AnyFloats | None = None if self._rows.whole else basis.astype(self._rows.dtype)
        return _Coordinates(basis, turning, (curvature * variance + penalty) ** -0.5, curvature**-0.5)


class _Point(NamedTuple):
    """As `LogisticFit`, but with one output, the difference of the logits, for two classes."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    converged: bool
    curvature: float


def _pointed_to(earlier: Sequence[tuple[float, _Point]], strength: float) -> _Point:
    """Where the path goes on, by the one or two minima before: straight, by the logarithm of the strength."""
    (own, last), before = earlier[-1], earlier[:-1]
    if not before:
        return last
    other, point = before[0]
    ahead = np.log(strength / own) / np.log(own / other)
    return last._replace(
        weight=last.weight + ahead * (last.weight - point.weight), bias=last.bias + ahead * (last.bias - point.bias)
    )


class _Coordinates(NamedTuple):
    """Those in which the loss is about as steep one way as another, ``[outputs · (r + 1)]``: of weight, then of bias.

    The minimum is within what the rows span, so directions in which no row lies need no coordinate.

    Attributes:
        basis: directions in which features vary, ``[D, r]`` float64.
        turning: the basis again, in the precision of a step's products, by which weights are turned; None where the
            rows are.
        along: what a coordinate along each is worth in weight, ``[r]``.
        of_bias: the same of a bias.
    """

    basis: NDArray[np.float64]
    turning: AnyFloats | None
    along: NDArray[np.float64]
    of_bias: float

    def of_point(self, point: _Point) -> NDArray[np.float64]:
        """Coordinates of weights of features as they are."""
        return np.concatenate([(point.weight @ self.basis / self.along).ravel(), point.bias / self.of_bias])

    def weights(self, at: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weight and bias, of the rows as they are given."""
        outputs = len(at) // (len(self.along) + 1)
        along, bias = np.split(at, [outputs * len(self.along)])
        weight = along.reshape(outputs, -1) * self.along
        return weight if self.turning is None else _product(weight, self.turning.T), bias * self.of_bias

    def gradient(self, by_weight: NDArray[np.float64], by_bias: NDArray[np.float64]) -> NDArray[np.float64]:
        """By coordinates, where that by weight and bias of the given rows is known."""
        along = by_weight if self.turning is None else _product(by_weight, self.turning)
        return np.concatenate([(along * self.along).ravel(), by_bias * self.of_bias])


def _product(rows: NDArray[np.float64], matrix: AnyFloats) -> NDArray[np.float64]:
    """In the matrix's precision."""
    return np.asarray(rows.astype(matrix.dtype) @ matrix, dtype=np.float64)


class _Objective:
    """Mean loss with its penalty, and its gradient, by coordinates.

    Attributes:
        last: the loss, without penalty, where it was asked for last.
    """

    last: HeadLoss

    def __init__(self, rows: SummedRows, penalty: float, coordinates: _Coordinates) -> None:
        self._rows, self._penalty, self._coordinates = rows, penalty, coordinates
        self._at, self._above = np.zeros(0), np.inf

    def __call__(self, at: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight, bias = self._coordinates.weights(at)
        self.last = head_loss(self._rows, weight, bias)
        gradient = self._coordinates.gradient(self.last.weight + self._penalty * weight, self.last.bias)
        self._at, self._above = at.copy(), 0.5 * float(np.vdot(gradient, gradient))
        return self.last.loss + 0.5 * self._penalty * float(np.vdot(weight, weight)), gradient

    def above(self, at: NDArray[np.float64]) -> float:
        """By how much the loss is above its minimum, about: what a step of Newton's would gain.

        Known of the last place alone; elsewhere it is infinite.
        """
        return self._above if np.array_equal(at, self._at) else np.inf
