"""What an experiment file may say: every table and key of it, and what of a study cannot be.

A problem is one line that names the key, what was given and what is allowed.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PlainValidator,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from cache import CacheInvalidError, Place, place
from pipeline.config.explain import as_given, problem_lines, score_problem
from stages.config import (
    ARRAY_KEYS,
    TAKEN_NAMES,
    BackboneConfig,
    FinetuneConfig,
    ScoreConfig,
    StageConfig,
    TrainConfig,
    nearest,
)
from stages.errors import InputError
from stages.scorers import SCORERS, get_scorer

_OOD_ROLES = ("near-ood", "far-ood")
JOINT = "joint"  # the variant whose experts were trained together with the backbone, by `finetune.joint`


class ConfigError(InputError):
    """The experiment file or an override cannot be used; the message is one line."""


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what: options of the command line that change no result."""

    max_failures: float = 0.01  # largest share of a set's images that may be unusable
    rehash: bool = False  # judge by the bytes of every image whether it is still the one that was extracted
    scheduler: str | None = None  # address of a Dask scheduler
    workers: int = 1  # local processes, where there is no scheduler


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


_Seeds = Several[Annotated[int, Field(ge=0, lt=2**32)]]


class VariantConfig(StageConfig):
    """The same study with other settings of ``[train]``; keys are dotted: ``{"train.experts": 1}``."""

    name: FolderName
    set: dict[str, Any]
    seeds: _Seeds | None = None  # some of the study's; all of them where nothing is given
    scores: Several[str] | None = None  # likewise: some of score.scores

    @field_validator("set", mode="before")
    @classmethod
    def _flatten(cls, value: object) -> object:
        # TOML reads `set = { train.experts = 1 }`, without the quotes, as nested tables; both mean the same.
        return dict(_leaves(value)) if isinstance(value, dict) else value


class RunConfig(StageConfig):
    """A whole study, every default filled in and every path absolute."""

    name: str = Field(min_length=1)
    data: AbsolutePath | None = None  # what the paths of sets are relative to; the file's folder by default
    work: AbsolutePath
    seeds: _Seeds = (0,)
    backbone: BackboneConfig | None = None  # the default one where sets have images
    cache: CacheConfig
    sets: Several[SetConfig]
    split: SplitConfig = SplitConfig()
    train: TrainConfig = TrainConfig()
    variants: Several[VariantConfig] = ()
    finetune: FinetuneConfig | None = None
    score: ScoreConfig = ScoreConfig()

    def variant_configs(self) -> dict[str, TrainConfig]:
        """Training settings by name of variant, ``default`` first.

        Raises:
            pydantic.ValidationError: a variant's setting is wrong; never for a config that was loaded.
        """
        return {"default": self.train} | {variant.name: self._variant(variant) for variant in self.variants}

    def variant_seeds(self, backbone: str = "pretrained") -> dict[str, tuple[int, ...]]:
        """Seeds by name of the variants on a backbone's features, in the order of `variant_configs`, `JOINT` last."""
        own = {"default": self.seeds} | {variant.name: variant.seeds or self.seeds for variant in self.variants}
        if backbone == "pretrained" or self.finetune is None:
            return own
        tuned, asked = self.finetune_seeds(), self.finetune.variants
        found = {name: tuple(seed for seed in tuned if seed in seeds) for name, seeds in own.items()}
        found = {name: seeds for name, seeds in found.items() if seeds and (asked is None or name in asked)}
        return found | ({JOINT: tuned} if self.finetune.joint else {})

    def finetune_seeds(self) -> tuple[int, ...]:
        """Seeds of the fine-tuned backbones; none where nothing is fine-tuned."""
        if self.finetune is None:
            return ()
        return self.seeds if self.finetune.seeds is None else self.finetune.seeds

    def _variant(self, variant: VariantConfig) -> TrainConfig:
        changes = {key.removeprefix("train."): value for key, value in variant.set.items()}
        return TrainConfig.model_validate(self.train.model_dump(exclude_unset=True) | changes)

    @property
    def has_features(self) -> bool:
        """Whether all of its sets came as arrays: no image is looked at. Beside sets with images, arrays are theirs."""
        return all(entry.features is not None for entry in self.sets)

    def sets_of(self, *roles: str) -> list[SetConfig]:
        """Sets that have one of these roles, in the order of the file."""
        return [entry for entry in self.sets if entry.role in roles]

    def require_roles(self, verb: str) -> None:
        """Check that the sets which a verb works on are there.

        Raises:
            ConfigError: scoring is asked for and there is no id-test or no OOD set.
        """
        if verb not in ("score", "report", "run"):
            return
        for roles in (("id-test",), _OOD_ROLES):
            if not self.sets_of(*roles):
                raise ConfigError(f"sets: {verb} needs a set with role {' or '.join(roles)}; add one under [[sets]]")

    def to_dict(self) -> dict[str, Any]:
        """The resolved settings as JSON values; null for what is left to a preset."""
        trainings = {"train": self.train, "finetune": self.finetune}
        given = {key: stage.as_given() for key, stage in trainings.items() if stage is not None}
        return self.model_dump(mode="json") | given

    @model_validator(mode="before")
    @classmethod
    def _default_backbone(cls, value: Any) -> Any:
        sets = value.get("sets") if isinstance(value, dict) else None
        if isinstance(sets, list) and any(isinstance(entry, dict) and "images" in entry for entry in sets):
            return {"backbone": {}} | value
        return value

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))  # a line each, `key: problem`
        return self

    def _problems(self) -> Iterator[str]:
        if not self.seeds or _repeated(self.seeds):
            yield f"seeds: {as_given(self.seeds)} given, must be one or more different numbers"
        for name in _repeated(entry.name for entry in self.sets):
            yield f"sets.{name}: two sets have this name"
        if (n := len(self.sets_of("id-train"))) != 1:
            yield f"sets: {n} sets have role id-train, must be exactly one"
        for role in ("id-val", "id-test"):
            if (n := len(self.sets_of(role))) > 1:
                yield f"sets: {n} sets have role {role}, must be at most one"
        for entry in self.sets:
            if entry.name == "average" or (entry.name in TAKEN_NAMES and entry.role in (*_OOD_ROLES, "cs-id")):
                yield f"sets.{entry.name}: this name is a word of the table's own"
            for key in ("root", "path_column", "label_column"):
                if entry.images is None and getattr(entry, key) is not None:
                    yield f"sets.{entry.name}.{key}: is for images; this set has none"
            if entry.columns is not None and entry.features is None:
                yield f"sets.{entry.name}.columns: is for features; of images it is path_column and label_column"
            if entry.classes is not None and not entry.classes:
                yield f"sets.{entry.name}.classes: {as_given(entry.classes)} given, must be names or the path of a file"
            for key in entry.columns or {}:
                if key not in ARRAY_KEYS:
                    yield f"sets.{entry.name}.columns.{key}: unknown key{nearest(key, ARRAY_KEYS)}"
        yield from self._source_problems()
        for score in self.score.scores:
            if (problem := score_problem(score)) is not None:
                yield f"score.scores: {problem}"
        if not self.score.scores or _repeated(tuple(sorted(score.split("+"))) for score in self.score.scores):
            yield f"score.scores: {as_given(self.score.scores)} given, must be one or more different names"
        yield from self._score_settings_problems()
        yield from self._finetune_problems()
        for variant in self.variants:
            yield from self._variant_problems(variant)
        for name in _repeated(["default", *(variant.name for variant in self.variants)]):
            always = " (default always exists: it is [train])" if name == "default" else ""
            yield f"variants.{name}: two variants have this name{always}"

    def _score_settings_problems(self) -> Iterator[str]:
        if not self.score.params:
            return
        for name, settings in self.score.params.items():
            if name not in SCORERS:
                yield f"score.params.{name}: unknown key{nearest(name, SCORERS)}"
                continue
            try:
                get_scorer(name, self.score.profile, **settings)
            except InputError as error:
                yield f"score.params.{error}"
                continue
            layers, taps = settings.get("layers", "auto"), self.cache.taps
            if isinstance(taps, tuple) and layers != "auto" and (absent := sorted({*layers} - {*taps})):
                yield f"score.params.{name}.layers: {absent[0]} given, must be some of cache.taps = {as_given(taps)}"

    def _source_problems(self) -> Iterator[str]:
        for entry in self.sets:
            if entry.images is not None and entry.features is not None:
                yield f"sets.{entry.name}: has images and features; give one of them"
            elif entry.images is None and entry.features is None:
                yield f"sets.{entry.name}.images: missing"
            elif entry.images is not None and entry.origin is not None:
                yield f"sets.{entry.name}.origin: says where features come from; this set has images"
            elif entry.features is not None and entry.origin is None:
                yield (
                    f"sets.{entry.name}.origin: missing; say in your words which network, weights and size gave these "
                    "features, the same for all sets; beside sets with images, the origin that info says of them"
                )
        given = [entry for entry in self.sets if entry.features is not None]
        for entry in given:
            if entry.origin and given[0].origin and entry.origin != given[0].origin:
                yield (
                    f"sets.{entry.name}.origin: {as_given(entry.origin)} given, but set {given[0].name} has "
                    f"{as_given(given[0].origin)}: features of different origin do not mix"
                )
        if not given:
            return
        images = [entry.name for entry in self.sets if entry.images is not None]
        if images and given[0].origin and not re.fullmatch("[0-9a-f]{64}", given[0].origin):
            yield (
                f"sets.{given[0].name}.origin: {as_given(given[0].origin)} given, but set {images[0]} has images: "
                "to show that both come from one network give the origin that info says of its cache, 64 digits"
            )
        for key in [] if images else sorted({"patches", "taps"} & self.cache.model_fields_set):
            yield f"cache.{key}: says what to keep of images; of set {given[0].name} all is kept that its file has"
        if self.finetune is not None:
            yield f"finetune: needs images; set {given[0].name} has features"

    def _finetune_problems(self) -> Iterator[str]:
        variants = (self.finetune and self.finetune.variants) or ()
        if self.finetune is not None:
            yield from _some("finetune.seeds", self.finetune_seeds(), self.seeds, "numbers of the study's seeds")
            yield from self._joint_problems() if self.finetune.joint else ()
        known = ["default", *(variant.name for variant in self.variants)]
        for name in variants:
            if name not in known:
                yield f"finetune.variants: {as_given(name)} is not a variant{nearest(name, known)}"

    def _joint_problems(self) -> Iterator[str]:
        if self.train.expert not in ("auto", "end"):
            yield (
                "finetune.joint: trains copies of the backbone's end, and train.expert = "
                f'{as_given(self.train.expert)} is another kind of expert: give "end" there, others as [[variants]]'
            )
        if "start" in self.train.model_fields_set and self.train.start == "probe":
            yield 'finetune.joint: its experts start at zero: give train.start = "probe" to [[variants]] alone'
        if self.cache.patches != "full":
            yield (
                'finetune.joint: its experts read all patches: give cache.patches = "full", not '
                f"{as_given(self.cache.patches)}"
            )
        if JOINT in (variant.name for variant in self.variants):
            yield f"variants.{JOINT}: this name is taken by the experts that finetune.joint trains"

    def _variant_problems(self, variant: VariantConfig) -> Iterator[str]:
        at = f"variants.{variant.name}"
        if variant.seeds is not None:
            yield from _some(f"{at}.seeds", variant.seeds, self.seeds, "numbers of the study's seeds")
        if variant.scores is not None:
            yield from _some(f"{at}.scores", variant.scores, self.score.scores, "names of score.scores")
        if others := [key for key in variant.set if not key.startswith("train.")]:
            yield f"{at}.set.{others[0]}: a variant changes [train] alone, its keys begin with 'train.'"
            return
        try:
            self._variant(variant)
        except ValidationError as error:
            document = {key.removeprefix("train."): value for key, value in variant.set.items()}
            yield from (f"{at}.set.train.{line}" for line in problem_lines(error, document, TrainConfig))


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, n in Counter(values).items() if n > 1]


def _some(key: str, given: Collection[Any], known: Collection[Any], of: str) -> Iterator[str]:
    if not given or _repeated(given) or not set(given) <= set(known):
        yield f"{key}: {as_given(given)} given, must be one or more different {of} {as_given(known)}"


def _leaves(table: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value
