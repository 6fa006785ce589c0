"""Whether features can be right at all: three looks at a sealed cache that cost seconds.

A wrong mean, a wrong crop or weights that were never loaded give features without an error, and scores that look like
results. Neighbours of one class and rows that differ are the least that features must show. An image that stands in a
set twice counts twice, and under two labels one of them is wrong: both are told, neither is an error.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache import FeatureCache
from stages.errors import InputError
from stages.id_data.overlap import first_alike
from stages.id_data.rows import labels_in, lazy_rows, unit
from stages.inputs.images.names import listed
from stages.scorers.neighbours.bank import FeatureBank

NEIGHBOURS = 5
MOST_ROWS = 10_000  # the figure is then good to half a per cent
SAME_SHARE = 1 / 3
# A third of three images is one, which says nothing, and a small folder may well hold a picture two or three times; ten
# equal rows that are a third of all are no accident. Weights that say nothing are told from ten images on.
LEAST_SAME = 10

VOTE_K, VOTE_TEMPERATURE = 20, 0.07  # of `knn_accuracy`
_VOTED = 1 << 14  # rows at once


def check_features(cache: FeatureCache, by_class: bool, most_rows: int = MOST_ROWS) -> list[str]:
    """Look at the class embeddings of a cache.

    Args:
        cache: sealed; labels need not be known.
        by_class: whether its labels are classes that features must tell apart, as those of id-train.
        most_rows: drawn where there are more.

    Returns:
        With `by_class` and at least two classes, a line with the leave-one-out 5-NN accuracy of ``cls`` beside chance
        (the share of the largest class); and a line that begins with "warning:" for each thing that looks wrong.
    """
    rows = np.arange(cache.n_rows)
    if len(rows) > most_rows:
        rows = np.sort(np.random.default_rng(0).choice(rows, most_rows, replace=False))
    features, name, lines = cache.read("cls", rows), cache.manifest.dataset, list[str]()
    same = _most_identical(features)
    if same >= max(LEAST_SAME, SAME_SHARE * len(rows)):
        lines.append(
            f"warning: {name}: {100 * same / len(rows):.0f} % of the rows are identical: look at the images, weights "
            "and transform"
        )
    labels = cache.labels[rows]
    features, labels = features[labels >= 0], labels[labels >= 0]
    if not by_class or len(np.unique(labels)) < 2 or len(labels) <= NEIGHBOURS:
        return lines
    accuracy, chance = leave_one_out_accuracy(features, labels), np.bincount(labels).max() / len(labels)
    drawn = f" of {cache.n_rows}" if len(rows) < cache.n_rows else ""
    lines.append(
        f"{name}: leave-one-out {NEIGHBOURS}-NN accuracy of cls {100 * accuracy:.1f} % on {len(labels)}{drawn} rows, "
        f"chance {100 * chance:.1f} %"
    )
    # Three standard deviations of a guess that is right as often as chance.
    if accuracy < chance + 3 * np.sqrt(chance * (1 - chance) / len(labels)):
        lines.append(
            f"warning: {name}: neighbours are hardly of one class more often than by chance: look at the labels, "
            "weights and transform"
        )
    return lines


class SameBytes(NamedTuple):
    """A row whose image has the bytes of an earlier one of its set: a copy, a link, another path to one file."""

    id: str
    label: str | None  # its class, where it is known
    same_as: str  # the first row of these bytes
    same_as_label: str | None

    @property
    def in_conflict(self) -> bool:
        """Whether the two have different classes."""
        return self.label is not None and self.same_as_label is not None and self.label != self.same_as_label


def find_same_bytes(cache: FeatureCache) -> list[SameBytes]:
    """Rows of a cache whose images, or rows of arrays, have equal bytes."""
    earlier = first_alike(cache.image_hashes)
    rows = np.flatnonzero(earlier != np.arange(len(earlier))).tolist()
    names, labels, ids = (*cache.class_names, None), cache.labels, cache.ids  # label -1, unknown, takes the last name
    return [
        SameBytes(str(ids[row]), names[labels[row]], str(ids[one]), names[labels[one]])
        for row, one in zip(rows, earlier[rows].tolist(), strict=True)
    ]


def same_bytes_notes(cache: FeatureCache, same: Sequence[SameBytes], where: str) -> list[str]:
    """A line for label conflicts and one for the other rows of equal bytes, each with the first few by name.

    Args:
        cache: whose rows they are.
        same: of `find_same_bytes`.
        where: all of them are listed.
    """
    name, rows, lines = cache.manifest.dataset, f"{unit(cache)}s", []
    if conflicts := [row for row in same if row.in_conflict]:
        pairs = [f"{c.same_as!r} ({c.same_as_label}) = {c.id!r} ({c.label})" for c in conflicts]
        lines.append(
            f"warning: {name}: {len(conflicts)} {rows} have the bytes of another under another label "
            f"({listed(pairs)}): one of the two is wrong; all in {where}"
        )
    if copies := [row for row in same if not row.in_conflict]:
        pairs = [f"{row.same_as!r} = {row.id!r}" for row in copies]
        lines.append(f"{name}: {len(copies)} {rows} have the bytes of another ({listed(pairs)}); all in {where}")
    return lines


def leave_one_out_accuracy(features: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Share of rows whose nearest other rows are mostly of their class; of equal counts, the nearest neighbour's wins.

    Args:
        features: [n, D], n greater than `NEIGHBOURS`.
        labels: [n], at least 0.
    """
    _, neighbours = FeatureBank(features).search(features, NEIGHBOURS, exclude_self=True)
    votes = labels[neighbours]  # (n, 5), nearest first
    counts = (votes[:, :, None] == votes[:, None, :]).sum(2)
    winner = votes[np.arange(len(votes)), counts.argmax(1)]  # argmax: the first, so the nearest, of the most
    return float((winner == labels).mean())


def knn_accuracy(train: FeatureCache, test: FeatureCache) -> float:
    """Share of test rows whose class their neighbours among the training rows vote for, as DINOv2 reports it.

    Cosine among ``cls``, `VOTE_K` neighbours, a vote of exp(cos / `VOTE_TEMPERATURE`) each (Wu et al., CVPR 2018; Caron
    et al., DINO, ICCV 2021; 20 is what DINOv2 calls best). Of equal votes the class that stands first wins.

    Args:
        train: its labelled rows vote, all of them.
        test: its labelled rows are judged.

    Raises:
        InputError: no labelled rows, or classes that the training rows do not have.
    """
    names = train.class_names
    given, labels = np.asarray(train.labels), labels_in(test, names, partly=True)
    voters, judged = np.flatnonzero(given >= 0), np.flatnonzero(labels >= 0)
    if not len(voters) or not len(judged):
        raise InputError(f"kNN accuracy: no row of {(train if not len(voters) else test).manifest.dataset} has a label")
    bank = FeatureBank(lazy_rows(train, "cls", train.spec.cls_dim)[voters])
    n_right, k = 0, min(VOTE_K, len(voters))
    for start in range(0, len(judged), _VOTED):
        rows = judged[start : start + _VOTED]
        distances, found = bank.search(test.read("cls", rows), k)
        weights = np.exp((1 - distances.astype(np.float64) ** 2 / 2 - 1) / VOTE_TEMPERATURE)  # at most 1
        votes = np.zeros((len(rows), len(names)))
        np.add.at(votes, (np.arange(len(rows))[:, None], given[voters][found]), weights)
        n_right += int(np.count_nonzero(votes.argmax(1) == labels[rows]))
    return n_right / len(judged)


def _most_identical(features: NDArray[np.floating]) -> int:
    """Size of the largest group of equal rows."""
    rows = np.ascontiguousarray(features).view(np.dtype((np.void, features.shape[1] * features.itemsize))).ravel()
    return int(np.unique(rows, return_counts=True)[1].max(initial=0))
