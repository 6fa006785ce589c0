"""Which rows of a study a pilot has, and how large a pilot is."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from numpy.typing import NDArray

from pipeline.config import RunConfig, SetConfig
from pipeline.planning.size import StudySize, experts_of
from stages.id_data.split import MIN_ROWS, rows_by_class
from stages.inputs.images import SampleTable
from stages.inputs.images.names import match_classes

_TEST_ROWS = 24  # of a test set, at least
_FEWEST_OF_CLASS = 16  # rows, where nothing else asks for more: enough for a share to be held out
_ROWS = 600  # of id-train in the larger pilot, about


@dataclass(frozen=True)
class PilotScale:
    """How large a pilot is.

    Attributes:
        classes: of id-train; 0 where there are none.
        per_class: rows of each, at most.
        share: of a test set's rows.
    """

    classes: int
    per_class: int
    share: float


@dataclass(frozen=True, eq=False)
class PilotSet:
    """Rows of one set that a pilot has; a smaller pilot has the first of them.

    Attributes:
        rows: ``[n]`` their numbers in the set; where there is no set yet, places in a drawn one.
        ids: of the rows.
        labels: ``[n]`` int32, into `class_names`; −1 where a set needs none.
        class_names: of the pilot's classes.
        place: ``[n]`` how many rows of the same class stand before each.
        wanted: ``[n]`` the number of each among all that are wanted of the set.
    """

    rows: NDArray[np.int64]
    ids: tuple[str, ...]
    labels: NDArray[np.int32]
    class_names: tuple[str, ...]
    place: NDArray[np.int64]
    wanted: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, places: NDArray[np.integer]) -> "PilotSet":
        """Some of the rows."""
        ids = tuple(self.ids[place] for place in places)
        own = (self.place[places], self.wanted[places])
        return PilotSet(self.rows[places], ids, self.labels[places], self.class_names, *own)


def scales(config: RunConfig, size: StudySize) -> tuple[PilotScale, PilotScale]:
    """A small pilot and a larger one.

    Classes keep enough rows to be split by the same rule as the study's, and there are two for each expert.
    """
    (train,) = config.sets_of("id-train")
    n = size.rows[train.name]
    if not size.n_classes:
        few, many = min(n, _ROWS // 3), min(n, _ROWS)
        return PilotScale(0, few, few / n), PilotScale(0, many, many / n)
    least = _FEWEST_OF_CLASS
    if not config.sets_of("id-val") and not size.is_cross_fitted(config):
        least = ceil(2 * (MIN_ROWS + 1) / config.split.val)
    per_class = min(size.per_class, least)
    experts = max(experts_of(variant, size.n_classes) for variant in config.variant_configs().values())
    fewest = min(size.n_classes, max(2 * experts, 4))
    classes = min(size.n_classes, max(2 * fewest, _ROWS // per_class))
    more = min(size.per_class, max(per_class, _ROWS // classes))
    few, many = fewest * per_class, classes * more
    return PilotScale(fewest, per_class, min(1.0, few / n)), PilotScale(classes, more, min(1.0, many / n))


def between(small: PilotScale, large: PilotScale, times: float) -> PilotScale:
    """A scale of so many times the rows of the small one, or the large one where that has fewer.

    >>> between(PilotScale(4, 30, 0.1), PilotScale(20, 30, 0.5), 3.0)
    PilotScale(classes=12, per_class=30, share=0.3)
    """
    if large.classes * large.per_class <= times * small.classes * small.per_class:
        return large
    classes = min(large.classes, int(times * small.classes))
    per_class = min(large.per_class, int(times * small.classes * small.per_class / max(classes, 1)))
    of_large = classes * per_class / (large.classes * large.per_class)
    return PilotScale(classes, per_class, round(large.share * of_large, 9))


def pilot_sets(
    config: RunConfig, size: StudySize, tables: Mapping[str, SampleTable], scale: PilotScale
) -> dict[str, PilotSet]:
    """Rows of every set, spread over all of it, those of id-train class by class.

    Args:
        config: the study.
        size: of its sets.
        tables: what they hold, by their names; none where they are drawn.
        scale: of the larger pilot.
    """
    (train,) = config.sets_of("id-train")
    first = _of_classes(tables.get(train.name), size, scale)
    chosen = {train.name: first}
    for entry in config.sets:
        if entry is not train:
            n = _n_tests(size.rows[entry.name], scale)
            chosen[entry.name] = _others(entry, tables.get(entry.name), size.rows[entry.name], n, first.class_names)
    return chosen


def smaller(sets: Mapping[str, PilotSet], config: RunConfig, size: StudySize, scale: PilotScale) -> dict[str, PilotSet]:
    """The first of these rows that make a pilot of another scale."""
    (train,) = config.sets_of("id-train")
    names = sets[train.name].class_names[: scale.classes]
    found = {}
    for name, own in sets.items():
        if name == train.name:
            known = np.flatnonzero((own.labels < max(scale.classes, 1)) & (own.place < scale.per_class))
        else:
            known = np.flatnonzero(own.labels < max(scale.classes, 1))[: _n_tests(size.rows[name], scale)]
        found[name] = replace(own.at(known), class_names=names if own.class_names else ())
    return found


def _n_tests(n: int, scale: PilotScale) -> int:
    return min(n, max(_TEST_ROWS, round(n * scale.share)))


def _of_classes(table: SampleTable | None, size: StudySize, scale: PilotScale) -> PilotSet:
    if table is None:
        labels = np.tile(np.arange(scale.classes, dtype=np.int32), scale.per_class)
        place = np.repeat(np.arange(scale.per_class), scale.classes)
        ids = tuple(f"{label}/{number}" for label, number in zip(labels, place, strict=True))
        names = tuple(f"class-{number:05d}" for number in range(scale.classes))
        return PilotSet(np.arange(len(ids)), ids, labels, names, place, np.arange(len(ids)))
    if not scale.classes:
        rows = _spread(len(table), scale.per_class)
        return _listed(table, rows, np.full(len(rows), -1, np.int32), (), np.arange(len(rows)))
    used = [(label, rows) for label, rows in rows_by_class(table.labels) if label >= 0]
    chosen = [used[number] for number in _spread(len(used), scale.classes)]
    own = [rows[_spread(len(rows), scale.per_class)] for _, rows in chosen]
    at = [(place, number) for number, rows in enumerate(own) for place in range(len(rows))]
    at.sort()  # class after class in turn, so that the first rows have all of them
    rows = np.array([own[number][place] for place, number in at], np.int64)
    labels = np.array([number for _, number in at], np.int32)
    names = tuple(table.class_names[label] for label, _ in chosen)
    return _listed(table, rows, labels, names, np.array([place for place, _ in at]))


def _others(entry: SetConfig, table: SampleTable | None, n: int, wanted: int, names: tuple[str, ...]) -> PilotSet:
    known = entry.role in ("id-val", "id-test", "cs-id") and bool(names)
    if table is None:
        labels = np.arange(wanted, dtype=np.int32) % len(names) if known else np.full(wanted, -1, np.int32)
        ids = tuple(f"{entry.name}/{number}" for number in range(wanted))
        own_names, place = names if known else (), np.zeros(wanted, np.int64)
        return PilotSet(np.arange(wanted), ids, labels, own_names, place, np.arange(wanted))
    if not known or (table.labels < 0).all():
        rows = _spread(n, wanted)
        return _listed(table, rows, np.full(len(rows), -1, np.int32), (), np.zeros(len(rows), np.int64))
    places = np.array([*match_classes(table.class_names, names), -1], np.int32)[table.labels]
    own = np.flatnonzero(places >= 0)
    rows = own[_spread(len(own), max(wanted, len(names)))]
    rows = rows[np.argsort(_turns(places[rows]), kind="stable")]
    return _listed(table, rows, places[rows], names, np.zeros(len(rows), np.int64))


def _turns(labels: NDArray[np.int32]) -> NDArray[np.int64]:
    """``[n]`` how many rows of the same class stand before each."""
    found = np.zeros(len(labels), np.int64)
    for _, rows in rows_by_class(labels):
        found[rows] = np.arange(len(rows))
    return found


def _listed(
    table: SampleTable,
    rows: NDArray[np.int64],
    labels: NDArray[np.int32],
    names: tuple[str, ...],
    place: NDArray[np.int64],
) -> PilotSet:
    ids = tuple(table.ids[row] for row in rows)
    return PilotSet(rows, ids, labels, names, place, np.arange(len(rows)))


def _spread(n: int, wanted: int) -> NDArray[np.int64]:
    """So many numbers below n, or all, ascending and as far apart as can be.

    >>> _spread(10, 4).tolist(), _spread(2, 4).tolist()
    ([0, 2, 5, 7], [0, 1])
    """
    wanted = min(n, wanted)
    return np.arange(wanted, dtype=np.int64) * n // max(wanted, 1)
