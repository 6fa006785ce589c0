"""Scores of one's own arrays, without caches and stages: `compare_scores`, for notebooks and scripts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.config import Profile
from stages.errors import InputError
from stages.metrics import ood_metrics
from stages.scorers import ClassifierHead, ScoreInputs, Scorer, Standardiser, get_scorer, sum_scores

Rows = ScoreInputs | Mapping[str, ArrayLike] | ArrayLike
_SHOWN = ("auroc", "fpr95", "fpr95_ood", "aupr_in", "aupr_out")


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare_scores` found; printing it gives a table in per cent.

    Attributes:
        rows: a row a score and OOD set, and its unweighted mean over the sets as ``average``: ``score``, ``params``,
            ``ood``, ``n_id``, ``n_ood`` and the metrics of `stages.metrics.OODMetrics`, fractions.
        scores: score -> set (``"id"``, and each OOD set) -> [n] float32; higher = more OOD.
    """

    rows: list[dict[str, Any]]
    scores: dict[str, dict[str, NDArray[np.float32]]]

    def __str__(self) -> str:
        lines = ["| score | ood | " + " | ".join(_SHOWN) + " |", "|---|---|" + "---:|" * len(_SHOWN)]
        for row in self.rows:
            cells = " | ".join(f"{100 * row[metric]:.2f}" for metric in _SHOWN)
            lines.append(f"| {row['score']} | {row['ood']} | {cells} |")
        return "\n".join(lines)

    _repr_markdown_ = __str__  # notebooks show it as a table


def compare_scores(
    train: Rows,
    test: Rows,
    ood: Mapping[str, Rows],
    scores: Sequence[str] = ("knn",),
    *,
    held_out: Rows | None = None,
    head: tuple[ArrayLike, ArrayLike] | None = None,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    profile: Profile = "paper",
) -> Comparison:
    """Fit scores on ID training rows, and tell ID test rows from OOD rows with each.

    Rows are features [n, D], or a mapping with any of ``features``, ``logits`` [n, C] and ``labels`` [n] (class
    numbers, of ID rows), or `ScoreInputs`.

    Args:
        train: ID training rows; many scores need their labels.
        test: ID test rows.
        ood: OOD rows by the name of their set.
        scores: names of `stages.scorers.SCORERS`, or sums such as ``"knn+energy"``.
        held_out: ID rows of neither; sums are standardised on them, and some scores choose a setting by them.
        head: weight [C, D] and bias [C] of a linear head; it gives the logits where rows have none.
        params: settings by score, such as ``{"knn": {"k": 10}}``.
        profile: whose defaults, where implementations differ.

    Raises:
        InputError: no OOD set, an unknown score or setting, or rows that lack what a score needs.

    >>> rng = np.random.default_rng(0)
    >>> blob = lambda centre: centre + rng.normal(size=(50, 4))
    >>> found = compare_scores(blob([9, 0, 0, 0]), blob([9, 0, 0, 0]), {"far": blob([0, 9, 0, 0])}, ["knn"])
    >>> found.rows[0]["score"], found.rows[0]["auroc"], found.scores["knn"]["far"].shape
    ('knn', 1.0, (50,))
    """
    if not ood:
        raise InputError("compare_scores needs an OOD set to tell ID rows from, none given")
    if taken := {"id", "average"} & ood.keys():
        raise InputError(f"an OOD set is called {taken.pop()!r}, a word of the result's own: give it another name")
    classifier = None if head is None else ClassifierHead(*(np.asarray(part) for part in head))
    fitting, select = _inputs(train, classifier), None if held_out is None else _inputs(held_out, classifier)
    sets = {name: _inputs(rows, classifier) for name, rows in ({"id": test} | dict(ood)).items()}
    unknown = (params or {}).keys() - {part for score in scores for part in score.split("+")}
    if unknown:
        raise InputError(f"params.{min(unknown)}: no score that is asked for has this name")

    fitted: dict[str, Scorer] = {}
    for part in dict.fromkeys(part for score in scores for part in score.split("+")):
        fitted[part] = get_scorer(part, profile, **(params or {}).get(part, {})).fit(fitting, select)
    raw = {part: {name: scorer.score(x) for name, x in sets.items()} for part, scorer in fitted.items()}
    rows, found = [], {}
    for score in scores:
        parts = score.split("+")
        found[score] = raw[score] if len(parts) == 1 else _sums(score, [fitted[part] for part in parts], raw, select)
        settings = {part: fitted[part].params() for part in parts}
        about = {"score": score, "params": settings[score] if len(parts) == 1 else settings}
        rows += _metrics(about, found[score])
    return Comparison(rows, found)


def _inputs(rows: Rows, head: ClassifierHead | None) -> ScoreInputs:
    if isinstance(rows, ScoreInputs):
        return rows
    if not isinstance(rows, Mapping):
        rows = {"features": rows}
    if unknown := rows.keys() - {"features", "logits", "labels"}:
        raise InputError(f"rows have {min(unknown)!r}; known are features, logits and labels")
    return ScoreInputs(**{name: np.asarray(array) for name, array in rows.items()}, head=head)


def _sums(
    score: str, parts: Sequence[Scorer], raw: Mapping[str, dict[str, NDArray[np.float32]]], select: ScoreInputs | None
) -> dict[str, NDArray[np.float32]]:
    """Scores of each set, each part in standard deviations of the held-out rows."""
    if select is None:
        raise InputError(f"{score}: a sum is standardised on held-out ID rows: give held_out")
    scales = [Standardiser.fit(part.score(select)) for part in parts]
    names = raw[parts[0].name]
    return {name: sum_scores([raw[part.name][name] for part in parts], scales) for name in names}


def _metrics(about: dict[str, Any], scores: Mapping[str, NDArray[np.float32]]) -> list[dict[str, Any]]:
    of_set = {name: asdict(ood_metrics(scores["id"], other)) for name, other in scores.items() if name != "id"}
    rows = [about | {"ood": name} | metrics for name, metrics in of_set.items()]
    if len(rows) > 1:
        mean = {metric: float(np.mean([row[metric] for row in rows])) for metric in _SHOWN}
        counts = {"n_id": len(scores["id"]), "n_ood": sum(row["n_ood"] for row in rows)}
        rows.append(about | {"ood": "average"} | counts | mean)
    return rows
