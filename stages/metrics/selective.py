"""Metrics of selective classification: a classifier answers the rows that a score calls safe, and is wrong on some.

The most OOD-looking rows are left to somebody else; *coverage* is the share that is answered. `SELECTIVE` says which
metrics there are. Both are areas over coverage from 0 to 1, fractions, lower is better. Ties are whole: rows of one
score are answered together, and between two scores a curve is a straight line, as in the authors' code (fd-shifts,
``rc_stats.py``).

| | risk at a coverage | its area |
|---|---|---|
| AURC | errors among the answered, as a share of these | hangs on the most confident rows, which every share counts |
| AUGRC | errors among the answered, as a share of *all* rows | the mean risk of an error that nobody notices |

Geifman and El-Yaniv, NeurIPS 2017 (AURC); Traub et al., "Overcoming Common Flaws in the Evaluation of Selective
Classification Systems", NeurIPS 2024 (AUGRC).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.errors import InputError
from stages.metrics.ranking import checked_scores


def aurc(scores: ArrayLike, failures: ArrayLike) -> float:
    """Area under the risk-coverage curve.

    Below the coverage of the most confident rows the risk is theirs.

    Args:
        scores: ``[n]``, higher = less sure (more OOD).
        failures: ``[n]`` whether the classifier is wrong.

    Raises:
        InputError: no rows, NaN or inf among the scores, or failures that are not one true or false a score.

    >>> aurc([0.1, 0.2, 0.3, 0.4], [False, False, True, True])  # risks 0, 0, 1/3, 1/2 at coverages 1/4, …, 1
    0.14583333333333331
    """
    return _curve(scores, failures).aurc()


def augrc(scores: ArrayLike, failures: ArrayLike) -> float:
    """Area under the generalised risk-coverage curve.

    Args and errors are those of `aurc`. With an accuracy of a it is a (1 − a) (1 − AUROC) + (1 − a)² / 2, where AUROC
    is that of wrong against right rows: (1 − a)² / 2 where the wrong rows are the least sure.

    >>> augrc([0.1, 0.2, 0.3, 0.4], [False, False, True, True])
    0.125
    """
    return _curve(scores, failures).augrc()


@dataclass(frozen=True, eq=False)
class _Curve:
    """At each distinct score t, ascending: how many rows have s ≤ t, and how many of these are wrong."""

    answered: NDArray[np.int64]
    wrong: NDArray[np.int64]

    def aurc(self) -> float:
        n, risk = int(self.answered[-1]), self.wrong / self.answered
        return float(np.trapezoid(np.append(risk[0], risk), np.append(0, self.answered))) / n

    def augrc(self) -> float:
        n, widths = int(self.answered[-1]), np.diff(self.answered, prepend=0)
        twice = int(widths @ (self.wrong + np.append(0, self.wrong[:-1])))  # whole numbers: no rounding before the last
        return twice / (2 * n * n)


class SelectiveMetric(NamedTuple):
    """What a metric of selective classification is called; lower is better.

    Attributes:
        name: its column in tables.
        title: as the field writes it.
        formula: it, of a curve.
    """

    name: str
    title: str
    formula: Callable[[_Curve], float]


SELECTIVE: Mapping[str, SelectiveMetric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (SelectiveMetric("aurc", "AURC", _Curve.aurc), SelectiveMetric("augrc", "AUGRC", _Curve.augrc))
    }
)


def selective_metrics(scores: ArrayLike, failures: ArrayLike) -> dict[str, float | None]:
    """All of `SELECTIVE`, of the rows of which it is known whether they are wrong.

    Args:
        scores: ``[n]``, higher = less sure.
        failures: ``[n]`` 1 where the classifier is wrong, 0 where it is right, negative where nobody knows.

    Returns:
        A value for each name; None where no row is known.
    """
    told = np.asarray(failures)
    known = told >= 0
    if not known.any():
        return dict.fromkeys(SELECTIVE)
    curve = _curve(np.asarray(scores)[known], told[known] == 1)
    return {name: metric.formula(curve) for name, metric in SELECTIVE.items()}


def _curve(scores: ArrayLike, failures: ArrayLike) -> _Curve:
    checked, wrong = checked_scores(scores, "ID"), np.asarray(failures)
    if wrong.shape != checked.shape or not np.isin(wrong, (0, 1)).all():
        raise InputError(
            f"failures of shape {wrong.shape} for {len(checked)} scores; one true or false for each expected"
        )
    order = np.argsort(checked, kind="stable")
    ordered = checked[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # of each distinct score
    return _Curve(last + 1, np.cumsum(wrong[order], dtype=np.int64)[last])
