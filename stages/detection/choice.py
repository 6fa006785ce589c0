"""The rule of ``score = "auto"``, on numbers alone: which of many candidates, from what each loses in each fold.

`stages.detection.pseudo` makes the numbers from ID rows, `stages.detection.auto` says what is chosen among.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from stages.scorers import FROZEN

AUTO_SEMANTICS = 3  # raise it when the same rows and settings would give another choice
Losses = NDArray[np.float64]  # [candidates, folds, kinds of pseudo-OOD]; lower is better
IN_SUMS = 4  # of each family of scores so many of the best are looked at of experts as well
CLEARLY = 2.0  # standard errors by which a sum has to be better than what is recommended beforehand
_ADMIT = 0.95


@dataclass(frozen=True)
class Standing:
    """How a candidate stands beside the best.

    Attributes:
        loss: mean over folds and kinds.
        gaps: what it loses more than the best of each kind, mean over folds.
        errors: standard error of each gap, over folds that both were judged in.
    """

    loss: float
    gaps: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def as_good(self) -> bool:
        """Whether ID rows cannot tell it from the best: no gap is more than its standard error."""
        return all(gap <= error for gap, error in zip(self.gaps, self.errors, strict=True))


def standings(losses: Losses) -> list[Standing]:
    """Of each candidate, beside the one whose mean loss is lowest, the first of equals; folds and kinds count alike."""
    means = losses.mean(axis=(1, 2))
    gaps = (losses - losses[int(np.argmin(means))]).transpose(0, 2, 1)
    rows = zip(means.tolist(), gaps.mean(axis=2).tolist(), standard_errors(gaps).tolist(), strict=True)
    return [Standing(loss, tuple(own), tuple(errors)) for loss, own, errors in rows]


def standard_errors(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the mean over the last axis, ``[…, n]`` to ``[…]``; 0 of a single value, which has none."""
    n = values.shape[-1]
    return values.std(axis=-1, ddof=1) / np.sqrt(n) if n > 1 else np.zeros(values.shape[:-1])


def choose(losses: Losses, sizes: Sequence[int]) -> int:
    """The best of the simplest that ID rows cannot tell from the best of all.

    The one-standard-error rule of Breiman et al., "Classification and Regression Trees", 1984, paired: a candidate is
    as good as the best where of every kind what it loses more, averaged over folds, is at most the standard error of
    that. Among such the fewest parts win, and among these the lowest loss; the first of equals. What is gained of one
    kind and lost of another is no tie: nobody knows which kind will come.

    Args:
        losses: ``[candidates, folds, kinds]``.
        sizes: how many parts each candidate is a sum of.

    Returns:
        Its number.

    >>> choose(np.array([[[0.2], [0.4]], [[0.1], [0.4]], [[0.9], [0.9]]]), [1, 2, 1])
    0
    """
    found, size = standings(losses), np.asarray(sizes)
    enough = np.array([standing.as_good for standing in found])
    loss = np.array([standing.loss for standing in found])
    return int(np.argmin(np.where(enough & (size == size[enough].min()), loss, np.inf)))


def clearly_better(own: NDArray[np.float64], recommended: NDArray[np.float64], repeats: int) -> bool:
    """Whether a candidate loses less than what is recommended beforehand by more than `CLEARLY` standard errors.

    The best of many candidates on few ID rows is so by chance as well. What stands in for OOD is not what will come.

    Args:
        own: losses ``[folds, sides]`` of the candidate; sides count alike.
        recommended: of the other.
        repeats: how many divisions of the same classes the folds are of: they tell little more than one does, so the
            standard error is that of one.
    """
    gains = (recommended - own).mean(axis=1)
    return bool(gains.mean() > CLEARLY * standard_errors(gains) * np.sqrt(repeats))


def displaces(own: NDArray[np.float64], frozen: NDArray[np.float64]) -> bool:
    """Whether a candidate that reads a mixture's features may take the place of the choice of frozen ones.

    Experts were trained on all classes, those too that a fold leaves out of banks and heads: what they lose of
    near pseudo-OOD is too little. So they have to be better by more than a standard error on each kind.

    Args:
        own: losses ``[folds, kinds]`` of the one.
        frozen: of the other.
    """
    gains = (frozen - own).T
    return bool((gains.mean(axis=1) > standard_errors(gains)).all())


# ------------------------------------------------------------------------------------------------------- what is summed


def sums_of(families: Sequence[Sequence[str]]) -> list[str]:
    """Names of all sums of two parts, each of another family: scores of one family see the same.

    >>> sums_of([["knn", "ncm"], ["energy"]])
    ['knn+energy', 'ncm+energy']
    """
    return ["+".join(parts) for pair in combinations(families, 2) for parts in product(*pair)]


def size_of(score: str) -> int:
    """How many parts a score is a sum of."""
    return score.count("+") + 1


def of_frozen(score: str) -> bool:
    """Whether every part looks at the backbone's own features."""
    return all(part.startswith(FROZEN) for part in score.split("+"))


# --------------------------------------------------------------------------------------------------------------- a fold


@dataclass(frozen=True, eq=False)
class FoldScores:
    """What scores say of one fold's rows.

    Attributes:
        id: ``[n]`` of each score, of rows that play ID.
        ood: ``[m]`` of each score, of rows that play OOD, by kind.
    """

    id: dict[str, NDArray[np.floating]]
    ood: dict[str, dict[str, NDArray[np.floating]]]

    def standardised(self) -> "FoldScores":
        """Every score in deviations above its mean on the rows that play ID; a constant one is 0."""
        own: dict[str, NDArray[np.floating]] = {}
        ood: dict[str, dict[str, NDArray[np.floating]]] = {kind: {} for kind in self.ood}
        for name, values in self.id.items():
            values = values.astype(np.float64)
            mean, std = values.mean(), values.std()
            std = std if std > np.finfo(np.float32).eps * np.abs(values).max(initial=0) else 1.0
            own[name] = (values - mean) / std
            for kind, scores in self.ood.items():
                ood[kind][name] = (scores[name].astype(np.float64) - mean) / std
        return FoldScores(own, ood)

    def losses(self, scores: Sequence[str]) -> NDArray[np.float64]:
        """FPR95 of each score or sum, ID positive, by kind, ``[scores, kinds]``; of `standardised` ones.

        As `stages.metrics.ranking.fpr95` has it: the share of pseudo-OOD at or below the ⌈0.95 n⌉-th smallest score of
        the rows that play ID.
        """
        found = np.empty((len(scores), len(self.ood)))
        for number, score in enumerate(scores):
            parts = score.split("+")
            own = np.sum([self.id[part] for part in parts], axis=0)
            # 0.95 · n is rounded; whole ranks below it are not.
            rank = int(np.argmax(np.arange(1, len(own) + 1) / len(own) >= _ADMIT))
            threshold = np.partition(own, rank)[rank]
            for column, ood in enumerate(self.ood.values()):
                found[number, column] = np.mean(np.sum([ood[part] for part in parts], axis=0) <= threshold)
        return found
