"""MSP at the temperature that held-out ID rows like best."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.optimize import minimize_scalar

from stages.errors import InputError
from stages.id_data.lazy import Floats
from stages.scorers.inputs import ROWS_AT_ONCE, ScoreInputs
from stages.scorers.logits.msp import msp_score
from stages.scorers.scorer import Scorer
from stages.scorers.settings import Temperature
from stages.scorers.shared.arrays import checked_logits, labels_within, scaled_logits
from stages.scorers.shared.softmax import log_sum

_RANGE = (0.01, 100.0)  # of a fit that stops after some steps; the prior keeps the other far inside
_GRID = np.linspace(np.log(_RANGE[0]), np.log(_RANGE[1]), 13)
_PRIOR_DEVIATION = 1.0  # of log T
_HELD_BYTES = 256 << 20  # of float32 logits


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
    found = _fitted(_in_blocks(checked_logits(logits), np.asarray(labels)), start, steps)
    if not found.rows:
        raise InputError("temperature scaling needs held-out ID rows with labels, none given")
    return found


_Block = tuple[NDArray[np.floating], NDArray[np.integer]]  # logits [b, C] and labels [b]
_Walk = Callable[[], Iterable[_Block]]  # over all rows, as often as it is called


def _in_blocks(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> _Walk:
    starts = range(0, len(logits), ROWS_AT_ONCE)
    return lambda: ((logits[at : at + ROWS_AT_ONCE], labels[at : at + ROWS_AT_ONCE]) for at in starts)


def _fitted(walk: _Walk, start: float, steps: int | None) -> FittedTemperature:
    """As `fit_temperature`, of rows that are read a block at a time; T = 1 of no row, where none is known."""
    counts = [len(truth) for _, truth in map(_known, walk())]
    n = sum(counts)
    if not n:
        return FittedTemperature(1.0, 0.0, 0)

    def nll(temperature: float) -> float:
        losses = [_losses(rows, truth, temperature) for rows, truth in map(_known, walk())]
        return float(np.mean(np.concatenate(losses)))

    if steps is None:
        best, converged = _most_probable(nll, n)
    else:
        rows, truth = zip(*map(_known, walk()), strict=True)
        best, converged = _after_steps(np.concatenate(rows), np.concatenate(truth), start, steps)
    return FittedTemperature(best, nll(best), n, converged)


def _known(block: _Block) -> tuple[NDArray[np.float64], NDArray[np.integer]]:
    """Rows of a block whose class is known and applies."""
    values, labels = scaled_logits(block[0], 1.0), labels_within(block[1], block[0].shape[1], "temperature scaling")
    known = np.flatnonzero(labels >= 0)
    known = known[np.isfinite(values[known, labels[known]])]
    return values[known], labels[known]


def _losses(rows: NDArray[np.float64], truth: NDArray[np.integer], temperature: float) -> NDArray[np.float64]:
    """``[n]`` −log softmax(l / T)_label."""
    scaled = rows / temperature
    losses: NDArray[np.float64] = log_sum(scaled) - scaled[np.arange(len(rows)), truth]
    return losses


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
        return _fitted(self._walk(select), self.start, self.steps)

    def _walk(self, select: ScoreInputs) -> _Walk:
        """Over logits that are held where they are few, and computed anew at every walk where they are many."""
        labels = select.need("labels", self.name)
        if 4 * len(select) * (select.n_classes or 0) <= _HELD_BYTES:
            return _in_blocks(select.need("logits", self.name), labels)
        return lambda: ((block.need("logits", self.name), block.need("labels", self.name)) for block in select.blocks())

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
