"""The held-out split: which ID rows train, which select, which calibrate; the same for every method and seed.

Rows are held out per class by the hash of their image, where there are classes (of images without labels all rows are
as of one), so that renaming, reordering or adding images of other classes changes nothing, and identical images stand
on the same side. Held-out rows are halved, again by hash: *select* (early stopping, difficulty, head strength, k) and
*calibrate* (standardisation, calibration over experts, thresholds). An odd row of a class is dealt over the whole set,
so that both halves have rows however few a class has.

Where a class would have fewer than `MIN_ROWS` rows in a half, the whole share selects and the other rows are
cross-fitted: K models, each without a part of them that it calibrates, and a final model of all of them. Every model,
the final one too, is made by the same rule: groups, statistics and weights of its own training rows, settings by the
select rows. So no row that calibrates a model had a say in it, and the final model has the rows that it has where
halves are large enough.

A fold's model has two thirds of the rows that the final one has, and new rows lie farther from it. Calibration scores
must be those that the final model would give to new rows, so what is cheap to fit again (heads, banks, means,
covariances) is fitted once for each *part*: on all rows but a few of one fold, one of a class at most wherever the
class is small. That is as good as leaving out one row at a time. Experts are too dear for it: those of the part's fold,
which saw none of its rows, stand in for the final ones.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cache import arrays_sha256

MIN_ROWS = 3
CROSS_FITTING_FOLDS = 3
N_PARTS = 21  # 7 of each fold: what is fitted without one has 95 % of the rows

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Fold:
    """Rows of one model: of id-train for `train`, of the held-out set for `select` and `calibrate`; none in two."""

    train: Rows
    select: Rows
    calibrate: Rows


@dataclass(frozen=True)
class Part:
    """Calibration rows that are left out together, and the number of the fold that they calibrate."""

    fold: int
    rows: Rows


@dataclass(frozen=True)
class Split:
    """Folds, and which rows the final model is made of.

    Attributes:
        held_out: the role of the set that `select` and `calibrate` rows belong to.
        folds: one for a held-out split; K for cross-fitting, with the same select rows.
        final_train: training rows of the final model; it is the only fold's model where there is one fold.
        rule: what was done, in words, for the record.
        parts: every row of `final_train` once, under cross-fitting; none where the final model leaves rows to calibrate
            on.
    """

    held_out: Literal["id-train", "id-val"]
    folds: tuple[Fold, ...]
    final_train: Rows
    rule: str
    parts: tuple[Part, ...] = ()

    @property
    def cross_fitted(self) -> bool:
        """Whether the final model is another than the folds'."""
        return len(self.folds) > 1

    @property
    def select(self) -> Rows:
        """Rows that every model, the final one too, is selected on; none was trained on any."""
        return self.folds[0].select

    @property
    def digest(self) -> str:
        """Digest of all its rows."""
        rows = {"final": self.final_train}
        for index, fold in enumerate(self.folds):
            rows |= {f"{index}/{name}": own for name, own in vars(fold).items()}
        rows |= {f"part {index}": part.rows for index, part in enumerate(self.parts)}
        return arrays_sha256(rows)

    def without(self, part: Part) -> Rows:
        """Rows that the final model is made of, without those of a part, ascending."""
        return np.setdiff1d(self.final_train, part.rows, assume_unique=True)


def split_rows(labels: NDArray[np.int32], image_hashes: NDArray[np.uint8], val: float, cross_fit: bool = True) -> Split:
    """Split id-train where no set is id-val.

    Args:
        labels: ``[N]`` class of each row; one for all where there are no labels.
        image_hashes: ``[N, 32]`` SHA-256 of each image.
        val: share of each class to hold out.
        cross_fit: False where a backbone is trained on these rows (fine-tuning): features of rows that it has seen
            are not those of new ones, so a held-out share must stay unseen however small the classes are.
    """
    keys = _keys(image_hashes, b"held-out")
    out = _place_in_class(labels, keys) < val
    select, calibrate = _halves(np.flatnonzero(out), labels, image_hashes)
    scarce = _scarce(labels, select, calibrate)
    share = f"{val:g} of id-train{' per class' if len(np.unique(labels)) > 1 else ''} by image hash"
    if not cross_fit or not scarce:
        train = np.flatnonzero(~out)
        rule = f"held-out split: {share}, halved into select and calibrate{scarce}"
        return Split("id-train", (Fold(train, select, calibrate),), train, rule)
    select = _without_last_two(np.flatnonzero(out), labels, keys)
    rest = np.setdiff1d(np.arange(len(labels)), select)
    place = _place_in_class(labels[rest], [keys[row] for row in rest])
    number = np.minimum((place * CROSS_FITTING_FOLDS).astype(int), CROSS_FITTING_FOLDS - 1)
    folds = tuple(Fold(rest[number != k], select, rest[number == k]) for k in np.unique(number))
    dealt = (_dealt(fold.calibrate, labels, image_hashes, N_PARTS // CROSS_FITTING_FOLDS) for fold in folds)
    parts = tuple(Part(index, rows) for index, own in enumerate(dealt) for rows in own)
    rule = (
        f"cross-fitting: {share} selects, {len(folds)} folds of the rest calibrate "
        f"(a half of that share would have fewer than {MIN_ROWS} rows of a class), banks and heads leave out "
        f"{len(parts)} parts in turn"
    )
    return Split("id-train", folds, rest, rule, parts)


def split_with_validation_set(n_train: int, val_labels: NDArray[np.int32], val_hashes: NDArray[np.uint8]) -> Split:
    """Split where a set has the role id-val: all of id-train trains, the set's rows are halved."""
    select, calibrate = _halves(np.arange(len(val_labels)), val_labels, val_hashes)
    train = np.arange(n_train)
    rule = f"id-val, halved into select and calibrate by image hash{_scarce(val_labels, select, calibrate)}"
    return Split("id-val", (Fold(train, select, calibrate),), train, rule)


def _keys(image_hashes: NDArray[np.uint8], salt: bytes) -> list[bytes]:
    return [hashlib.sha256(salt + row.tobytes()).digest() for row in image_hashes]


def rows_by_class(labels: NDArray[np.integer]) -> Iterator[tuple[int, Rows]]:
    """Each class that there is, ascending, with its rows in their order; one sort, however many classes.

    >>> [(label, rows.tolist()) for label, rows in rows_by_class(np.array([5, 2, 5]))]
    [(2, [1]), (5, [0, 2])]
    """
    order = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[order], return_index=True)
    return zip(classes.tolist(), np.split(order, starts)[1:], strict=True)


def _place_in_class(labels: NDArray[np.int32], keys: list[bytes], offset: float = 0.0) -> NDArray[np.float64]:
    """Relative place in [0, 1) of each row among its class's distinct images, ordered by key.

    An image that stands in several classes has one place, the lowest, or its copies would come apart. With an `offset`
    of ½ it is the middle of the image's share of the class, without one its beginning.
    """
    place: dict[bytes, float] = {}
    for _, rows in rows_by_class(labels):
        ordered = sorted({keys[row] for row in rows.tolist()})
        for index, key in enumerate(ordered):
            place[key] = min((index + offset) / len(ordered), place.get(key, 1.0))
    return np.array([place[key] for key in keys])


def _halves(rows: Rows, labels: NDArray[np.int32], image_hashes: NDArray[np.uint8]) -> tuple[Rows, Rows]:
    """Each class halved; images in the middle of a class with an odd number of them go to the two halves in turn."""
    keys = _keys(image_hashes[rows], b"halves")
    place = _place_in_class(labels[rows], keys, offset=0.5)
    middle = sorted({keys[index] for index in np.flatnonzero(place == 0.5)})
    in_turn = set(middle[::2])
    first = (place < 0.5) | np.fromiter((key in in_turn for key in keys), dtype=bool, count=len(keys))
    return rows[first], rows[~first]


def _scarce(labels: NDArray[np.int32], select: Rows, calibrate: Rows) -> str:
    """What to say where a half has fewer than `MIN_ROWS` rows of a class; empty where it need not be said."""
    n_classes = labels.max(initial=0) + 1
    counts = [np.bincount(labels[rows], minlength=n_classes)[np.unique(labels)] for rows in (select, calibrate)]
    fewest = min(int(count.min(initial=MIN_ROWS)) for count in counts)
    return f" ({fewest} of a class in the smaller half)" if fewest < MIN_ROWS else ""


def _without_last_two(rows: Rows, labels: NDArray[np.int32], keys: list[bytes]) -> Rows:
    """Rows but for the last two images of each class: one is left to train on while the other calibrates."""
    images: dict[int, set[bytes]] = {}
    for label, key in zip(labels.tolist(), keys, strict=True):
        images.setdefault(label, set()).add(key)
    kept = {key for own in images.values() for key in sorted(own)[-2:]}
    return np.array([row for row in rows if keys[row] not in kept], dtype=np.int64)


def _dealt(rows: Rows, labels: NDArray[np.int32], image_hashes: NDArray[np.uint8], n: int) -> list[Rows]:
    """Rows dealt image by image and class by class to n parts, or fewer where there are fewer images.

    So many consecutive images come apart, those of a class first of all. Classes come in the order of their first key:
    their numbers change nothing.
    """
    keys = _keys(image_hashes[rows], b"parts")
    of_class: dict[int, list[bytes]] = {}
    for key, label in sorted(zip(keys, labels[rows].tolist(), strict=True)):
        of_class.setdefault(label, []).append(key)
    order = dict.fromkeys(key for own in sorted(of_class.values()) for key in own)
    place = {key: index % n for index, key in enumerate(order)}
    number = np.array([place[key] for key in keys])
    return [rows[number == part] for part in range(min(n, len(order)))]
