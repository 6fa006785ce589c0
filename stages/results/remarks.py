"""What is worth saying of scores beside their table: a line for each thing, with the places that it is true of."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from stages.id_data.overlap import first_alike

_WORTH_SAYING = 0.01  # share of rows that tie


class Remarks:
    """Collects what is said of several choices of features, to say it once.

    Args:
        images: SHA-256 of each row's image, ``[n, 32]`` of each set; see `Ties`.
    """

    def __init__(self, images: Mapping[str, NDArray[np.uint8]]) -> None:
        self._no_threshold: dict[str, list[str]] = {}  # why -> places
        self._left_out: dict[tuple[str, str], list[str]] = {}  # (score, what it needs) -> places
        self._said: dict[tuple[str, str], list[str]] = {}  # (of what, what) -> places
        self._ties = Ties(images)

    def no_threshold(self, why: str, place: str) -> None:
        """There is no threshold."""
        self._no_threshold.setdefault(why, []).append(place)

    def left_out(self, score: str, needs: str, place: str) -> None:
        """A score was asked for and does not apply."""
        self._left_out.setdefault((score, needs), []).append(place)

    def say(self, of: str, what: str, place: str) -> None:
        """Anything else, of a score or of its setting."""
        self._said.setdefault((of, what), []).append(place)

    def look_for_ties(self, score: str, place: str, scores: Mapping[str, NDArray[np.float32]]) -> None:
        """See `Ties.look`."""
        self._ties.look(score, place, scores)

    def notes(self) -> list[str]:
        """A line for each thing, in the order in which they were first said."""
        return [
            *(f"no threshold for {_listed(places)}: {why}" for why, places in self._no_threshold.items()),
            *(
                f"{score}: not of {_listed(places)}: it needs {needs}"
                for (score, needs), places in self._left_out.items()
            ),
            *(f"{of}: {what}: {_listed(places)}" for (of, what), places in self._said.items()),
            *self._ties.notes(),
        ]


def _listed(places: list[str]) -> str:
    return ", ".join(dict.fromkeys(places))


class Ties:
    """Rows that a score cannot tell apart: a tie counts half in AUROC, and no threshold comes between.

    Args:
        images: SHA-256 of each row's image, ``[n, 32]`` of each set. Of rows of one image the first counts alone.
    """

    def __init__(self, images: Mapping[str, NDArray[np.uint8]]) -> None:
        earlier = first_alike(np.concatenate(list(images.values())))
        first = earlier == np.arange(len(earlier))
        ends = np.cumsum([len(own) for own in images.values()])[:-1]
        self._distinct = dict(zip(images, np.split(first, ends), strict=True))
        self._found: dict[str, dict[str, str]] = {}  # score -> where -> how many

    def look(self, score: str, where: str, scores: Mapping[str, NDArray[np.float32]]) -> None:
        """Count among the rows of all sets together; remembered where more than 1 % tie."""
        values = np.concatenate([scores[name][own] for name, own in self._distinct.items()])
        counts = np.unique(values, return_counts=True)[1]
        tied = int(counts[counts > 1].sum())
        if tied > _WORTH_SAYING * len(values):
            self._found.setdefault(score, {})[where] = f"{tied} of {len(values)}"

    def notes(self) -> list[str]:
        """A line for each score of which more than 1 % of the rows tie."""
        return [
            f"{score}: rows that have another row's score, and count half in AUROC: "
            + ", ".join(f"{share} ({where})" for where, share in places.items())
            for score, places in self._found.items()
        ]
