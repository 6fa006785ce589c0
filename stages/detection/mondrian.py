"""The same promises within groups of images, by predicted class or by expert (Mondrian conformal prediction).

A group has a p-value among its own calibration rows, so that of *each* group's ID images at most a share α has p ≤ α,
where one set of calibration rows for all promises it of their mixture alone. Groups of few rows share theirs.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.detection.conformal import ThresholdEstimate, conformal_p_values, rows_for_threshold, threshold_at
from stages.errors import InputError
from stages.metrics.ranking import checked_scores

LEAST_ROWS = rows_for_threshold(0.95)  # with which a group has a threshold of its own


class GroupedCalibration:
    """Calibration scores by group.

    **What is merged.** The new image is counted into its group. Then groups of at most `least` rows make one cell, and
    where that cell has no more, the next smallest groups join it until it has. So a group of `least` calibration rows
    or more stands alone but where others need it, and an image of any other is compared with the rows of all small
    groups. The partition depends on how many rows each group has, the new one among them, and not on which is the new
    one. Within a cell rows are therefore exchangeable: a p-value promises for its cell what one without groups does for
    all, however groups were merged (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005).

    Groups must come to calibration rows as they come to new ones: classes as predicted, never as labelled.

    Args:
        scores: ``[n]`` of the calibration rows, higher = more OOD.
        group: ``[n]`` group of each.
        n_groups: groups are 0 … n_groups − 1.
        least: rows that a group needs to stand alone, at least 1.

    Raises:
        InputError: no rows, NaN or inf, a group that there is not, `least` below 1.
    """

    def __init__(self, scores: ArrayLike, group: NDArray[np.integer], n_groups: int, least: int = LEAST_ROWS) -> None:
        if least < 1:
            raise InputError(f"least = {least} given, a group needs at least 1 row")
        self._scores = checked_scores(scores, "calibration")
        self._group = _checked_group(group, len(self._scores), n_groups)
        self._least = least
        self.counts = np.bincount(self._group, minlength=n_groups)

    def cell(self, group: int) -> NDArray[np.int64]:
        """Groups whose calibration rows an image of a group is compared with, ascending.

        >>> calibration = GroupedCalibration(np.arange(9), np.array([0, 0, 0, 0, 0, 1, 1, 2, 3]), n_groups=5, least=3)
        >>> [calibration.cell(group).tolist() for group in range(5)]
        [[0], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]
        """
        counts = self.counts.copy()
        counts[group] += 1
        order = np.argsort(counts, kind="stable")
        small = int(np.count_nonzero(counts <= self._least))
        while 0 < small < len(order) and counts[order[:small]].sum() <= self._least:
            small += 1
        shared = order[:small]
        return np.sort(shared) if group in shared else np.array([group])

    def rows(self, group: int) -> NDArray[np.float64]:
        """Calibration scores that an image of a group is compared with, one at least."""
        return self._scores[np.isin(self._group, self.cell(group))]

    def p_values(self, scores: ArrayLike, group: NDArray[np.integer]) -> NDArray[np.float64]:
        """`conformal_p_values` within each image's cell.

        Args:
            scores: ``[m]``, higher = more OOD.
            group: ``[m]`` group of each.

        Returns:
            ``[m]``; small = OOD.

        Raises:
            InputError: NaN or inf, a group that there is not.
        """
        asked = np.asarray(scores, dtype=np.float64)
        group = _checked_group(group, len(asked), len(self.counts))
        found = np.empty(len(asked))
        for own in np.unique(group):
            members = group == own
            found[members] = conformal_p_values(asked[members], self.rows(int(own)))
        return found

    def threshold(self, group: int, admit: float = 0.95) -> ThresholdEstimate:
        """`threshold_at` of a group's cell."""
        return threshold_at(self.rows(group), admit)


def _checked_group(group: NDArray[np.integer], n: int, n_groups: int) -> NDArray[np.integer]:
    if group.shape != (n,):
        raise InputError(f"{n} scores, but groups of shape {group.shape}; one group a row expected")
    if n and not 0 <= group.min() <= group.max() < n_groups:
        raise InputError(f"groups {group.min()} to {group.max()} given, there are 0 to {n_groups - 1}")
    return group
