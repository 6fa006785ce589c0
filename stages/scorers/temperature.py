"""MSP at the temperature that held-out ID rows like best."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stages.errors import InputError
from stages.scorers.base import Floats, ScoreInputs, Scorer, Temperature, scaled_logits
from stages.scorers.msp import msp_score

_RANGE = (0.01, 100.0)  # rows that are all right want T = 0, rows that are mostly wrong T = infinity


class FittedTemperature(NamedTuple):
    """T*, the mean negative log-likelihood there, and of how many rows."""

    temperature: float
    nll: float
    rows: int


def fit_temperature(
    logits: ArrayLike, labels: NDArray[np.integer], start: float = 1.5, steps: int | None = None
) -> FittedTemperature:
    """The temperature T* that minimises the mean of −log softmax(l / T)_label, by L-BFGS.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
        logits: [n, C] of held-out ID rows.
        labels: [n]; rows of unknown label (negative), or whose class has logit −inf, are left out.
        start: T to start from.
        steps: None goes on to the minimum, between 0.01 and 100, which does not depend on the start; a number takes as
            many steps of learning rate 0.01, as Guo et al.'s code, OpenOOD and pytorch-ood do with 50, short of it.

    Raises:
        InputError: no row of known label, and as `scaled_logits`.

    >>> round(fit_temperature([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]], np.array([0, 0, 0, 1])).temperature, 4)
    1.8205
    """
    import torch  # where it is needed alone: scores are importable without

    values = scaled_logits(logits, 1.0)
    known = np.flatnonzero(labels >= 0)
    known = known[np.isfinite(values[known, labels[known]])]
    if not known.size:
        raise InputError("temperature scaling needs held-out ID rows with labels, none given")
    finite = np.maximum(values[known], -1e30)  # −inf has no gradient; this has softmax 0 just so
    rows, truth = torch.from_numpy(finite), torch.from_numpy(np.asarray(labels[known], dtype=np.int64))

    def nll(temperature: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.nll_loss(torch.log_softmax(rows / temperature, dim=1), truth)

    if steps is None:  # over log T: no step leaves the positive numbers
        parameter = torch.tensor(np.log(start), dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [parameter], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )
    else:
        parameter = torch.tensor(start, dtype=torch.float32, requires_grad=True)
        optimiser = torch.optim.LBFGS([parameter], lr=0.01, max_iter=steps)

    def temperature() -> torch.Tensor:
        return parameter.clamp(-30, 30).exp() if steps is None else parameter

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = nll(temperature())
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        best = temperature().clamp(*_RANGE)
        return FittedTemperature(float(best), float(nll(best)), len(known))


@dataclass(eq=False)
class TemperatureScalingScorer(Scorer):
    """`msp_score` at the T* of `fit_temperature` on held-out ID rows, an expert's own where there are experts.

    Attributes:
        start: T to start from.
        steps: None goes on to the minimum, as the paper has it; 50 is what its code and the libraries do.
    """

    name: ClassVar[str] = "temperature-scaling"
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "select"})
    profiles: ClassVar = {"openood": {"steps": 50}, "pytorch-ood": {"start": 1.0, "steps": 50}}

    start: Temperature = 1.5
    steps: Annotated[int, Field(ge=1)] | None = None

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> FittedTemperature:
        """T* of the held-out rows; 1 where an expert got none."""
        if select is None:
            raise InputError(f"{self.name} needs held-out ID rows to fit on: give them to fit() as well")
        logits, labels = select.need("logits", self.name), select.need("labels", self.name)
        if not len(select):
            return FittedTemperature(1.0, 0.0, 0)
        return fit_temperature(logits, labels, self.start, self.steps)

    def judge(self, x: ScoreInputs, memory: FittedTemperature) -> Floats:
        """MSP at T* a row, [n]."""
        return msp_score(x.need("logits", self.name), memory.temperature)

    def facts(self, memory: FittedTemperature) -> dict[str, Any]:
        """T* and of which rows."""
        return {"temperature": memory.temperature, "fitted_on": "select", "fitted_rows": memory.rows}
