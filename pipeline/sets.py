"""The sets of a study: what each holds, whether they go together, and what their features are if they came as arrays.

Nothing is decoded and no weights are read. A problem begins with the key of the experiment file that it is about.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cache import FeatureSpec
from pipeline.backbones import StudyBackbone
from pipeline.config import RunConfig, SetConfig
from stages.errors import InputError
from stages.id_data.rows import has_classes
from stages.inputs.arrays import ARRAY_SUFFIXES, ArrayTable, is_glob, list_arrays
from stages.inputs.images import Columns, SampleTable, list_images, only_classes
from stages.inputs.images.names import match_classes, unlike


class Sets:
    """The sets of an experiment file; each is listed once."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._samples: dict[str, SampleTable] = {}
        self._arrays: dict[str, ArrayTable] = {}

    def table(self, entry: SetConfig) -> SampleTable:
        """The samples of a set, whatever it is made from."""
        if entry.features is not None:
            return self.arrays(entry).samples
        if entry.name not in self._samples:
            with about_set(entry):
                columns = Columns(entry.path_column, entry.label_column)
                table = list_images(str(entry.images), entry.root, columns)
                self._samples[entry.name] = only_classes(table, entry.classes) if entry.classes else table
        return self._samples[entry.name]

    def arrays(self, entry: SetConfig) -> ArrayTable:
        """The arrays of a set that came as such."""
        if entry.name not in self._arrays:
            with about_set(entry):
                self._arrays[entry.name] = self._list_arrays(str(entry.features), entry.columns, entry.classes)
        return self._arrays[entry.name]

    def images(self, name: str) -> SampleTable:
        """The images of a set, by its name.

        Raises:
            InputError: it came as arrays, or its images are not there any more.
        """
        (entry,) = (entry for entry in self.config.sets if entry.name == name)
        if entry.images is None:
            raise InputError(f"set {name} has features, no images")
        return self.table(entry)

    def with_features(self) -> list[SetConfig]:
        """Those that came as arrays."""
        return [entry for entry in self.config.sets if entry.features is not None]

    def check(self) -> None:
        """Refuse sets that are not there or cannot be scored before hours of extraction rather than after."""
        (train,) = self.config.sets_of("id-train")
        known = self.table(train)
        for entry in self.config.sets:
            table = self.table(entry)
            if _may_lack(entry, table, known):
                continue
            if entry in self.config.sets_of("id-train", "id-val", "id-test"):
                _check_labels(entry, table, known.class_names)
            elif entry in self.config.sets_of("cs-id"):  # labels are needed for its accuracy alone
                _check_classes(entry, table, known.class_names)

    def spec_of_arrays(self, backbone: StudyBackbone) -> FeatureSpec:
        """What the features of sets are that came as arrays; refuses those that do not go together."""
        tables = {entry.name: self.arrays(entry) for entry in self.config.sets}
        (train,) = self.config.sets_of("id-train")
        if self.config.backbone is not None and not tables[train.name].has_tokens:
            raise InputError(
                f"backbone: sets.{train.name}.features has no patches, so nothing reads it: leave [backbone] out, or "
                "give the tokens tap_cls and patches that enter its last blocks"
            )
        with about_set(train):
            tables[train.name].check_logits()
        return backbone.given_spec(tables)

    def check_origins(self, spec: FeatureSpec) -> None:
        """Refuse arrays beside images that are not what the study's own network makes of images.

        Raises:
            InputError: another origin than the fingerprint of these features, or other arrays.
        """
        if self.config.has_features:
            return
        for entry in self.with_features():
            if entry.origin != spec.fingerprint:
                raise InputError(
                    f"sets.{entry.name}.origin: {entry.origin} given, but the features of this study's images have "
                    f"{spec.fingerprint}: other weights, size, tap, patches, dtype or device"
                )
            columns = self.arrays(entry).columns
            for name, (shape, _) in spec.datasets().items():
                rows = columns[name].shape[1:] if name in columns else ()
                # Patches may come as [n, h, w, D'].
                if name not in columns or math.prod(rows) != math.prod(shape) or rows[-1] != shape[-1]:
                    raise InputError(
                        f"sets.{entry.name}.features: {entry.features} has {name} {list(rows) or 'missing'}, the "
                        f"features of this study's images {list(shape)}: give the arrays that their caches hold"
                    )

    def new_arrays(self, path: str, spec: FeatureSpec) -> ArrayTable:
        """Features that belong to no set, as the study's sets have them.

        Args:
            path: a file of arrays, a folder or a pattern.
            spec: of the study's features.

        Raises:
            InputError: no arrays, or others than the study's.
        """
        if Path(path).suffix.lower() not in ARRAY_SUFFIXES and not os.path.isdir(path) and not is_glob(path):
            raise InputError(
                f"{path}: this study's sets have features, and nothing here makes such features of an image: give a "
                f"file of them ({', '.join(ARRAY_SUFFIXES)})"
            )
        (train,) = self.config.sets_of("id-train")
        named = {key: name for key, name in (train.columns or {}).items() if key not in ("label", "id")}
        table = self._list_arrays(path, named or None, None)
        network = (spec.backbone, spec.weights_sha, spec.expert_blocks, spec.image_size)
        if difference := table.spec(spec.origin, spec.dtype, network).first_difference(spec):
            raise InputError(f"{path}: other arrays than those of the study: {difference}")
        return table

    def _list_arrays(
        self, path: str, columns: Mapping[str, str] | None, classes: str | Sequence[str] | None
    ) -> ArrayTable:
        """Arrays; columns of logits are called as those of id-train, and those of its classes alone are taken."""
        (train,) = self.config.sets_of("id-train")
        if train.features is None:
            return list_arrays(path, columns, classes)
        table = list_arrays(path, columns, classes or train.classes)
        own = path == train.features and columns == train.columns
        if own and "logits" in table.columns and (table.samples.labels < 0).all():
            raise InputError(
                f"{path}: has logits, and no label that says which class a column is: give label, or save the file "
                "without logits"
            )
        return table.of_classes((table if own else self.arrays(train)).samples.class_names)


def _may_lack(entry: SetConfig, table: SampleTable, train: SampleTable) -> bool:
    """Whether nobody asks for the labels of an ID set.

    They stand for nothing where id-train has none; a test set may have none at all, and where id-train has one class,
    which tells nothing apart, so may an id-val set.
    """
    if (train.labels < 0).all():
        return True
    return bool((table.labels < 0).all()) and (entry.role == "id-test" or not has_classes(train.labels))


def _check_labels(entry: SetConfig, table: SampleTable, known: Sequence[str]) -> None:
    """Refuse an ID set whose samples are not all of a class that id-train has."""
    if len(without := np.flatnonzero(table.labels < 0)):
        how = "label in the file" if entry.features else "a folder per class, or a list with labels"
        raise InputError(
            f"set {entry.name!r}: {len(without)} of {len(table)} {unit_of(entry)} (the first: "
            f"{table.ids[without[0]]!r}) have no label: give {how}"
        )
    _check_classes(entry, table, known)


def _check_classes(entry: SetConfig, table: SampleTable, known: Sequence[str]) -> None:
    """Refuse an ID set that has samples of a class that id-train does not have."""
    places = np.array([*match_classes(table.class_names, known), 0])  # no label, -1, is no other class
    if len(others := np.flatnonzero(places[table.labels] < 0)):
        unknown = [table.class_names[place] for place in np.flatnonzero(places < 0)]
        raise InputError(
            f"set {entry.name!r} has classes that id-train does not have: {unlike(unknown, known)}; the first "
            f"of {len(others)} such {unit_of(entry)}: {table.ids[others[0]]!r}"
        )


@contextmanager
def about_set(entry: SetConfig) -> Iterator[None]:
    """Name the key of the experiment file in front of what is wrong with a set."""
    try:
        yield
    except InputError as error:
        raise InputError(f"sets.{entry.name}.{'images' if entry.images else 'features'}: {error}") from error


def unit_of(entry: SetConfig) -> str:
    """What a set is counted in."""
    return "images" if entry.features is None else "rows"
