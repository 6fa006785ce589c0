"""Rows as OpenOOD's leaderboard has them: ``results/imagenet1k_ood.csv`` and ``…_fsood.csv`` of its branch.

AUROC and accuracy in per cent with two digits; near and far are means over sets, as everywhere.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pipeline.benchmark.comparison import method_label
from pipeline.config import RunConfig
from pipeline.reproduction.document import ReproducedRun
from stages.results.method import FROZEN_SUM, RECOMMENDED, Method
from stages.results.scored_study import ScoredStudy
from stages.scorers import title_of

LEADERBOARD_COLUMNS = (
    *("Training", "Postprocessor", "Near-OOD_AUROC", "Far-OOD_AUROC", "ID_Accuracy"),
    *("Outlier_Data", "Arch", "Additional_Description"),
)


def leaderboard_rows(
    run: ReproducedRun, config: RunConfig, scored: ScoredStudy, full_spectrum: bool = False
) -> Iterator[dict[str, Any]]:
    """A row a method that has averages; calibrated scores and diagnostics are left out.

    Args:
        run: whose.
        config: of the run.
        scored: its scores.
        full_spectrum: with the covariate-shifted ID sets as ID.
    """
    name = "" if config.backbone is None else config.backbone.name
    column = f"{'fsood_' if full_spectrum else ''}auroc_mean"
    for method, cells in scored.lines.items():
        if method.calibrated or ("average", "all") not in cells:
            continue
        near, far = (_per_cent((cells.get(("average", group)) or {}).get(column)) for group in ("near", "far"))
        accuracy = _per_cent(_accuracy(scored, method, full_spectrum))
        values = (run.training, title_of(method.score), near, far, accuracy, "No", run.arch or name)
        yield dict(zip(LEADERBOARD_COLUMNS, (*values, f"{run.name}, {method_label(method)}"), strict=True))


def _accuracy(scored: ScoredStudy, method: Method, full_spectrum: bool) -> float | None:
    """Of the method's head; of features alone that of the linear head on them, as a network has one accuracy there."""
    plain = FROZEN_SUM.head if method.features == "cls" else RECOMMENDED.head
    for head in (method.head, plain):
        wanted = {"backbone": method.backbone, "features": method.features, "variant": method.variant, "head": head}
        own = [entry for entry in scored.id["accuracy"] if wanted.items() <= entry.items()]
        if full_spectrum:  # over images, as OpenOOD's evaluator counts them
            own += [entry for entry in scored.id.get("shifted_accuracy", []) if wanted.items() <= entry.items()]
        if own:
            return float(np.average([entry["accuracy"] for entry in own], weights=[entry["n"] for entry in own]))
    return None


def _per_cent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def is_full_spectrum(studies: Mapping[str, ScoredStudy]) -> bool:
    """Whether any of several studies has covariate-shifted ID sets."""
    return any(scored.shifted for scored in studies.values())
