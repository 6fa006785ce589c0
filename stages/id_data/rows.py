"""What stage two and three know of the ID data: sealed caches, labels in the study's classes, and the split."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cache import FeatureCache, arrays_sha256
from stages.errors import InputError
from stages.id_data.clusters import Clusters, find_clusters, first_by_hash
from stages.id_data.lazy import LazyArray, RowNumbers
from stages.id_data.split import Fold, Rows, Split, split_rows, split_with_validation_set
from stages.inputs.images.names import match_classes, unlike

_FEW = 3  # rows of a class
Labels = NDArray[np.int32]
Labelling = Literal["given", "clusters"]


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
        labels: whose the classes are: ``given``, or ``clusters`` of the rows that stand for them where none are.
    """

    train: FeatureCache
    train_labels: Labels
    held_out: FeatureCache
    held_out_labels: Labels
    class_names: tuple[str, ...]
    split: Split
    labels: Labelling = "given"

    @property
    def n_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def identity(self) -> dict[str, Any]:
        """By its bytes what all that is trained on these rows is made of: features, names of the classes, split."""
        own = {"train": self.train_labels, "held-out": self.held_out_labels}
        return ({} if self.labels == "given" else {"clusters": arrays_sha256(own)}) | {
            "id-train": self.train.digest,
            "held-out": self.held_out.digest,
            "classes": list(self.class_names),
            "split": self.split.rule,
            "rows": self.split.digest,
        }

    def runs(self) -> list[tuple[str, Fold]]:
        """Models that calibrate: (name, rows); the final one alone where it leaves rows to calibrate on."""
        if not self.split.cross_fitted:
            return [("final", self.split.folds[0])]
        return [(f"fold-{index}", fold) for index, fold in enumerate(self.split.folds)]

    def train_rows(self) -> dict[str, Rows]:
        """Training rows of every model, the final one's last."""
        return {name: fold.train for name, fold in self.runs()} | {"final": self.split.final_train}


def id_data(
    train: FeatureCache,
    val: FeatureCache | None,
    val_share: float,
    cross_fit: bool = True,
    classes_of: IdData | None = None,
) -> IdData:
    """Open the ID side of a study.

    Where id-train has no labels, or one class, clusters of its features stand for classes (`stages.id_data.clusters`):
    found on training rows, and every other row is of the nearest. Rows are then held out by image hash alone.

    Args:
        train: cache of the id-train set; every row has a label, or none has.
        val: cache of the id-val set, if the study has one.
        val_share: share of id-train to hold out where there is no id-val set.
        cross_fit: see `stages.id_data.split.split_rows`.
        classes_of: what other features make of the same images, whose clusters these rows are to have as well.

    Raises:
        InputError: some rows without a label, classes with too few rows, labels that id-train lacks; rows that make no
            two clusters where there are no labels.
    """
    labels = np.asarray(train.labels)
    names = train.class_names
    if not has_classes(labels):
        return _without_classes(train, val, val_share, cross_fit, classes_of)
    if len(without := np.flatnonzero(labels < 0)):
        how = "give a folder per class, or a list with labels" if unit(train) == "image" else "give label"
        raise InputError(f"id-train set {train.manifest.dataset!r}: {_some(train, without)} have no label: {how}")
    counts = np.bincount(labels, minlength=len(names))
    used = np.flatnonzero(counts)
    names = tuple(names[index] for index in used)
    labels = np.searchsorted(used, labels).astype(np.int32)
    if val is None:
        split = split_rows(labels, train.image_hashes, val_share, cross_fit)
        held_out, held_labels = train, labels
    else:
        held_out, held_labels = val, labels_in(val, names)
        split = split_with_validation_set(len(labels), held_labels, val.image_hashes)
    _check_folds(split, labels, names, train.manifest.dataset, unit(train))
    return IdData(train, labels, held_out, held_labels, names, split)


def has_classes(labels: Labels) -> bool:
    """Whether rows of id-train ``[N]`` have classes to tell apart; not where all are of one, or none has a label."""
    return bool((labels != labels[:1]).any())


def _without_classes(
    train: FeatureCache, val: FeatureCache | None, val_share: float, cross_fit: bool, classes_of: IdData | None
) -> IdData:
    alone, held_out = np.zeros(train.n_rows, np.int32), train if val is None else val
    if val is None:
        split = split_rows(alone, train.image_hashes, val_share, cross_fit)
    else:
        split = split_with_validation_set(len(alone), np.zeros(val.n_rows, np.int32), val.image_hashes)
    _check_folds(split, alone, ("all",), train.manifest.dataset, unit(train))
    if classes_of is None:
        found = _clustered(_Unlabelled(train.digest, held_out.digest, split.digest, train, held_out, split))
        names, labels, held_labels = found.clusters.names, found.train, found.held_out
    else:
        names = classes_of.class_names
        labels = _by_id(train, classes_of.train, classes_of.train_labels)
        held_labels = labels if val is None else _by_id(val, classes_of.held_out, classes_of.held_out_labels)
    split = replace(split, rule=f"{split.rule}; no classes to tell apart, {len(names)} clusters of cls stand for them")
    _check_folds(split, labels, names, train.manifest.dataset, unit(train))
    return IdData(train, labels, held_out, held_labels, names, split, "clusters")


@dataclass(frozen=True)
class _Unlabelled:
    """Rows to be clustered, the same where their digests are."""

    train_digest: str
    held_out_digest: str
    split_digest: str
    train: FeatureCache = field(compare=False)
    held_out: FeatureCache = field(compare=False)
    split: Split = field(compare=False)


@dataclass(frozen=True, eq=False)
class _Clustered:
    """Clusters, and which of them every row is of."""

    clusters: Clusters
    train: Labels
    held_out: Labels


@lru_cache(maxsize=8)  # a verb opens the same data many times
def _clustered(rows: _Unlabelled) -> _Clustered:
    train, hashes = rows.train, rows.train.image_hashes
    sample = first_by_hash(rows.split.final_train, hashes)
    features = np.concatenate([values for _, values in read_blocks(train, "cls", sample)])
    clusters = find_clusters(features, hashes[sample])
    if len(clusters) < 2:
        raise InputError(
            f"id-train set {train.manifest.dataset!r}: its {train.n_rows} {unit(train)}s have no classes to tell "
            "apart, and are too few or too much alike for clusters to stand for them: give more that differ, or labels"
        )
    labels = _nearest_of(clusters, train)
    return _Clustered(clusters, labels, labels if rows.held_out is train else _nearest_of(clusters, rows.held_out))


def _nearest_of(clusters: Clusters, cache: FeatureCache) -> Labels:
    blocks = read_blocks(cache, "cls", np.arange(cache.n_rows))
    return np.concatenate([np.zeros(0, np.int32), *(clusters.of(values) for _, values in blocks)])


def _by_id(cache: FeatureCache, known: FeatureCache, labels: Labels) -> Labels:
    """Classes of rows, as the rows of the same images have them in another cache."""
    of_id = dict(zip(known.ids.tolist(), labels.tolist(), strict=True))
    if absent := [row for row, name in enumerate(cache.ids.tolist()) if name not in of_id]:
        raise InputError(f"{cache.path}: {_some(cache, np.asarray(absent))} are not in {known.path}: run make extract")
    return np.array([of_id[name] for name in cache.ids.tolist()], np.int32)


def check_split(
    dataset: str,
    class_names: Sequence[str],
    labels: Labels,
    val_labels: Labels | None,
    val_share: float,
    cross_fit: bool = True,
    what: str = "image",
) -> int:
    """Refuse classes of which nothing can be held out, before their images are read: the listing alone is known.

    Args:
        dataset: name of the id-train set.
        class_names: of the C classes that have images.
        labels: ``[N]`` class of each image, 0 to C − 1.
        val_labels: of the images of the id-val set, if the study has one.
        val_share: share of id-train to hold out where there is none.
        cross_fit: see `stages.id_data.split.split_rows`.
        what: a row is to people, see `unit`.

    Returns:
        How many images train the first fold's model, if all of them differ and can be used.

    Raises:
        InputError: classes or an id-val set with too few images.
    """
    if val_labels is not None:
        split = split_with_validation_set(len(labels), val_labels, _any_hashes(len(val_labels)))
        _check_folds(split, labels, class_names, dataset, what)
        return len(labels)
    # Which image is held out says its hash; how many are, their number alone: two classes of each size, the middles of
    # which go to different halves, stand for all.
    sizes, first, classes = np.unique(np.bincount(labels), return_index=True, return_counts=True)
    shown = np.minimum(classes, 2)
    alike = np.concatenate([[n - 1, 1] if n > 1 else [1] for n in classes])
    of_size = np.repeat(np.arange(len(alike), dtype=np.int32), np.repeat(sizes, shown))
    split = split_rows(of_size, _any_hashes(len(of_size)), val_share, cross_fit)
    _check_folds(
        split, of_size, [class_names[place] for place in np.repeat(first, shown).tolist()], dataset, what, alike
    )
    return int(np.bincount(of_size[split.folds[0].train], minlength=len(alike)) @ alike)


def _any_hashes(n: int) -> NDArray[np.uint8]:
    """``[n, 32]`` of which no two are alike."""
    return np.arange(4 * n, dtype=np.uint64).view(np.uint8).reshape(n, 32)


def _check_folds(
    split: Split,
    labels: Labels,
    names: Sequence[str],
    dataset: str,
    what: str,
    alike: NDArray[np.integer] | None = None,
) -> None:
    """Refuse folds that lack a class to train on, or rows to hold out; `alike` says how many each class stands for."""
    for fold in split.folds:
        if len(few := np.flatnonzero(np.bincount(labels[fold.train], minlength=len(names)) == 0)):
            n = len(few) if alike is None else int(alike[few].sum())
            rows = np.count_nonzero(labels == few[0])
            why = "too few to hold some out"
            if rows > _FEW:
                why = "none of which is left to train on: the same bytes stay together, or split.val is too large"
            raise InputError(
                f"id-train set {dataset!r}: class {names[few[0]]!r} has {rows} {what}(s), {why} ({n} such class(es)): "
                "give more, or leave the class out"
            )
        if len(fold.select) and len(fold.calibrate):
            continue
        if split.held_out == "id-val":
            raise InputError(
                f"the id-val set has {len(fold.select)} {what}(s), too few to halve into those that select and those "
                "that calibrate: give it two or more, or leave the set out"
            )
        raise InputError(
            f"id-train set {dataset!r}: no {what} is left to {'calibrate' if len(fold.select) else 'select'} on: give "
            f"3 different {what}s of a class or more, or an id-val set"
        )


def labels_in(cache: FeatureCache, class_names: Sequence[str], partly: bool = False) -> Labels:
    """Labels of another ID set as numbers of the study's classes, matched by name.

    Args:
        cache: of the set.
        class_names: of the study.
        partly: whether rows may have no label; theirs is -1.

    Raises:
        InputError: rows without label, or of a class that id-train does not have.
    """
    places = match_classes(cache.class_names, class_names)
    given = np.asarray(cache.labels)
    if len(without := np.flatnonzero(given < 0)) and not partly:
        raise InputError(f"set {cache.manifest.dataset!r}: {_some(cache, without)} have no label")
    labels: Labels = np.asarray([*places, -1], np.int32)[given]  # -1, no label, is the last place
    if len(others := np.flatnonzero((labels < 0) & (given >= 0))):
        unknown = [cache.class_names[number] for number in np.unique(given[others])]
        raise InputError(
            f"set {cache.manifest.dataset!r}: {_some(cache, others)} have classes that id-train does not have: "
            f"{unlike(unknown, class_names)}"
        )
    return labels


def labels_of_test(cache: FeatureCache, data: IdData, partly: bool = False) -> Labels:
    """Labels of ID test rows as numbers of the study's classes; -1 where these are clusters, or no row has a label.

    Args:
        cache: of the set.
        data: of the study.
        partly: whether some rows may have no label.

    Raises:
        InputError: some rows without label, or of a class that id-train does not have.
    """
    if data.labels == "clusters" or (np.asarray(cache.labels) < 0).all():
        return np.full(cache.n_rows, -1, np.int32)
    return labels_in(cache, data.class_names, partly)


def _some(cache: FeatureCache, rows: Rows) -> str:
    """How many rows of a cache, and the first of them by name."""
    return f"{len(rows)} of {cache.n_rows} {unit(cache)}s (the first: {str(cache.ids[rows[0]])!r})"


def unit(cache: FeatureCache) -> str:
    """What a row is to people: an ``image``, or a ``row`` of arrays that were computed elsewhere."""
    return "row" if cache.spec.origin else "image"


def read_blocks(cache: FeatureCache, name: str, rows: Rows) -> Iterator[tuple[Rows, NDArray[np.float32]]]:
    """Walk over one feature of some rows: (row numbers, float32 values), a few thousand at a time.

    Raises:
        InputError: a value that is not finite, naming the image.
    """
    for block in cache.batches([name], rows, batch_size=4096):
        values = block[name].astype(np.float32)
        if not np.isfinite(values).all():
            raise not_finite(cache, block["row"], values, name)
        yield block["row"], values


def lazy_rows(cache: FeatureCache, name: str, dim: int) -> LazyArray:
    """One feature of all rows ``[N, dim]``, float32, read when they are asked for."""
    return LazyArray(partial(_read_float32, cache, name), cache.n_rows, dim)


def _read_float32(cache: FeatureCache, name: str, rows: RowNumbers) -> NDArray[np.float32]:
    return np.asarray(cache.read(name, rows), dtype=np.float32)


def not_finite(cache: FeatureCache, rows: Rows, values: NDArray[np.floating], name: str) -> InputError:
    """The error that names the first of some rows whose values are not finite."""
    row = rows[~np.isfinite(values).reshape(len(rows), -1).all(1)][0]
    return InputError(
        f"set {cache.manifest.dataset!r}: {name} of {unit(cache)} {str(cache.ids[row])!r} is not finite: "
        f"leave the {unit(cache)} out, or remove {cache.path} and extract again"
    )


WINDOW_BYTES = 1 << 30


def epoch_windows(
    rows: Rows, shard_starts: Sequence[int], row_bytes: int, rng: np.random.Generator, window_bytes: int = WINDOW_BYTES
) -> list[Rows]:
    """An epoch's order, such that a cache larger than memory is read a window at a time.

    Shards are shuffled, consecutive ones make a window as long as their rows fit into it (one shard at least), and the
    rows of each window are shuffled. Where all fits into one window, that is a permutation of all rows.

    Args:
        rows: to order, each once.
        shard_starts: first row of each shard of the cache, ascending.
        row_bytes: what is read for one row.
        rng: shuffles.
        window_bytes: size of a window.
    """
    shard = np.searchsorted(np.asarray(shard_starts), rows, "right") - 1
    by_shard = [rows[shard == number] for number in rng.permutation(np.unique(shard))]
    windows: list[list[Rows]] = [[]]
    size = 0
    for part in by_shard:
        nbytes = len(part) * row_bytes
        if windows[-1] and size + nbytes > window_bytes:
            windows.append([])
            size = 0
        windows[-1].append(part)
        size += nbytes
    return [rng.permutation(np.concatenate(window)) for window in windows if window]
