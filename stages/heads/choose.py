"""Linear heads: regularised multinomial logistic regression on centred, scaled features.

The linear probe of a frozen backbone and the heads refitted on an expert's features are the same thing, fitted by
the same rule on the same rows.

All features are divided by one common scale, not each by its own: a feature that hardly varies on ID rows, divided by
its small deviation, gives an OOD row that moves it an enormous logit. Held-out ID log-likelihood prefers the common
scale or is indifferent (digits: −0.07 against −0.21; 40 Caltech classes: −0.176 against −0.175).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.files.tensors import read_described, write_described
from stages.heads.affine import LinearHead, Standardisation
from stages.heads.logistic import HEAD_TOLERANCE, LogisticFit, LogisticProblem, logistic_problem
from stages.heads.summing import HERE, Summing
from stages.heads.sums import GivenRows, standardisation
from stages.id_data.lazy import Rows2D
from stages.progress import MOMENT, SILENT, Progress

# Inverse strength of the L2 penalty (scikit-learn's C), the same grid for every method.
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FITS = len(STRENGTHS) + 1  # of a head that is chosen, as progress counts: each strength, then the chosen one to its end
_SURE = 3  # standard errors that the held-out likelihood falls by before weaker penalties are given up


@dataclass(frozen=True)
class HeadRows:
    """Features ``[N, D]`` and labels ``[N]`` to fit on, and others to judge by; features are read a block at a time."""

    features: Rows2D
    labels: NDArray[np.int32]
    select_features: Rows2D
    select_labels: NDArray[np.int32]


def fit_head(
    features: Rows2D,
    labels: NDArray[np.int32],
    n_classes: int,
    strength: float,
    tolerance: float = HEAD_TOLERANCE,
    summing: Summing = HERE,
) -> LinearHead:
    """Multinomial logistic regression with an L2 penalty on centred, commonly scaled features.

    Memory does not grow with N, labels aside; the result does not depend on the number of cores.

    Args:
        features: ``[N, D]``.
        labels: ``[N]`` in 0 to C − 1; classes without a row get no output (logit ``-inf``).
        n_classes: C.
        strength: scikit-learn's ``C``, the inverse of the penalty.
        tolerance: how far the mean loss may be above its minimum; with ``ROUGH`` or more it is fitted in float32, in a
            fraction of the time, which is enough where heads are compared and thrown away.
        summing: who sums over the rows; this process by default.
    """
    with _fits(features, labels, n_classes, summing) as fits:
        return fits.minimum(strength, tolerance=tolerance)


@contextmanager
def _fits(features: Rows2D, labels: NDArray[np.int32], n_classes: int, summing: Summing = HERE) -> Iterator["_Fits"]:
    classes, own = np.unique(labels, return_inverse=True)
    standardise = standardisation(features)
    if len(classes) == 1:
        yield _Fits(classes, n_classes, standardise, None)
        return
    with logistic_problem(GivenRows(features, own, standardise), len(classes), summing) as problem:
        yield _Fits(classes, n_classes, standardise, problem)


@dataclass(frozen=True)
class _Fits:
    """Heads of the same rows at several strengths.

    Attributes:
        classes: that have rows.
        n_classes: C.
        standardise: of the rows.
        problem: None where one class is all there is.
    """

    classes: NDArray[np.int32]
    n_classes: int
    standardise: Standardisation
    problem: LogisticProblem | None

    def path(self, strengths: Sequence[float]) -> Iterator[tuple[LogisticFit | None, LinearHead]]:
        """Of each strength, ascending, what was found and its head, good enough to be compared."""
        if self.problem is None:
            yield from ((None, self._head(None)) for _ in strengths)
            return
        for found in self.problem.path(strengths):
            yield found, self._head(found)

    def minimum(
        self, strength: float, start: LogisticFit | None = None, tolerance: float = HEAD_TOLERANCE
    ) -> LinearHead:
        """The head of one strength, from where the path came to."""
        return self._head(None if self.problem is None else self.problem.minimum(strength, start, tolerance))

    def _head(self, found: LogisticFit | None) -> LinearHead:
        weight = np.zeros((self.n_classes, len(self.standardise.mean)), dtype=np.float32)
        bias = np.full(self.n_classes, -np.inf, dtype=np.float32)
        if found is None:
            bias[self.classes] = 0
            return LinearHead(weight, bias, self.standardise)
        weight[self.classes], bias[self.classes] = found.weight, found.bias
        return LinearHead(weight, bias, self.standardise, converged=found.converged)


class ChosenHead(NamedTuple):
    """A head, the strength that was chosen for it, and the mean log-likelihood of each strength for the record."""

    head: LinearHead
    strength: float
    judged: dict[str, float]


def choose_head(
    rows: HeadRows,
    n_classes: int,
    strengths: Sequence[float] = STRENGTHS,
    summing: Summing = HERE,
    progress: Progress = SILENT,
) -> ChosenHead:
    """The head of the strongest penalty whose held-out ID log-likelihood is within one standard error of the best.

    The one-standard-error rule of Breiman et al., "Classification and Regression Trees", 1984: among heads that ID
    rows cannot tell apart, the most regular one.

    Args:
        rows: of one model. Where none is there to judge by, of a class that it knows, the strongest penalty is taken.
        n_classes: C.
        strengths: to choose from.
        summing: as in `fit_head`.
        progress: counts `FITS` fits, those that need not be done as well.
    """
    known = np.flatnonzero(np.isin(rows.select_labels, rows.labels))  # of others every head says p = 0
    if not len(known):
        only = sorted(strengths)[0]
        head = fit_head(rows.features, rows.labels, n_classes, only, summing=summing)
        progress.advance(FITS)
        return ChosenHead(head, only, {})
    if len(known) < len(rows.select_labels):
        rows = replace(rows, select_features=rows.select_features[known], select_labels=rows.select_labels[known])
    with _fits(rows.features, rows.labels, n_classes, summing) as fits:
        found, likelihood = {}, {}
        for strength, (fit, head) in zip(sorted(strengths), fits.path(sorted(strengths)), strict=False):
            found[strength] = fit
            likelihood[strength] = summing.log_likelihood(head, rows.select_features, rows.select_labels)
            best = max(likelihood.values(), key=lambda judged: judged.mean())
            progress.advance()
            if _turned(best, likelihood[strength]):
                break
        enough = best.mean() - _standard_error(best)
        chosen = next(strength for strength, judged in likelihood.items() if judged.mean() >= enough)
        progress.advance(FITS - 1 - len(found))
        head = fits.minimum(chosen, found[chosen])
        progress.advance()
    judged = {f"{strength:g}": round(float(own.mean()), 6) for strength, own in likelihood.items()}
    return ChosenHead(head, chosen, judged)


def _turned(best: NDArray[np.float64], last: NDArray[np.float64]) -> bool:
    """Whether the likelihood of rows has clearly fallen from the best one, so that weaker penalties need no fit."""
    return float((best - last).mean()) > _SURE * _standard_error(best - last)


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std() / np.sqrt(len(values)))


@dataclass(frozen=True)
class FittedHeads:
    """One head for each fold's model and one for the final model, with how the final one's strength was chosen.

    `parts` are those that calibrate under cross-fitting, each fitted without one part of the rows
    (`stages.id_data.split`), with the final one's strength. Like it they start from zero: a solver that stops early
    would not leave a head that has seen the part.
    """

    folds: tuple[LinearHead, ...]
    final: LinearHead
    strength: float
    judged: dict[str, float]
    parts: tuple[LinearHead, ...] = ()

    @classmethod
    def of(
        cls,
        chosen: Sequence[ChosenHead],
        n_classes: int,
        parts: Sequence["FitRows"] = (),
        summing: Summing = HERE,
        progress: Progress = SILENT,
    ) -> "FittedHeads":
        """Heads of the folds' models and, last, of the final one; a single one is both.

        Args:
            chosen: them.
            n_classes: C.
            parts: rows that are left without each part under cross-fitting.
            summing: as in `fit_head`.
            progress: counts one fit a part.
        """
        *folds, final = chosen
        without = []
        for rows in parts:
            without.append(fit_head(*rows, n_classes, final.strength, summing=summing))
            progress.advance()
        models = tuple(fold.head for fold in folds or chosen)
        return cls(models, final.head, final.strength, final.judged, tuple(without))

    def of_run(self, run: str) -> LinearHead:
        """That of the model called ``"final"``, or of fold i, ``"fold-<i>"``."""
        return self.final if run == "final" else self.folds[int(run.removeprefix("fold-"))]

    def notes(self, kind: str) -> list[str]:
        """What to say of how the heads called `kind` were fitted, a line each."""
        heads = list({id(head): head for head in (*self.folds, *self.parts, self.final)}.values())
        stopped = sum(not head.converged for head in heads)
        lines = [f"head {kind}: {stopped} of {len(heads)} fits stopped before the minimum"] if stopped else []
        if not self.judged:
            lines.append(f"head {kind}: strength {self.strength:g}, for no held-out row is there to choose it by")
        return lines


WhichHead = Callable[[FittedHeads], LinearHead]  # the head of one model among those that were fitted


def final_head(heads: FittedHeads) -> LinearHead:
    """That of the final model."""
    return heads.final


def fold_head(fold: int) -> WhichHead:
    """That of a fold's model, by its number."""
    return lambda heads: heads.folds[fold]


def part_head(part: int) -> WhichHead:
    """That which was fitted without a part, by its number."""
    return lambda heads: heads.parts[part]


FitRows = tuple[Rows2D, NDArray[np.int32]]  # features [N, D] and labels [N]


def fit_heads(
    models: Sequence[HeadRows],
    n_classes: int,
    parts: Sequence[FitRows] = (),
    summing: Summing = HERE,
    progress: Progress = SILENT,
) -> FittedHeads:
    """Choose and fit the head of every model by the same rule, each on its own rows alone.

    Args:
        models: rows of the folds' models and, last, of the final one; one where that is the only fold's.
        n_classes: C.
        parts: rows that are left without each part under cross-fitting.
        summing: as in `fit_head`.
        progress: counts fits.
    """
    progress.start(FITS * len(models) + len(parts), "fit", "heads probe", MOMENT)
    chosen = [choose_head(rows, n_classes, summing=summing, progress=progress) for rows in models]
    heads = FittedHeads.of(chosen, n_classes, parts, summing, progress)
    progress.close()
    return heads


def save_heads(folder: Path, name: str, heads: Mapping[str, FittedHeads], identity: str) -> None:
    """Write ``<name>.safetensors`` and, last, ``<name>.json``; `identity` says what the heads were fitted on."""
    tensors = {
        f"{kind}/{index}/{key}": array
        for kind, fitted in heads.items()
        for index, head in enumerate((*fitted.folds, *fitted.parts, fitted.final))
        for key, array in head.tensors().items()
    }
    about = {
        kind: {
            "folds": len(fitted.folds),
            "parts": len(fitted.parts),
            "strength": fitted.strength,
            "log_likelihood": fitted.judged,
            "converged": [head.converged for head in (*fitted.folds, *fitted.parts, fitted.final)],
        }
        for kind, fitted in heads.items()
    }
    write_described(folder / f"{name}.safetensors", tensors, {"identity": identity, "heads": about})


def load_heads(folder: Path, name: str, identity: str) -> dict[str, FittedHeads] | None:
    """Read what `save_heads` wrote; None where there is nothing whole of this identity."""
    stored = read_described(folder / f"{name}.safetensors")
    if stored is None or stored[0].get("identity") != identity:
        return None
    about, tensors = stored
    return {kind: _stored_heads(tensors, kind, described) for kind, described in about["heads"].items()}


def _stored_heads(tensors: Mapping[str, NDArray[np.float32]], kind: str, described: Mapping[str, Any]) -> FittedHeads:
    n_folds, n_parts = described["folds"], described["parts"]
    heads = []
    for index, converged in zip(range(n_folds + n_parts + 1), described["converged"], strict=True):
        mean, scale, weight, bias = (tensors[f"{kind}/{index}/{key}"] for key in ("mean", "scale", "weight", "bias"))
        heads.append(LinearHead(weight, bias, Standardisation(mean, scale), converged=converged))
    folds, parts, final = tuple(heads[:n_folds]), tuple(heads[n_folds:-1]), heads[-1]
    return FittedHeads(folds, final, described["strength"], described["log_likelihood"], parts)
