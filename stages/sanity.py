"""Whether features can be right at all: two looks at a sealed cache that cost seconds.

A wrong mean, a wrong crop or weights that were never loaded give features without an error, and scores that look like
results. Neighbours of one class and rows that differ are the least that features must show.
"""

import numpy as np
from numpy.typing import NDArray

from cache import FeatureCache
from stages.bank import FeatureBank

NEIGHBOURS = 5
MOST_ROWS = 10_000  # drawn where there are more: the figure is then good to half a per cent
SAME_SHARE = 1 / 3


def check_features(cache: FeatureCache, by_class: bool) -> list[str]:
    """Look at the class embeddings of a cache.

    Args:
        cache: sealed; labels need not be known.
        by_class: whether its labels are classes that features must tell apart, as those of id-train.

    Returns:
        With `by_class` and at least two classes, a line with the leave-one-out 5-NN accuracy of ``cls`` beside chance
        (the share of the largest class); and a line that begins with "warning:" for each thing that looks wrong.
    """
    rows = np.arange(cache.n_rows)
    if len(rows) > MOST_ROWS:
        rows = np.sort(np.random.default_rng(0).choice(rows, MOST_ROWS, replace=False))
    features, name, lines = cache.read("cls", rows), cache.manifest.dataset, list[str]()
    if len(rows) >= 3 and (share := _largest_share(features)) >= SAME_SHARE:
        lines.append(
            f"warning: {name}: {100 * share:.0f} % of the rows are identical: look at the images, weights and transform"
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


def _largest_share(features: NDArray[np.floating]) -> float:
    rows = np.ascontiguousarray(features).view(np.dtype((np.void, features.shape[1] * features.itemsize))).ravel()
    return float(np.unique(rows, return_counts=True)[1].max() / len(rows))
