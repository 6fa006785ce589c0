"""A study of N training rows as given arrays: drawn around class means, alike at every call, never all in memory.

Training rows N; id-val and id-test N / 20 each; five OOD sets of N / 100 rows, around other means.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache import FeatureCache
from stages.detection.sources import BackboneSource, ScoredSet
from stages.extract import import_set
from stages.heads.affine import LinearHead
from stages.heads.choose import FittedHeads
from stages.id_data.rows import IdData, id_data
from stages.inputs.arrays import list_arrays

DIM, CLASSES, OODS = 384, 1000, 5
_PART = 100_000  # rows of a file
_SPREAD = 1.0  # of rows around their class's mean, whose own is 1


class DrawnStudy:
    """Sealed caches under a folder, made where they are not there, and what is known of them.

    Args:
        folder: of the caches of all sizes.
        rows: N.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder = folder / str(rows)
        self.rows = rows
        few, fewer = max(rows // 20, CLASSES), rows // 100
        self._sizes = {"train": rows, "val": few, "test": few} | {f"ood-{i}": fewer for i in range(OODS)}

    @cached_property
    def means(self) -> NDArray[np.float32]:
        """``[2 C, D]``: of the ID classes and of those that OOD rows are of."""
        return np.random.default_rng(0).standard_normal((2 * CLASSES, DIM), dtype=np.float32)

    @cached_property
    def caches(self) -> dict[str, FeatureCache]:
        """Of each set."""
        return {name: self._cache(number, name, n) for number, (name, n) in enumerate(self._sizes.items())}

    def _cache(self, number: int, name: str, n: int) -> FeatureCache:
        arrays = self.folder / "arrays" / name
        if not arrays.exists():
            arrays.mkdir(parents=True)
            rng = np.random.default_rng(number + 1)
            for part, start in enumerate(range(0, n, _PART)):
                labels = np.arange(start, min(start + _PART, n)) % CLASSES
                at = self.means[labels + (CLASSES if name.startswith("ood") else 0)]
                at += _SPREAD * rng.standard_normal(at.shape, dtype=np.float32)
                np.savez(arrays / f"part-{part}.npz", cls=at.astype(np.float16), label=labels)
        table = list_arrays(str(arrays))
        return import_set(name, table, table.spec("drawn", "float16"), self.folder / "caches")

    @cached_property
    def data(self) -> IdData:
        """Features, labels and split."""
        return id_data(self.caches["train"], self.caches["val"], 0.2)

    @cached_property
    def head(self) -> LinearHead:
        """That nobody fitted: the class means."""
        return LinearHead(self.means[:CLASSES] / DIM, np.zeros(CLASSES, np.float32))

    @cached_property
    def source(self) -> BackboneSource:
        """All of it, for scoring."""
        return BackboneSource(
            name="pretrained",
            seed=None,
            data=self.data,
            probe=FittedHeads((self.head,), self.head, 1.0, {}),
            finetuned_head=None,
            mixtures=(),
            tests=tuple(
                ScoredSet(name, "id" if name == "test" else "near" if name == "ood-0" else "far", cache)
                for name, cache in self.caches.items()
                if name not in ("train", "val")
            ),
            architecture=lambda: None,
        )
