"""The held-out split: which ID rows train, which select, which calibrate; the same for every method and seed.

Rows are held out per class by the hash of their image, so that renaming, reordering or adding images of other classes
changes nothing, and identical images stand on the same side. Held-out rows are halved, again by hash: *select* (early
stopping, head strength, k) and *calibrate* (standardisation, calibration over experts, thresholds). Where a class would
have fewer than `MIN_ROWS` rows in a half, cross-fitting on id-train does both: K models, each calibrated and
selected on the rows that it did not see, and a final model of all rows with the settings so chosen.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

MIN_ROWS = 3
CROSS_FITTING_FOLDS = 3

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Fold:
    """Rows of one model: of id-train for `train`, of the held-out set for `select` and `calibrate`."""

    train: Rows
    select: Rows
    calibrate: Rows


@dataclass(frozen=True)
class Split:
    """Folds, and which rows the final model is made of.

    Attributes:
        held_out: the role of the set that `select` and `calibrate` rows belong to.
        folds: one for a held-out split; K for cross-fitting.
        final_train: training rows of the final model; it is the only fold's model where there is one fold.
        rule: what was done, in words, for the record.
    """

    held_out: Literal["id-train", "id-val"]
    folds: tuple[Fold, ...]
    final_train: Rows
    rule: str

    @property
    def cross_fitted(self) -> bool:
        """Whether the final model is another than the folds'."""
        return len(self.folds) > 1


def split_rows(labels: NDArray[np.int32], image_hashes: NDArray[np.uint8], val: float, cross_fit: bool = True) -> Split:
    """Split id-train where no set is id-val.

    Args:
        labels: ``[N]`` class of each row.
        image_hashes: ``[N, 32]`` SHA-256 of each image.
        val: share of each class to hold out.
        cross_fit: False where one model has been trained already (a fine-tuned backbone): small classes then use
            the whole held-out share for both purposes.
    """
    position = _position_in_class(labels, _keys(image_hashes, b"held-out"))
    held_out = position < val
    train, out = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    select, calibrate = _halves(out, labels, image_hashes)
    classes = np.unique(labels)
    counts = [np.bincount(labels[rows], minlength=classes.max() + 1)[classes] for rows in (select, calibrate)]
    if min(count.min() for count in counts) >= MIN_ROWS:
        rule = f"held-out split: {val:g} of id-train per class by image hash, halved into select and calibrate"
        return Split("id-train", (Fold(train, select, calibrate),), train, rule)
    if not cross_fit:
        rule = f"held-out split: {val:g} of id-train per class by image hash; too few to halve, used for both purposes"
        return Split("id-train", (Fold(train, out, out),), train, rule)
    number = np.minimum((position * CROSS_FITTING_FOLDS).astype(int), CROSS_FITTING_FOLDS - 1)
    parts = [np.flatnonzero(number == k) for k in range(CROSS_FITTING_FOLDS)]
    folds = tuple(Fold(np.flatnonzero(number != k), part, part) for k, part in enumerate(parts) if len(part))
    rule = (
        f"cross-fitting: {len(folds)} folds of id-train per class by image hash (a held-out share of {val:g} would "
        f"leave a class fewer than {MIN_ROWS} rows to select or to calibrate on)"
    )
    return Split("id-train", folds, np.arange(len(labels)), rule)


def split_with_validation_set(n_train: int, val_labels: NDArray[np.int32], val_hashes: NDArray[np.uint8]) -> Split:
    """Split where a set has the role id-val: all of id-train trains, the set's rows are halved."""
    select, calibrate = _halves(np.arange(len(val_labels)), val_labels, val_hashes)
    train = np.arange(n_train)
    return Split(
        "id-val", (Fold(train, select, calibrate),), train, "id-val, halved into select and calibrate by image hash"
    )


def _keys(image_hashes: NDArray[np.uint8], salt: bytes) -> list[bytes]:
    return [hashlib.sha256(salt + row.tobytes()).digest() for row in image_hashes]


def _position_in_class(labels: NDArray[np.int32], keys: list[bytes]) -> NDArray[np.float64]:
    """Relative place in [0, 1) of each row among its class's distinct images, ordered by key.

    An image that stands in several classes has one place, the lowest, or its copies would come apart.
    """
    position: dict[bytes, float] = {}
    for label in np.unique(labels):
        ordered = sorted({keys[row] for row in np.flatnonzero(labels == label)})
        for place, key in enumerate(ordered):
            position[key] = min(place / len(ordered), position.get(key, 1.0))
    return np.array([position[key] for key in keys])


def _halves(rows: Rows, labels: NDArray[np.int32], image_hashes: NDArray[np.uint8]) -> tuple[Rows, Rows]:
    place = _position_in_class(labels[rows], _keys(image_hashes[rows], b"halves"))
    return rows[place < 0.5], rows[place >= 0.5]
