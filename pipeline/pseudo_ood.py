"""Images that play OOD for one backbone, for ``score = "auto"``: made of ID images, extracted, found again.

They are made of *select* rows alone, so what calibrates the final detector has no say in what it is. Their cache stands
beside those of the sets, and ``work/extract/<backbone>-pseudo-ood.json`` says which it is.
"""

from functools import cached_property

import numpy as np

from cache import CacheError, FeatureCache, FeatureSpec, Place, fingerprint, place
from pipeline.backbones import StudyBackbone
from pipeline.config import SetConfig
from pipeline.workspace import Workspace
from stages.detection.pseudo import FEWEST_CLASSES
from stages.errors import InputError
from stages.files.documents import read_document, write_document
from stages.id_data.clusters import first_by_hash
from stages.id_data.rows import IdData, has_classes
from stages.inputs.images.pseudo_ood import PSEUDO_IMAGES, PSEUDO_SEMANTICS, list_pseudo_ood
from stages.inputs.images.table import SampleTable
from stages.scorers import AUTO


class PseudoOOD:
    """The images that play OOD for a backbone.

    Args:
        workspace: the study.
        backbone: whose features they get.
    """

    def __init__(self, workspace: Workspace, backbone: StudyBackbone) -> None:
        self._config, self._sets = workspace.config, workspace.sets
        self._backbone = backbone
        self._path = backbone.link_path.with_name(f"{backbone.name}-pseudo-ood.json")

    @property
    def wanted(self) -> bool:
        """Whether the study has ``auto`` among its scores, and ID images to make them of."""
        asked = self._config.cache.pseudo_ood > 0 and AUTO in self._config.score.scores
        return asked and self._entry.images is not None

    @property
    def needed(self) -> bool:
        """Whether they are wanted, and ID images have classes enough for a choice; these images are listed for that."""
        if not self.wanted:
            return False
        (train,) = self._config.sets_of("id-train")
        labels = self._sets.table(train).labels
        return not has_classes(labels) or len(np.unique(labels[labels >= 0])) >= FEWEST_CLASSES

    @property
    def name(self) -> str:
        """Of their set."""
        return f"{self._entry.name}.pseudo-ood"

    @property
    def at_most(self) -> int:
        """How many there are where ID images to make them of are enough."""
        return len(PSEUDO_IMAGES) * self._config.cache.pseudo_ood

    @cached_property
    def _entry(self) -> SetConfig:
        """The set that rows are held out of."""
        return (*self._config.sets_of("id-val"), *self._config.sets_of("id-train"))[0]

    @cached_property
    def _data(self) -> IdData:
        return self._backbone.id_data()

    def _identity(self) -> str:
        return fingerprint(
            {"semantics": PSEUDO_SEMANTICS, "each": self._config.cache.pseudo_ood, "data": self._data.identity}
        )

    def samples(self) -> SampleTable:
        """The images themselves, not yet made: of the select rows that come first by their hashes."""
        data, table = self._data, self._sets.table(self._entry)
        rows = first_by_hash(data.split.select, data.held_out.image_hashes, self._config.cache.pseudo_ood)
        labels = data.held_out_labels[rows]
        others = [_of_another_class(labels, number) for number in range(len(rows))]
        listed = {name: number for number, name in enumerate(table.ids)}
        numbers = np.array([listed[name] for name in data.held_out.ids[rows].tolist()], np.int64)
        return list_pseudo_ood(table, numbers.tolist(), numbers[others].tolist())

    @property
    def path(self) -> Place | None:
        """Where their cache stands; None where they are not wanted, not made, or made of others or another number."""
        stored = read_document(self._path) if self.wanted else None
        if stored is None or stored["identity"] != self._identity():
            return None
        path = place(stored["path"])
        return path if path.is_dir() else self._config.cache.root / path.name

    def cache(self, spec: FeatureSpec) -> FeatureCache | None:
        """Their cache; None where they are not wanted, not there, or made of other ID images or another number.

        Args:
            spec: of the backbone's features.
        """
        path = self.path
        try:
            return None if path is None else FeatureCache.open(path, spec)
        except CacheError:  # gone or damaged: `extract` makes it again
            return None

    def found(self, spec: FeatureSpec) -> FeatureCache | None:
        """See `cache`; None as well where the ID images are not extracted yet."""
        try:
            return self.cache(spec)
        except (InputError, CacheError):
            return None

    def keep(self, cache: FeatureCache) -> None:
        """Remember which cache it is."""
        write_document(self._path, {"identity": self._identity(), "path": str(cache.path)})


def _of_another_class(labels: np.ndarray, number: int) -> int:
    """The next row of another class; the next row where there is no other class."""
    after = np.roll(np.arange(len(labels)), -number - 1)
    return int(next((row for row in after if labels[row] != labels[number]), after[0]))
