"""Classes to groups: (balanced) k-means on class prototypes, or the user's file."""

import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.errors import InputError
from stages.files.regular import check_regular
from stages.id_data.rows import IdData, read_blocks
from stages.id_data.split import Rows
from stages.inputs.images.names import listed, match_classes, shown, unlike

BALANCED_STARTS = 10
_UNTIL_IT_ENDS = 1_000_000  # Lloyd's rounds get better or end


def experts_for(n_classes: int) -> int:
    """E for ``experts = "auto"``.

    The paper takes 4 groups for 100 classes and 7 for 1,000, a line in log₁₀ C; at least two classes an expert.
    """
    return max(1, min(max(2, round(3 * np.log10(n_classes) - 2)), n_classes // 2))


def class_prototypes(
    blocks: Iterable[tuple[NDArray[np.floating], NDArray[np.integer]]], n_classes: int
) -> NDArray[np.float64]:
    """Mean feature of each class, ``[C, D]``, from blocks of training rows: (features ``[n, D]``, labels ``[n]``)."""
    sums: NDArray[np.float64] | None = None
    counts = np.zeros(n_classes, dtype=np.int64)
    for features, labels in blocks:
        sums = np.zeros((n_classes, features.shape[1])) if sums is None else sums
        sums = _with_rows(sums, features, labels)
        counts += np.bincount(labels, minlength=n_classes)
    if sums is None:
        raise ValueError("no rows to make prototypes of")
    return sums / np.maximum(counts, 1)[:, None]


def _with_rows(
    sums: NDArray[np.float64], features: NDArray[np.floating], labels: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Sums ``[C, D]`` with each row added to its class's, one after the other: ``numpy.add.at`` to the bit.

    That takes as many calls as there are numbers; a product with a sparse matrix of ones adds in the same order.
    """
    from scipy.sparse import csr_array  # not before something is trained

    n_classes = len(sums)
    of_class = np.concatenate([np.arange(n_classes), labels])  # what was summed before comes first
    order = np.argsort(of_class, kind="stable")
    ends = np.cumsum(np.bincount(of_class, minlength=n_classes))
    ones = csr_array((np.ones(len(order)), order, np.append(0, ends)), shape=(n_classes, len(order)))
    found: NDArray[np.float64] = ones @ np.concatenate([sums, features])
    return found


def group_training_classes(data: IdData, rows: Rows, n_groups: int, method: str, seed: int) -> list[int]:
    """Group of each class by the frozen ``cls`` of a model's own training rows; see `group_classes`."""
    blocks = read_blocks(data.train, "cls", rows)
    prototypes = class_prototypes(((values, data.train_labels[rows]) for rows, values in blocks), data.n_classes)
    return group_classes(prototypes, n_groups, method, data.class_names, seed)


def numbers_as_in(groups: Sequence[int], reference: Sequence[int]) -> list[int]:
    """``[E]`` a number for each group, such that as many classes as can be stand in a group numbered as in `reference`.

    Args:
        groups: ``[C]`` of each class, 0 to E − 1.
        reference: ``[C]`` the same of another grouping; groups beyond E have no counterpart.

    >>> numbers_as_in([0, 0, 1, 1, 2], [2, 2, 0, 1, 1])
    [2, 0, 1]
    """
    from scipy.optimize import linear_sum_assignment  # not before something is trained

    n_groups = max(groups) + 1
    shared = np.zeros((n_groups, max(*reference, n_groups) + 1), dtype=np.int64)
    np.add.at(shared, (np.asarray(groups), np.asarray(reference)), 1)
    numbers: list[int] = linear_sum_assignment(shared[:, :n_groups], maximize=True)[1].tolist()
    return numbers


def grouping_content(method: str) -> str:
    """What a grouping is, for the identity of what is made with it: a file by its text, else its name."""
    path = Path(method)
    return path.read_text(encoding="utf-8") if path.is_file() else method


def group_classes(
    prototypes: NDArray[np.floating], n_groups: int, method: str, class_names: tuple[str, ...], seed: int
) -> list[int]:
    """Group of each class, 0 to E − 1, numbered by first appearance; deterministic for a seed.

    Args:
        prototypes: ``[C, D]``.
        n_groups: E; with a file its own number of groups counts.
        method: ``"balanced"``, ``"kmeans"`` or the path of a JSON file ``{class: group}``.
        class_names: of the C classes.
        seed: of the k-means initialisation.

    Raises:
        InputError: more groups than classes; a file that cannot be read, misses a class or names an unknown one.
    """
    if (given := check_groups(n_groups, method, class_names)) is not None:
        return _renumber(given)
    from sklearn.cluster import KMeans  # seconds, for those alone who group
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Prototypes of fewer than E places make fewer clusters; balanced groups are filled all the same.
        warnings.simplefilter("ignore", ConvergenceWarning)
        if method == "kmeans":
            return _renumber(
                KMeans(n_groups, n_init=10, max_iter=_UNTIL_IT_ENDS, random_state=seed).fit(prototypes).labels_.tolist()
            )
        # Balancing ends near where it starts, and the best unbalanced start is not the best to balance.
        starts = np.random.default_rng(seed).integers(2**31, size=BALANCED_STARTS).tolist()
        found = [
            _balance(
                prototypes,
                KMeans(n_groups, n_init=1, max_iter=_UNTIL_IT_ENDS, random_state=s).fit(prototypes).cluster_centers_,
            )
            for s in starts
        ]
    return _renumber(min(found, key=lambda groups: squared_distance(prototypes, groups)).tolist())


def check_groups(n_groups: int, method: str, class_names: tuple[str, ...]) -> list[object] | None:
    """The group of each class where a file gives it; None where groups are still to be found.

    Args:
        n_groups: E.
        method: see `group_classes`.
        class_names: of the C classes.

    Raises:
        InputError: more groups than classes; a file that cannot be read, misses a class or names an unknown one.
    """
    if method not in ("balanced", "kmeans"):
        return _from_file(Path(method), class_names)
    if n_groups > len(class_names):
        raise InputError(
            f"train.experts: {n_groups} experts for {len(class_names)} classes: give at most {len(class_names)}"
        )
    return None


def squared_distance(points: NDArray[np.floating], groups: NDArray[np.integer]) -> float:
    """Sum over all points of the squared distance to the mean of their group."""
    return sum(float(((own - own.mean(0)) ** 2).sum()) for own in (points[groups == g] for g in np.unique(groups)))


def _balance(points: NDArray[np.floating], centers: NDArray[np.floating]) -> NDArray[np.int64]:
    """Balanced k-means: each round assigns points to ⌈C/E⌉ or ⌊C/E⌋ seats a centre at least total squared distance.

    It ends where a round is not better than the one before: there are finitely many assignments.
    """
    from scipy.optimize import linear_sum_assignment

    n, k = len(points), len(centers)
    seats = np.arange(n) % k  # the first n mod k centres have one seat more
    best, distance = np.full(n, -1), np.inf
    while True:
        cost = ((points[:, None] - centers[None]) ** 2).sum(-1)
        assignment = seats[linear_sum_assignment(cost[:, seats])[1]]
        if (assignment == best).all() or not (found := squared_distance(points, assignment)) < distance:
            return best
        best, distance = assignment, found
        centers = np.stack([points[assignment == group].mean(0) for group in range(k)])


def _from_file(path: Path, class_names: tuple[str, ...]) -> list[object]:
    try:
        check_regular(path)
        stored = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"train.grouping: {path} cannot be read as JSON {{class: group}}: {error}") from error
    if not isinstance(stored, dict):
        raise InputError(f"train.grouping: {path} must hold an object {{class: group}}")
    places = match_classes(list(stored), class_names)
    missing = [shown(name) for place, name in enumerate(class_names) if place not in places]
    unknown = [name for name, place in zip(stored, places, strict=True) if place < 0]
    problems = [f"{len(missing)} classes without a group: {listed(missing)}"] if missing else []
    if unknown:
        problems.append(f"{len(unknown)} names that are no class: {unlike(unknown, class_names, 'the study')}")
    if problems:
        raise InputError(f"train.grouping: {path}: {'; '.join(problems)}")
    if len(set(places)) < len(places):
        twice = [name for name, place in zip(stored, places, strict=True) if places.count(place) > 1]
        raise InputError(f"train.grouping: {path}: {listed(list(map(shown, twice)))} are one class: name it once")
    for name, group in stored.items():
        if not isinstance(group, str | int):
            raise InputError(
                f"train.grouping: {path}: {name!r} has the group {json.dumps(group)}: give a name or a number"
            )
    groups = list(stored.values())
    return [groups[places.index(place)] for place in range(len(class_names))]


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; one that names a class twice is an error, not its last word."""
    stored: dict[str, object] = {}
    for name, group in pairs:
        if name in stored:
            raise ValueError(f"{name!r} is named twice")
        stored[name] = group
    return stored


def _renumber(groups: list[object]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(str(group), len(numbers)) for group in groups]
