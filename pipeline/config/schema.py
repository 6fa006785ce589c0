"""An experiment file as a whole: a study, and what of it cannot be.

A problem is one line that names the key, what was given and what is allowed.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError, model_validator

from pipeline.config.explain import as_given, problem_lines, score_problem
from pipeline.config.tables import AbsolutePath, CacheConfig, Seeds, SetConfig, Several, SplitConfig, VariantConfig
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


class RunConfig(StageConfig):
    """A whole study, every default filled in and every path absolute."""

    name: str = Field(min_length=1)
    data: AbsolutePath | None = None  # what the paths of sets are relative to; the file's folder by default
    work: AbsolutePath
    seeds: Seeds = (0,)
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

    def scores_of(self, variant: str) -> tuple[str, ...]:
        """The scores that mixtures of a variant are judged by."""
        own = {each.name: each.scores for each in self.variants}.get(variant)
        return tuple(self.score.scores) if own is None else own

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
