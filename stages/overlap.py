"""Images that stand in two sets: found by their bytes, whatever their names."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

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


def find_overlaps(sets: Mapping[str, FeatureCache]) -> list[Overlap]:
    """Every two sets that share images, or rows of the same given features.

    Args:
        sets: by name, in the order of the study.
    """
    caches = list(sets.items())
    hashes = np.concatenate([np.asarray(cache.image_hashes) for _, cache in caches])
    owner = np.repeat(np.arange(len(caches)), [len(cache.image_hashes) for _, cache in caches])
    row = np.concatenate([np.arange(len(cache.image_hashes)) for _, cache in caches])
    keys = np.ascontiguousarray(hashes).view(np.dtype((np.void, hashes.shape[1]))).ravel()
    order = np.argsort(keys, kind="stable")  # of equal bytes the order of the study stays
    ordered = keys[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(ordered) else np.zeros(0, np.intp)
    ends = np.append(starts[1:], len(ordered))
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for start, end in zip(starts[ends - starts > 1].tolist(), ends[ends - starts > 1].tolist(), strict=True):
        members = order[start:end]
        firsts: dict[int, int] = {}
        for place in members.tolist():
            own = int(owner[place])
            for other, first in firsts.items():
                if other != own:
                    found.setdefault((other, own), []).append((first, int(row[place])))
            firsts.setdefault(own, int(row[place]))
    overlaps = []
    for (one, other), pairs in sorted(found.items()):
        (name, cache), (twin_name, twin) = caches[one], caches[other]
        ids = tuple((str(cache.ids[a]), str(twin.ids[b])) for a, b in sorted(pairs, key=lambda pair: pair[1]))
        overlaps.append(Overlap((name, twin_name), ids))
    return overlaps
