"""OOD scores: a pure function with its paper for each formula, and a thin fitted object around it.

Higher = more OOD, everywhere. A new score is one file beside these and one line in `SCORERS`.

    base          ScoreInputs, what a score may look at; Scorer, what a score is
    energy, msp   scores of the logits
    mos           the smallest probability of "other" over the groups
    knn           distance to the k-th neighbour, in the routed expert's subspace where there are experts
    ncm           distance to the nearest class mean, likewise
    selection     choose_k(): k from ID rows alone
    calibration   scores of several experts or kinds onto one scale; thresholds
"""

import difflib
from collections.abc import Callable
from typing import Any

from stages.errors import InputError
from stages.scorers.base import ScoreInputs, Scorer
from stages.scorers.calibration import ExpertCalibration, Standardiser, ThresholdEstimate, sum_scores, threshold_at
from stages.scorers.energy import EnergyScorer, energy_score
from stages.scorers.knn import ExpertBanks, KNNScorer, knn_score
from stages.scorers.mos import MOSScorer, mos_score
from stages.scorers.msp import MSPScorer, msp_score
from stages.scorers.ncm import NCMScorer, class_means
from stages.scorers.selection import K_GRID, Fold, choose_k

SCORERS: dict[str, Callable[..., Scorer]] = {
    "msp": MSPScorer,
    "energy": EnergyScorer,
    "knn": KNNScorer,
    "ncm": NCMScorer,
    "mos": MOSScorer,
}


def get_scorer(name: str, **params: Any) -> Scorer:
    """The scorer called ``name``, not yet fitted; ``params`` are its constructor's.

    Raises:
        InputError: no such scorer; the nearest known name is in the message.

    >>> get_scorer("energy", temperature=2.0).params()
    {'temperature': 2.0}
    """
    if name not in SCORERS:
        near = difflib.get_close_matches(name, SCORERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"no score is called {name!r}{hint} (known: {', '.join(SCORERS)})")
    return SCORERS[name](**params)


__all__ = [
    "K_GRID",
    "SCORERS",
    "EnergyScorer",
    "ExpertBanks",
    "ExpertCalibration",
    "Fold",
    "KNNScorer",
    "MOSScorer",
    "MSPScorer",
    "NCMScorer",
    "ScoreInputs",
    "Scorer",
    "Standardiser",
    "ThresholdEstimate",
    "choose_k",
    "class_means",
    "energy_score",
    "get_scorer",
    "knn_score",
    "mos_score",
    "msp_score",
    "sum_scores",
    "threshold_at",
]
