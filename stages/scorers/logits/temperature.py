"""MSP at the temperature that held-out ID rows like best."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.optimize import minimize_scalar

from stages.errors import InputError
from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.logits.msp import msp_score
from stages.scorers.scorer import Scorer
from stages.scorers.settings import Temperature
from stages.scorers.shared.arrays import labels_within, scaled_logits
from stages.scorers.shared.softmax import log_sum

_RANGE = (0.01, 100.0)  # of a fit that stops after some steps; the prior keeps the other far inside
_GRID = np.linspace(np.log(_RANGE[0]), np.log(_RANGE[1]), 13)
_PRIOR_DEVIATION = 1.0  # of log T


class FittedTemperature(NamedTuple):
    """T*, the mean negative log-likelihood there, of how many rows, and whether that is the minimum."""

    temperature: float
    nll: float
    rows: int
    converged: bool = True


def fit_temperature(
    logits: ArrayLike, labels: NDArray[np.integer], start: float = 1.5, steps: int | None = None
) -> FittedTemperature:
    """The temperature T* that makes held-out rows most probable, given that it is not far from 1.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, minimise the mean of −log softmax(l / T)_label.
    That has no minimum above T = 0 where all rows are classified right, none below infinity where most are not; their
    code and the libraries stop after 50 steps, scikit-learn at |log T| = 10. Here log T has a normal prior of mean 0
    and deviation 1, which adds (log T)² / 2n to the mean over n rows: it decides where rows say nothing, and vanishes
    as there are more. T stays between 0.01 and 100.

    Args:
        logits: [n, C] of held-out ID rows.
        labels: [n]; rows of unknown label (negative), or whose class has logit −inf, are left out.
        start: T to start from, where steps are counted.
        steps: None is all of the above; a number takes as many L-BFGS steps of learning rate 0.01 without a prior, as
            Guo et al.'s code, OpenOOD and pytorch-ood do with 50.

    Raises:
        InputError: no row of known label, a label beyond the logits' columns, and as `scaled_logits`.

    >>> round(fit_temperature([[2.0, 0.0]] * 400, np.repeat([0, 1], [300, 100])).temperature, 3)
    1.809
    """
    values = scaled_logits(logits, 1.0)
    labels = labels_within(labels, values.shape[1], "temperature scaling")
    known = np.flatnonzero(labels >= 0)
    known = known[np.isfinite(values[known, labels[known]])]
    if not known.size:
        raise InputError("temperature scaling needs held-out ID rows with labels, none given")
    rows, truth = values[known], labels[known]

    def nll(temperature: float) -> float:
        scaled = rows / temperature
        return float(np.mean(log_sum(scaled) - scaled[np.arange(len(rows)), truth]))

    best, converged = _most_probable(nll, len(rows)) if steps is None else _after_steps(rows, truth, start, steps)
    return FittedTemperature(best, nll(best), len(rows), converged)


def _most_probable(nll: Callable[[float], float], n: int) -> tuple[float, bool]:
    def loss(log_t: float) -> float:
        return nll(float(np.exp(log_t))) + (log_t / _PRIOR_DEVIATION) ** 2 / (2 * n)

    near = int(np.argmin([loss(log_t) for log_t in _GRID]))  # it need not have one minimum alone
    around = _GRID[max(near - 1, 0)], _GRID[min(near + 1, len(_GRID) - 1)]
    found = minimize_scalar(loss, bounds=around, method="bounded", options={"xatol": 1e-9})
    return float(np.exp(found.x)), bool(found.success)


def _after_steps(rows: NDArray[np.float64], truth: NDArray[np.integer], start: float, steps: int) -> tuple[float, bool]:
    import torch  # where it is needed alone: scores are importable without

    finite = torch.from_numpy(np.maximum(rows, -1e30))  # −inf has no gradient; this has softmax 0 just so
    target = torch.from_numpy(np.asarray(truth, dtype=np.int64))
    temperature = torch.tensor(start, dtype=torch.float32, requires_grad=True)
    optimiser = torch.optim.LBFGS([temperature], lr=0.01, max_iter=steps)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(finite / temperature, target)
        loss.backward()
        return loss

    optimiser.step(closure)
    converged = optimiser.state[temperature]["n_iter"] < steps
    return float(temperature.detach().clamp(*_RANGE)), converged


@dataclass(eq=False)
class TemperatureScalingScorer(Scorer):
    """`msp_score` at the T* of `fit_temperature` on held-out ID rows, an expert's own where there are experts.

    Attributes:
        start: T to start from, where steps are counted.
        steps: as in `fit_temperature`; 50 is what the paper's code and the libraries do.
    """

    name: ClassVar[str] = "temperature-scaling"
    title: ClassVar[str] = "temperature-scaled MSP"
    says: ClassVar[str] = "the same as MSP, T fitted on held-out ID"
    paper: ClassVar[str] = "Guo 2017"
    cost: ClassVar[str] = "C"
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "select", "labels"})
    profiles: ClassVar = {"openood": {"steps": 50}, "pytorch-ood": {"start": 1.0, "steps": 50}}

    start: Temperature = 1.5
    steps: Annotated[int, Field(ge=1)] | None = None

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> FittedTemperature:
        """T* of the held-out rows; 1 where an expert got none of a class that it knows."""
        if select is None:
            raise InputError(f"{self.name} needs held-out ID rows to fit on: give them to fit() as well")
        logits, labels = select.need("logits", self.name), select.need("labels", self.name)
        known = labels_within(labels, logits.shape[1], self.name) >= 0
        if not np.isfinite(logits[known, labels[known]]).any():
            return FittedTemperature(1.0, 0.0, 0)
        return fit_temperature(logits, labels, self.start, self.steps)

    def judge(self, x: ScoreInputs, memory: FittedTemperature) -> Floats:
        """MSP at T* a row, [n]."""
        return msp_score(x.need("logits", self.name), memory.temperature)

    def facts(self, memory: FittedTemperature) -> dict[str, Any]:
        """T* and of which rows."""
        return {"temperature": memory.temperature, "fitted_on": "select", "fitted_rows": memory.rows}

    def remark(self, memory: FittedTemperature) -> str:
        """Whether T is what held-out rows like best."""
        if not memory.rows:
            return "T = 1, for no held-out row is of a class that is known here"
        return "" if memory.converged else "T is where the steps stopped, before the minimum"
