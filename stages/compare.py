"""Scores of one's own arrays, without caches and stages: `compare_scores`, for notebooks and scripts."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from stages.config import TAKEN_NAMES, Profile
from stages.detection.calibration import Standardiser, sum_scores
from stages.errors import InputError
from stages.heads.affine import LinearHead
from stages.id_data.clusters import Clusters, find_clusters, first_by_hash
from stages.inputs.images.names import beyond_classes, class_order, class_texts, match_classes, tidy, unlike
from stages.metrics.ranking import METRICS, ood_metrics
from stages.scorers import get_scorer, scorer_class
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer

Array = Any  # what numpy makes an array of: arrays, nested lists, tensors of torch on any device
_Rows = ScoreInputs | Mapping[str, Array] | Array
_Scores = Mapping[str, Mapping[str, Any]] | Sequence[str] | str
_KNOWN = {"features", "logits", "labels"}


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare_scores` found; printing it gives a table in per cent.

    Attributes:
        rows: a row a score and OOD set, and its unweighted mean over the sets as ``average``: ``score``, ``params``,
            ``ood``, ``n_id``, ``n_ood`` and the metrics of `stages.metrics.ranking.OODMetrics`, fractions.
        scores: score -> set (``"id"``, and each OOD set) -> [n] float32; higher = more OOD.
        notes: lines worth saying of the fits, which stand below the table.
    """

    rows: list[dict[str, Any]]
    scores: dict[str, dict[str, NDArray[np.float32]]]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = ["| score | ood | " + " | ".join(METRICS) + " |", "|---|---|" + "---:|" * len(METRICS)]
        for row in self.rows:
            cells = " | ".join(f"{100 * row[metric]:.2f}" for metric in METRICS)
            lines.append(f"| {row['score']} | {row['ood']} | {cells} |")
        lines += ["", *self.notes] if self.notes else []
        return "\n".join(lines)

    _repr_markdown_ = __str__  # notebooks show it as a table


def compare_scores(
    train: _Rows,
    test: _Rows,
    ood: Mapping[str, _Rows] | _Rows,
    scores: _Scores = ("knn",),
    *,
    held_out: _Rows | None = None,
    head: tuple[Array, Array] | None = None,
    profile: Profile = "paper",
) -> Comparison:
    """Fit scores on ID training rows, and tell ID test rows from OOD rows with each.

    Rows are features [n, D], or a mapping with any of ``features``, ``logits`` [n, C] and ``labels`` [n] (of ID rows:
    class numbers from 0, or names; negative, empty, None and NaN: unknown), or `ScoreInputs`. Arrays may be nested
    lists or tensors, on any device and of any float type.

    Args:
        train: ID training rows. Many scores need their labels; where there are none, and no logits or head, clusters of
            the features stand for classes (`stages.id_data.clusters`). A mapping may have ``class_names`` as well,
            those of the C classes in the order of logits and head; needed where labels are names and there are any.
        test: ID test rows.
        ood: OOD rows by the name of their set; rows alone are one set, ``"ood"``.
        scores: names of `stages.scorers.SCORERS`, or sums such as ``"knn+energy"``; or one of them; or a mapping of
            them to their settings as `Comparison.rows` has them, those of a sum by part:
            ``{"knn": {"k": 10}, "knn+energy": {"knn": {"k": 10}}}``.
        held_out: ID rows of neither; sums are standardised on them, and some scores choose a setting by them.
        head: weight [C, D] and bias [C] of a linear head; it gives the logits where rows have none.
        profile: whose defaults, where implementations differ.

    Raises:
        InputError: no OOD set, no score, an unknown one or setting, rows that lack what a score needs, or are none.

    >>> rng = np.random.default_rng(0)
    >>> blob = lambda centre: centre + rng.normal(size=(50, 4))
    >>> found = compare_scores(blob([9, 0, 0, 0]), blob([9, 0, 0, 0]), {"far": blob([0, 9, 0, 0])}, ["knn"])
    >>> found.rows[0]["score"], found.rows[0]["auroc"], found.scores["knn"]["far"].shape
    ('knn', 1.0, (50,))
    """
    asked = _settings_by_part(scores)
    if not asked:
        raise InputError("scores: none is asked for")
    classifier = None if head is None else _head(head)
    train, class_names = _without_class_names(train)
    given = {"train": train, "test": test} | ({} if held_out is None else {"held_out": held_out})
    read = {who: _read(who, rows) for who, rows in given.items()}
    oods = {name: _read(f"ood {name!r}", rows) for name, rows in _ood_sets(ood).items()}
    _check_widths(read | {f"ood {name!r}": rows for name, rows in oods.items()})
    number = _Classes(read["train"], classifier, class_names)
    fitting, test_rows, *others = (number.inputs(who, rows) for who, rows in read.items())
    needs = frozenset().union(*(scorer_class(part).needs for parts in asked.values() for part in parts))
    clusters = _clusters_of(fitting) if "labels" in needs else None
    fitting = _labelled(fitting, clusters)
    select = _labelled(others[0], clusters) if others else None
    sets = {"id": test_rows} | {name: number.inputs(name, rows, of_id=False) for name, rows in oods.items()}

    fitted: dict[str, _Fitted] = {}  # by name and settings: one in a sum as well is fitted and scored once
    by_score: dict[str, list[_Fitted]] = {}
    for score, parts in asked.items():
        for part, settings in parts.items():
            key = f"{part} {sorted(settings.items())}"
            if key not in fitted:
                fitted[key] = _Fitted.of(get_scorer(part, profile, **settings).fit(fitting, select), sets)
            by_score.setdefault(score, []).append(fitted[key])
    found = {
        score: _sums(score, parts, select) if len(parts) > 1 else parts[0].scores for score, parts in by_score.items()
    }
    rows = [row for score, parts in by_score.items() for row in _metrics(score, parts, found[score])]
    notes = [] if clusters is None else [f"train has no labels: {len(clusters)} clusters of it stand for classes"]
    notes += [f"{each.scorer.name}: {remark}" for each in fitted.values() for remark in each.scorer.remarks()]
    sums = [score for score, parts in by_score.items() if len(parts) > 1]
    notes += [f"{score}: {said}" for score in sums if select is not None and (said := Standardiser.remark(len(select)))]
    return Comparison(rows, found, list(dict.fromkeys(notes)))


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A fitted score and what it says of each set, [n] each."""

    scorer: Scorer
    scores: dict[str, NDArray[np.float32]]

    @classmethod
    def of(cls, scorer: Scorer, sets: Mapping[str, ScoreInputs]) -> Self:
        return cls(scorer, {name: scorer.score(x) for name, x in sets.items()})


def _settings_by_part(scores: _Scores) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Settings of each part of each score that is asked for."""
    names = [scores] if isinstance(scores, str) else scores
    given: Mapping[str, Mapping[str, Any]] = names if isinstance(names, Mapping) else {name: {} for name in names}
    found = {}
    for score, settings in given.items():
        parts = score.split("+")
        by_part = {score: settings} if len(parts) == 1 else settings
        if unknown := by_part.keys() - set(parts):
            raise InputError(f"{score}: settings of {min(unknown)!r} given, which is none of its parts")
        found[score] = {part: by_part.get(part, {}) for part in parts}
    return found


def _without_class_names(train: Any) -> tuple[Any, Sequence[str] | None]:
    """Training rows, and the names of the classes that came with them."""
    if not isinstance(train, Mapping):
        return train, None
    return {name: rows for name, rows in train.items() if name != "class_names"}, train.get("class_names")


def _ood_sets(ood: Any) -> dict[str, Any]:
    """OOD rows by the name of their set."""
    if ood is None or (isinstance(ood, Mapping) and not ood):
        raise InputError("compare_scores needs an OOD set to tell ID rows from, none given")
    if not isinstance(ood, Mapping) or ood.keys() <= _KNOWN:
        return {"ood": ood}
    for name in ood:
        if not isinstance(name, str) or name in TAKEN_NAMES:
            why = "a word of the result's own" if isinstance(name, str) else "which is no text"
            raise InputError(f"an OOD set is called {name!r}, {why}: give it another name")
    return dict(ood)


def _read(who: str, rows: Any) -> ScoreInputs | dict[str, NDArray[Any]]:
    """The arrays of some rows, each of the kind that it must be."""
    if isinstance(rows, ScoreInputs):
        return rows
    named = dict(rows) if isinstance(rows, Mapping) else {"features": rows}
    if unknown := [name for name in named if name not in _KNOWN]:
        raise InputError(f"{who}: rows have {unknown[0]!r}; known are features, logits and labels")
    arrays = {name: _array(who, name, value) for name, value in named.items() if value is not None}
    if not arrays:
        raise InputError(f"{who}: no rows given: give features [n, D], or a mapping of features, logits and labels")
    for name, array in arrays.items():
        axes = 1 if name == "labels" else 2
        if array.ndim != axes or not all(array.shape):
            raise InputError(f"{who}: {name} has shape {array.shape}, must be {'[n]' if axes == 1 else '[n, values]'}")
    return arrays


def _array(who: str, name: str, value: Any) -> NDArray[Any]:
    if hasattr(value, "detach"):  # a tensor of torch, which need not be imported for it
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{who}: {name} is no array: {str(error).splitlines()[0]}") from error
    if name != "labels" and array.dtype.kind not in "fiu":
        hint = ": load the file first, as by numpy.load" if array.dtype.kind == "U" and not array.ndim else ""
        raise InputError(f"{who}: {name} is a {type(value).__name__} of {array.dtype}, must be numbers{hint}")
    return array if array.dtype.kind == "f" or name == "labels" else array.astype(np.float32)


def _head(head: Any) -> LinearHead:
    """A linear head, of a pair or of a layer that has both."""
    if hasattr(head, "weight") and hasattr(head, "bias"):
        head = (head.weight, np.zeros(len(head.weight), np.float32) if head.bias is None else head.bias)
    if not isinstance(head, Sequence) or len(head) != 2:
        raise InputError(f"head is a {type(head).__name__}, must be a pair: weight [C, D] and bias [C]")
    weight, bias = (_array("head", name, part) for name, part in zip(("weight", "bias"), head, strict=True))
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise InputError(f"head has weight {list(weight.shape)} and bias {list(bias.shape)}, must be [C, D] and [C]")
    return LinearHead(weight, bias)


def _check_widths(sets: Mapping[str, ScoreInputs | dict[str, NDArray[Any]]]) -> None:
    """Refuse sets whose features or logits are of another length than those of the training rows."""
    for name in ("features", "logits"):
        widths = {who: rows[name].shape[1] for who, rows in sets.items() if isinstance(rows, dict) and name in rows}
        for who, width in widths.items():
            if width != widths.get("train", width):
                raise InputError(f"{who}: {name} have {width} values a row, those of train {widths['train']}")


class _Classes:
    """The classes of the ID rows: their numbers, where labels are names.

    Args:
        train: ID training rows.
        head: the linear head, if there is one.
        names: of the classes, by number, if they are given.
    """

    def __init__(
        self, train: ScoreInputs | dict[str, NDArray[Any]], head: LinearHead | None, names: Sequence[str] | None
    ) -> None:
        logits = train.get("logits") if isinstance(train, dict) else None
        self._n = logits.shape[1] if logits is not None else None if head is None else len(head.bias)
        self._head = head
        self._names = None if names is None else tuple(map(tidy, names))
        if self._names is not None and len(set(self._names)) != (self._n or len(self._names)):
            raise InputError(f"class_names has {len(set(self._names))} names for {self._n} classes: name each once")
        labels = train.get("labels") if isinstance(train, dict) else None
        if names is None and labels is not None and _are_names(labels):
            if self._n is not None:
                raise InputError(
                    f"train: labels are names: give class_names, the names of the {self._n} classes in the order of "
                    "logits and head"
                )
            self._names = class_order({tidy(text) for text in class_texts("train", labels) if text is not None})

    def inputs(self, who: str, rows: ScoreInputs | dict[str, NDArray[Any]], of_id: bool = True) -> ScoreInputs:
        """Rows as scores take them; labels are those of ID rows alone."""
        if isinstance(rows, ScoreInputs):
            return rows
        arrays: dict[str, Any] = {name: array for name, array in rows.items() if name != "labels"}
        if not arrays:
            raise InputError(f"{who}: labels alone are no rows: give features or logits")
        if of_id and "labels" in rows:
            arrays["labels"] = self._numbers(who, rows["labels"])
        return ScoreInputs(**arrays, head=self._head)

    def _numbers(self, who: str, labels: NDArray[Any]) -> NDArray[np.int64]:
        if _are_names(labels):
            texts = class_texts(who, labels)
            if self._names is None:
                raise InputError(f"{who}: labels are names, those of train are not: give class_names, or numbers")
            own = sorted({text for text in texts if text is not None})
            place = dict(zip(own, match_classes(own, self._names), strict=True))
            if absent := [name for name, number in place.items() if number < 0]:
                raise InputError(
                    f"{who}: labels that train or class_names do not have: {unlike(absent, self._names, 'train')}"
                )
            return np.array([-1 if text is None else place[text] for text in texts], np.int64)
        if labels.dtype.kind not in "iu":
            labels = np.array([-1 if text is None else int(text) for text in class_texts(who, labels)], np.int64)
        numbers = labels.astype(np.int64)
        if self._n is not None and (numbers >= self._n).any():
            raise beyond_classes(who, numbers, self._n, "classes", "the classes are")
        return numbers


def _clusters_of(train: ScoreInputs) -> Clusters | None:
    """What stands for classes; None where rows have labels, classes by their logits, or make no two clusters."""
    if train.labels is not None or train.features is None or train.has("logits"):
        return None
    features = train.need("features", "clustering")
    hashes = np.array([list(hashlib.sha256(row.tobytes()).digest()) for row in features], np.uint8)
    sample = first_by_hash(np.arange(len(features)), hashes)
    found = find_clusters(features[sample], hashes[sample])
    return found if len(found) > 1 else None


def _labelled(rows: ScoreInputs, clusters: Clusters | None) -> ScoreInputs:
    """The same rows, each of the cluster that it is nearest to, where clusters stand for classes."""
    if clusters is None or rows.features is None:
        return rows
    return replace(rows, labels=clusters.of(rows.need("features", "clustering")))


def _are_names(labels: NDArray[Any]) -> bool:
    return labels.dtype.kind in "US" or any(isinstance(label, str | bytes) for label in labels.tolist())


def _sums(score: str, parts: Sequence[_Fitted], select: ScoreInputs | None) -> dict[str, NDArray[np.float32]]:
    """Scores of each set, each part in standard deviations of the held-out rows."""
    if select is None:
        raise InputError(f"{score}: a sum is standardised on held-out ID rows: give held_out")
    scales = [Standardiser.fit(part.scorer.score(select)) for part in parts]
    return {name: sum_scores([part.scores[name] for part in parts], scales) for name in parts[0].scores}


def _metrics(score: str, parts: Sequence[_Fitted], scores: Mapping[str, NDArray[np.float32]]) -> list[dict[str, Any]]:
    """A row an OOD set, and their mean where there are several."""
    settings = {part.scorer.name: part.scorer.params() for part in parts}
    about = {"score": score, "params": settings if len(parts) > 1 else settings[score]}
    of_set = {name: asdict(ood_metrics(scores["id"], other)) for name, other in scores.items() if name != "id"}
    rows = [about | {"ood": name} | metrics for name, metrics in of_set.items()]
    if len(rows) > 1:
        mean = {metric: float(np.mean([row[metric] for row in rows])) for metric in METRICS}
        counts = {"n_id": len(scores["id"]), "n_ood": sum(row["n_ood"] for row in rows)}
        rows.append(about | {"ood": "average"} | counts | mean)
    return rows
