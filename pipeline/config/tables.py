"""The tables of an experiment file that a study is made of, and what their keys may hold."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PlainValidator,
    PositiveInt,
    field_validator,
)

from cache import CacheInvalidError, Place, place
from pipeline.config.explain import as_given
from stages.config import BackboneConfig, StageConfig


def folder_name(name: str) -> str:
    """The name, where it can be a folder's on any system; ValueError otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(f"{as_given(name)} given, must be letters, digits, '.', '_' or '-', a letter or digit first")
    return name


def _patches(value: str) -> str:
    if not re.fullmatch(r"full|none|pool:[1-9][0-9]{0,3}", value):
        raise ValueError(f"{as_given(value)} given, must be 'full', 'none' or 'pool:G' with G at least 1")
    return value


def _cache_root(value: Any) -> Place:
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{as_given(value)} given, must be a folder, or s3://bucket/prefix")
    try:
        return place(value)
    except CacheInvalidError as error:
        raise ValueError(str(error)) from error


def _taps(value: tuple[int, ...] | str | None) -> tuple[int, ...] | str | None:
    if value is None or isinstance(value, str):
        return value
    if not value or len(set(value)) < len(value):
        raise ValueError(f"{as_given(value)} given, must be one or more different numbers, counted from 1, or 'all'")
    return tuple(sorted(value))


FolderName = Annotated[str, AfterValidator(folder_name)]
# Not strict: TOML knows text and lists, no paths and no tuples. What is inside stays strict.
AbsolutePath = Annotated[Path, Field(strict=False)]
CacheRoot = Annotated[Place, PlainValidator(_cache_root), PlainSerializer(str, return_type=str)]
_Item = TypeVar("_Item")
Several = Annotated[tuple[_Item, ...], Field(strict=False)]


class CacheConfig(StageConfig):
    """Where features are cached, and which."""

    root: CacheRoot
    dtype: Literal["float16", "float32"] = "float16"
    patches: Annotated[str, AfterValidator(_patches)] = "full"
    expert_blocks: PositiveInt = 1
    # Blocks or stages, from 1, after which class token and mean patch are kept as well.
    taps: Annotated[Literal["all"] | Several[PositiveInt] | None, AfterValidator(_taps)] = None
    # ID images that `auto` is judged by spoilt ones of, in each kind of spoiling; or 0.
    pseudo_ood: NonNegativeInt = 100


class FeaturesConfig(StageConfig):
    """What features are: the part of an experiment file that a cache without a study needs."""

    backbone: BackboneConfig
    cache: CacheConfig


class SetConfig(StageConfig):
    """One set of samples and its role in the study."""

    name: FolderName
    role: Literal["id-train", "id-val", "id-test", "near-ood", "far-ood", "cs-id"]
    images: str | None = None
    root: str | None = None  # folder that the paths of a list are relative to; its own folder where nothing is given
    # A list, or a text file with a class a line. Of images: those of other classes are left out. Of features: the names
    # of the columns of logits and of the numbers in label.
    classes: str | Several[str] | None = None
    # Which column of a list is the image, and which its class; the usual names where nothing is given.
    path_column: str | None = Field(default=None, min_length=1)
    label_column: str | None = Field(default=None, min_length=1)
    features: str | None = None  # instead of images: arrays in a file or in several, see stages/inputs/arrays
    columns: dict[str, str] | None = None  # of features: what keys are called there, { cls = "emb", label = "y" }
    origin: str | None = Field(default=None, min_length=1)  # where these features come from; others do not mix

    @property
    def source(self) -> str:
        """What it is made from."""
        root = f", its paths below {self.root}" if self.root else ""
        listed = self.classes if isinstance(self.classes, str) else ", ".join(self.classes or ())
        classes = f", the classes of {listed}" if listed else ""
        columns = "".join(
            f", {what} in {name!r}"
            for what, name in (("paths", self.path_column), ("classes", self.label_column))
            if name is not None
        )
        keys = "".join(f", {key} in {name!r}" for key, name in (self.columns or {}).items())
        return f"{self.images or self.features}{root}{classes}{columns}{keys}"


class SplitConfig(StageConfig):
    """Share of id-train that is held out, per class, where no set is id-val."""

    val: float = Field(default=0.2, gt=0, lt=1)


Seeds = Several[Annotated[int, Field(ge=0, lt=2**32)]]


class VariantConfig(StageConfig):
    """The same study with other settings of ``[train]``; keys are dotted: ``{"train.experts": 1}``."""

    name: FolderName
    set: dict[str, Any]
    seeds: Seeds | None = None  # some of the study's; all of them where nothing is given
    scores: Several[str] | None = None  # likewise: some of score.scores

    @field_validator("set", mode="before")
    @classmethod
    def _flatten(cls, value: object) -> object:
        # TOML reads `set = { train.experts = 1 }`, without the quotes, as nested tables; both mean the same.
        return dict(_leaves(value)) if isinstance(value, dict) else value


def _leaves(table: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value
