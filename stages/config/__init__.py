"""Settings of every stage: typed, frozen, unknown keys refused.

They stand in one light module, and not beside what they configure, so that an experiment file is checked in
milliseconds, before torch is imported.
"""

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from stages.config.backbone_names import canonical_name, has_official_recipe

LARGEST_SIDE = 4096  # of a network's input, in pixels
# What a file of features may hold, see stages/inputs/arrays.
ARRAY_FEATURES = ("cls", "tap_cls", "registers", "patches", "logits", "taps")
ARRAY_KEYS = (*ARRAY_FEATURES, "label", "id")


class StageConfig(BaseModel):
    """Settings of one stage; strict types, so that ``epochs = "20"`` is an error and not a guess."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Positive = Annotated[float, Field(gt=0)]
Channels = Annotated[tuple[float, float, float], Field(strict=False)]  # TOML has lists; what is inside stays strict


class BackboneConfig(StageConfig):
    """Which network, with which weights, at which image size; ``None`` means: as the weights have it.

    Attributes:
        name: timm's, or as Hugging Face's repositories have it, which becomes timm's (`canonical_name`).
        weights: "hub", "embedded" or a path to .safetensors / .pth.
        recipe: how an image and stored position embeddings become the network's input: as its authors do it
            ("official", see `stages.networks.weights.official`) or as timm does ("timm"). None becomes "official" where
            that is known, for DINOv2, since published numbers are of its features; "timm" everywhere else.
        decode: what makes pixels of JPEG files, see `stages.networks.preprocessing`; of all others Pillow does.
    """

    name: Annotated[str, AfterValidator(canonical_name)] = "vit_small_patch14_dinov2.lvd142m"
    weights: str = "hub"
    recipe: Literal["official", "timm"] | None = Field(default=None, validate_default=True)
    image_size: int = Field(default=224, ge=16, le=LARGEST_SIDE)
    decode: Literal["pil", "draft", "cuda"] = "pil"
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # auto: float32, but float16 on a GPU
    compile: bool | Literal["auto"] = False  # torch.compile; auto: on a GPU, where a trial says that it pays
    batch: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = "auto"  # images of a forward pass of an extraction
    mean: Channels | None = None
    std: Annotated[tuple[Positive, Positive, Positive], Field(strict=False)] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] | None = None
    crop_pct: float | None = Field(default=None, gt=0, le=1)

    @field_validator("recipe")
    @classmethod
    def _resolve_recipe(cls, recipe: str | None, info: ValidationInfo) -> str | None:
        if (name := info.data.get("name")) is None:  # wrong itself
            return recipe
        known = has_official_recipe(name)
        if recipe == "official" and not known:
            raise ValueError(f"'official' given, but only DINOv2's is known here, and none for {name}: give 'timm'")
        return recipe or ("official" if known else "timm")


ExpertKind = Literal["end", "adapter", "frozen", "dense"]  # what an expert is, see stages/mixture/model.py
RouterInput = Literal["tap_cls", "cls"]


class PresetConfig(StageConfig):
    """Settings of a training: what is not given is as its ``preset`` has it (`stages.training.recipes`).

    Defaults are those of the preset that changes nothing. What a training reads is resolved there; here, a value that
    was not given (``model_fields_set``) may still become another one.
    """

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given

    def as_given(self) -> dict[str, Any]:
        """As JSON values, which give the same settings again; null for what is left to the preset."""
        of_preset = {key for key, field in type(self).model_fields.items() if field.json_schema_extra == _OF_PRESET}
        return self.model_dump(mode="json") | dict.fromkeys(of_preset - self.model_fields_set)


_OF_PRESET: dict[str, JsonValue] = {"of_preset": True}


def of_preset(
    default: Any, gt: float | None = None, ge: float | None = None, lt: float | None = None, le: float | None = None
) -> Any:
    """A setting that presets may have a value for, with its default and its limits."""
    return Field(default=default, gt=gt, ge=ge, lt=lt, le=le, json_schema_extra=_OF_PRESET)


# Dynamic-β Mixup, of features and of images: α of the easiest class, α of the hardest, and the power of a class's
# difficulty between them, above 1 the hardest alone are mixed more; see stages/mixture/mixup.py.
_ALPHA_MIN, _ALPHA_MAX, _ALPHA_POWER = of_preset(0.1, ge=0), of_preset(0.8, ge=0), of_preset(1.0, gt=0)


def _check_alphas(low: float, high: float, otherwise: str) -> None:
    if low >= high:
        raise ValueError(
            f"alpha_min: {low:g} given, must be below alpha_max = {high:g}: with equal values difficulty cannot "
            f"matter; that is {otherwise}"
        )


class TrainConfig(PresetConfig):
    """How the Mixture of Feature Experts is trained."""

    experts: PositiveInt | Literal["auto"] = "auto"
    grouping: str = "balanced"  # "balanced", "kmeans" or a JSON file {class: group}
    mixup: Literal["dynamic", "static", "none"] = "dynamic"
    epochs: PositiveInt = of_preset(4)  # of experts whose heads start as the probe
    expert: Literal["auto", ExpertKind] = "auto"  # auto: "end", but "adapter" on features that came without tokens
    router_input: Literal["auto", RouterInput] = "auto"  # auto: "cls"; "tap_cls", if there is one, with start = "zero"
    start: Literal["zero", "probe"] = of_preset("probe")  # what heads and router are before anything is learned
    patience: PositiveInt | None = None  # epochs without a lower held-out loss after which to stop; None: never
    preset: Literal["default", "zero", "paper"] = "default"
    batch_size: PositiveInt = of_preset(64)
    lr: float = of_preset(1e-5, gt=0)  # of the experts' ends, which start trained: three times more costs far-OOD
    head_lr: float = of_preset(1e-4, gt=0)  # they start trained, as the ends do
    router_lr: float = of_preset(1e-4, gt=0)
    rate_steps: NonNegativeInt = of_preset(200)  # a longer training takes its rates less in proportion; 0: as given
    weight_decay: float = of_preset(0.05, ge=0)
    l2_sp: float = Field(default=0.0, ge=0, le=1e6)  # pull of the experts' ends to where they started
    label_smoothing: float = of_preset(0.0, ge=0, lt=1)
    other_weight: float = of_preset(0.1, ge=0)
    warmup_epochs: float = of_preset(1.0, ge=0)
    alpha_min: float = _ALPHA_MIN
    alpha_max: float = _ALPHA_MAX
    alpha_power: float = _ALPHA_POWER
    gradient_clip: float = of_preset(1.0, gt=0)
    ema: float = of_preset(0.99, ge=0, lt=1)  # decay of the weights' moving average; 0: the weights themselves
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32, but mixed with bfloat16 on a GPU
    tensorboard: bool = False  # an event file beside metrics.jsonl; needs the extra "tensorboard"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mixup == "dynamic":
            _check_alphas(self.alpha_min, self.alpha_max, 'mixup = "static"')
        if self.l2_sp and self.expert == "frozen":
            raise ValueError(
                'l2_sp draws weights of experts that are trained: expert = "frozen" has none, leave it out'
            )
        return self


class FinetuneConfig(PresetConfig):
    """How the backbone and a linear head are trained.

    Batch norm is frozen whatever they say: its statistics stay the pre-trained ones, since small batches would spoil
    them, and several processes need not agree on any. Its scale and shift are trained.

    Attributes:
        batch_size: images of one step of the optimiser, over all processes and all of `accumulate` passes.
        head_epochs: epochs at the start in which the head alone is trained, at the constant rate `head_lr`.
        warmup_epochs: of the rising learning rate that follows; a cosine to zero ends the run.
        beta: whether the Beta distribution of the mixing weight depends on the class (dynamic) or not (static).
        mixup, cutmix: α of the static distribution; above 0: whether images are mixed so at all.
        freeze: how many first blocks (ViT) or stages (CNN) stay as they are, with all that stands before them.
        joint: how many blocks or stages before the tap are trained together with the experts; 0: no experts.
    """

    epochs: PositiveInt = of_preset(10)
    preset: Literal["auto", "small", "paper"] = "auto"
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(strict=False)] | None = None  # some of the study's; None: all
    variants: Annotated[tuple[str, ...], Field(strict=False)] | None = None  # trained on its features; None: all
    batch_size: PositiveInt = of_preset(32)
    accumulate: PositiveInt = 1  # forward and backward passes that a batch is made of: less memory, the same batch
    lr: float = of_preset(3e-4, gt=0)
    layer_decay: float = of_preset(0.75, gt=0, le=1)
    weight_decay: float = of_preset(0.05, ge=0)
    head_epochs: NonNegativeInt = 0
    head_lr: float = of_preset(1e-3, gt=0)
    warmup_epochs: int = of_preset(1, ge=0)
    label_smoothing: float = of_preset(0.1, ge=0, lt=1)
    rand_augment: str = of_preset("")  # as timm names it; "": none
    random_erasing: float = of_preset(0.0, ge=0, le=1)
    crop_scale: float = of_preset(0.5, gt=0, le=1)  # smallest share of the image that a crop keeps
    hflip: float = of_preset(0.5, ge=0, le=1)  # 0 for images whose mirror image is another class
    beta: Literal["static", "dynamic"] = "static"  # dynamic: harder classes are mixed more (Dynamic-β)
    mixup: float = of_preset(0.0, ge=0)
    cutmix: float = of_preset(0.0, ge=0)
    alpha_min: float = _ALPHA_MIN
    alpha_max: float = _ALPHA_MAX
    alpha_power: float = _ALPHA_POWER
    drop_path: float = of_preset(0.0, ge=0, lt=1)
    gradient_clip: float = of_preset(1.0, ge=0)  # 0: not clipped
    ema: float = of_preset(0.0, ge=0, lt=1)  # decay of the weights' moving average; 0: the weights themselves
    patience: PositiveInt | None = None  # epochs without a lower held-out loss after which to stop; None: never
    freeze: NonNegativeInt = 0
    joint: NonNegativeInt = 0
    checkpointing: bool = False  # gradient checkpointing: less memory, a third more work
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32, but bfloat16 on a GPU that has it
    compile: bool = False  # torch.compile
    workers: NonNegativeInt | Literal["auto"] = "auto"  # processes that decode and augment in the background
    tensorboard: bool = False  # an event file beside metrics.jsonl; needs the extra "tensorboard"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beta == "dynamic":
            _check_alphas(self.alpha_min, self.alpha_max, 'beta = "static"')
        return self


TAKEN_NAMES = ("id", "average")  # words of the table's own, which no set with a row of its own may be called

Profile = Literal["paper", "openood", "pytorch-ood"]  # whose defaults, where implementations of a score differ


def nearest(word: str, known: Iterable[str]) -> str:
    """End of a message about an unknown word.

    >>> nearest("enrgy", ["energy", "msp"]), nearest("x", ["energy", "msp"])
    ("; did you mean 'energy'?", '; known: energy, msp')
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) or 'none'}"


class ScoreConfig(StageConfig):
    """Which scores, with which settings."""

    scores: list[str] = ["auto", "msp", "energy", "knn", "knn+energy", "mahalanobis-pp", "ncm+energy"]
    k: PositiveInt | Literal["auto"] = "auto"
    top2: bool = False  # rows of the router's two most probable experts as well; doubles what has to be refined
    profile: Profile = "paper"
    params: dict[str, dict[str, Any]] = {}  # settings of single scores, over those of the profile
    temperature: float = Field(default=1.0, gt=0)
    bootstrap: int = Field(default=1000, ge=100)
