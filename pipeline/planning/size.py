"""How large a study is: what its sets hold, counted or stated."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config import RunConfig, SetConfig
from pipeline.planning.asked import Planning
from pipeline.workspace import Workspace
from stages.config import TrainConfig
from stages.errors import InputError
from stages.id_data.rows import has_classes
from stages.id_data.split import MIN_ROWS
from stages.mixture.grouping import experts_for

TEST_IMAGES = 10_000  # of each set that is not id-train, where they are stated and nobody says how many
_FEWEST = 2  # classes that there are in any case


@dataclass(frozen=True)
class StudySize:
    """What the sets of a study hold.

    Attributes:
        rows: images, or rows of features, by the names of the sets.
        n_classes: of id-train; 0 where nothing tells them apart and clusters are to stand for them.
        per_class: rows of the smallest class of id-train; all rows where there are no classes.
        counted: whether this was counted, rather than stated on the command line.
    """

    rows: Mapping[str, int]
    n_classes: int
    per_class: int
    counted: bool = True

    @property
    def total(self) -> int:
        """Rows of all sets."""
        return sum(self.rows.values())

    def of_roles(self, config: RunConfig, *roles: str) -> int:
        """Rows of the sets with these roles."""
        return sum(self.rows[entry.name] for entry in config.sets_of(*roles))

    def is_cross_fitted(self, config: RunConfig) -> bool:
        """Whether classes are too small for held-out halves, so that several models are trained for each."""
        held_out = self.per_class * config.split.val
        return not config.sets_of("id-val") and config.finetune is None and held_out / 2 < MIN_ROWS


def study_size(workspace: Workspace, asked: Planning) -> StudySize:
    """Count what the sets hold, or take what was stated.

    Raises:
        InputError: the sets cannot be used, or only a part of what is needed is stated.
    """
    config = workspace.config
    (train,) = config.sets_of("id-train")
    if asked.images is None:
        if asked.classes is not None or asked.test_images is not None:
            raise InputError("--classes and --test-images are of images that are stated: give --images as well")
        return _counted(workspace, train)
    if config.backbone is None or config.has_features:
        raise InputError("--images: this study's sets have features: what is planned from is their files")
    n_classes = asked.classes or 0
    if n_classes < _FEWEST or asked.images < n_classes * _FEWEST:
        raise InputError(
            f"--images: {asked.images} of {n_classes} classes given: give --classes, and two images of each"
        )
    n_tests = TEST_IMAGES if asked.test_images is None else asked.test_images
    rows = {entry.name: asked.images if entry is train else n_tests for entry in config.sets}
    return StudySize(rows, n_classes, asked.images // n_classes, counted=False)


def _counted(workspace: Workspace, train: SetConfig) -> StudySize:
    sets = workspace.sets
    rows = {entry.name: len(sets.table(entry)) for entry in workspace.config.sets}
    labels: NDArray[np.int32] = sets.table(train).labels
    if not has_classes(labels):
        return StudySize(rows, 0, len(labels))
    counts = np.bincount(labels)
    return StudySize(rows, int(np.count_nonzero(counts)), int(counts[counts > 0].min()))


def experts_of(train: TrainConfig, n_classes: int) -> int:
    """Experts of a mixture, of so many classes."""
    return train.experts if isinstance(train.experts, int) else experts_for(max(n_classes, _FEWEST))
