"""Images of equal bytes, whatever their names: of one set, or in two."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache import FeatureCache


@dataclass(frozen=True)
class Overlap:
    """Rows of one set whose bytes stand in another.

    Attributes:
        sets: names of both, in the order of the study: id-train first.
        ids: a pair for each such row of the second set: the first row of the first set with these bytes, and itself.
    """

    sets: tuple[str, str]
    ids: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        shown = ", ".join(own for _, own in self.ids[:3]) + (", …" if len(self.ids) > 3 else "")
        return f"{len(self.ids)} of {self.sets[1]} in {self.sets[0]} ({shown})"


def first_alike(hashes: NDArray[np.uint8]) -> NDArray[np.intp]:
    """The first row of the bytes of each row, ``[n]``; its own number where none before it has them.

    Args:
        hashes: ``[n, 32]`` SHA-256 of each row's image.

    >>> first_alike(np.uint8([[1], [2], [1]])).tolist()
    [0, 1, 0]
    """
    keys = np.ascontiguousarray(hashes).view(np.dtype((np.void, hashes.shape[1]))).ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    found: NDArray[np.intp] = first[inverse]
    return found


def find_overlaps(sets: Sequence[tuple[str, FeatureCache]]) -> list[Overlap]:
    """Every two sets that share images, or rows of the same given features.

    Args:
        sets: name and cache of each, in the order of the study.
    """
    sizes = [len(cache.image_hashes) for _, cache in sets]
    owner, row = np.repeat(np.arange(len(sets)), sizes), np.concatenate([np.arange(size) for size in sizes])
    first = first_alike(np.concatenate([np.asarray(cache.image_hashes) for _, cache in sets]))
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    holders: dict[int, dict[int, int]] = {}  # sets that hold an image, and the first row that does
    for place in np.flatnonzero(np.bincount(first, minlength=len(first))[first] > 1).tolist():
        own, seen = int(owner[place]), holders.setdefault(int(first[place]), {})
        for other, holder in seen.items():
            if other != own:
                found.setdefault((other, own), []).append((holder, int(row[place])))
        seen.setdefault(own, int(row[place]))
    overlaps = []
    for (one, other), pairs in sorted(found.items()):
        (name, cache), (twin_name, twin) = sets[one], sets[other]
        ids = tuple((str(cache.ids[a]), str(twin.ids[b])) for a, b in pairs)
        overlaps.append(Overlap((name, twin_name), ids))
    return overlaps
