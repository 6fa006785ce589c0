"""What stage two and three know of the ID data: sealed caches, labels in the study's classes, and the split."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cache import FeatureCache
from stages.backbone import Tokens
from stages.errors import InputError
from stages.split import Fold, Rows, Split, split_rows, split_with_validation_set

Labels = NDArray[np.int32]


@dataclass(frozen=True)
class IdData:
    """ID features to train and to select on.

    Attributes:
        train: cache of the id-train set.
        train_labels: ``[N]`` class of each of its rows.
        held_out: cache that the split's `select` and `calibrate` rows belong to: id-val's, or again id-train's.
        held_out_labels: ``[N']`` class of each of its rows.
        class_names: the C classes, in the order of their numbers.
        split: which rows train, select and calibrate.
    """

    train: FeatureCache
    train_labels: Labels
    held_out: FeatureCache
    held_out_labels: Labels
    class_names: tuple[str, ...]
    split: Split

    @property
    def n_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def identity(self) -> dict[str, str]:
        """What the features are and how they are split: part of the identity of everything trained on them."""
        return {"id-train": self.train.identity, "held-out": self.held_out.identity, "split": self.split.rule}

    def runs(self) -> list[tuple[str, Fold]]:
        """Models to fit before the final one: (name, rows)."""
        if not self.split.cross_fitted:
            return [("final", self.split.folds[0])]
        return [(f"fold-{index}", fold) for index, fold in enumerate(self.split.folds)]

    def train_rows(self) -> dict[str, Rows]:
        """Training rows of every model, the final one's last."""
        return {name: fold.train for name, fold in self.runs()} | {"final": self.split.final_train}


def id_data(train: FeatureCache, val: FeatureCache | None, val_share: float, cross_fit: bool = True) -> IdData:
    """Open the ID side of a study.

    Args:
        train: cache of the id-train set; every row needs a label.
        val: cache of the id-val set, if the study has one.
        val_share: share of id-train to hold out where there is no id-val set.
        cross_fit: see `stages.split.split_rows`.

    Raises:
        InputError: unlabelled rows, fewer than two classes, classes with too few rows, labels that id-train lacks.
    """
    labels = np.asarray(train.labels)
    names = train.class_names
    if (labels < 0).any():
        raise InputError(
            f"id-train set {train.manifest.dataset!r}: {(labels < 0).sum()} of {len(labels)} images have no label: "
            "give a folder per class, or a list with labels"
        )
    counts = np.bincount(labels, minlength=len(names))
    used = np.flatnonzero(counts)
    if len(used) < 2:
        raise InputError(
            f"id-train set {train.manifest.dataset!r} has {len(used)} class with images: at least 2 are needed"
        )
    names = tuple(names[index] for index in used)
    labels = np.searchsorted(used, labels).astype(np.int32)
    if val is None:
        split = split_rows(labels, train.image_hashes, val_share, cross_fit)
        held_out, held_labels = train, labels
    else:
        held_out, held_labels = val, labels_in(val, names)
        split = split_with_validation_set(len(labels), held_labels, val.image_hashes)
    for fold in split.folds:
        few = np.flatnonzero(np.bincount(labels[fold.train], minlength=len(names)) == 0)
        if len(few):
            raise InputError(
                f"id-train set {train.manifest.dataset!r}: class {names[few[0]]!r} has {counts[used[few[0]]]} "
                f"image(s), too few to hold some out ({len(few)} such class(es)): give more, or leave the class out"
            )
    return IdData(train, labels, held_out, held_labels, names, split)


def labels_in(cache: FeatureCache, class_names: Sequence[str]) -> Labels:
    """Labels of another ID set as numbers of the study's classes, matched by name.

    Raises:
        InputError: rows without label or of a class that id-train does not have.
    """
    number = {name: index for index, name in enumerate(class_names)}
    own = np.asarray([number.get(name, -1) for name in cache.class_names] + [-1], dtype=np.int32)
    labels: Labels = own[np.asarray(cache.labels)]  # label -1, unknown, takes the last entry
    if (labels < 0).any():
        unknown = [name for name in cache.class_names if name not in number]
        what = f"classes that id-train does not have: {', '.join(unknown[:5])}" if unknown else "no label"
        raise InputError(f"set {cache.manifest.dataset!r}: {(labels < 0).sum()} of {len(labels)} images have {what}")
    return labels


def read_tokens(cache: FeatureCache, rows: Rows | slice, device: str | torch.device = "cpu") -> Tokens:
    """Rows of a cache as float32 `Tokens`; what the cache does not hold has length 0."""

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(cache.read(name, rows), dtype=np.float32)).to(device)

    cls, tap_cls = read("cls"), read("tap_cls")
    absent = tap_cls[:, None][:, :0]
    stored = cache.spec.datasets()
    registers = read("registers") if "registers" in stored else absent
    patches = read("patches") if "patches" in stored else absent
    return Tokens(cls, tap_cls, registers, patches)
