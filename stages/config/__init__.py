"""Settings of every stage: typed, frozen, unknown keys refused.

They stand in one light module, and not beside what they configure, so that an experiment file is checked in
milliseconds, before torch is imported.
"""

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from stages.config.backbone_names import canonical_name, has_official_recipe

# What a file of features may hold, see stages/inputs/arrays.
ARRAY_FEATURES = ("cls", "tap_cls", "registers", "patches", "logits")
ARRAY_KEYS = (*ARRAY_FEATURES, "label", "id")


class StageConfig(BaseModel):
    """Settings of one stage; strict types, so that ``epochs = "20"`` is an error and not a guess."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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
    image_size: int = Field(default=224, ge=16)
    decode: Literal["pil", "draft", "cuda"] = "pil"
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # auto: float32, but float16 on a GPU
    compile: bool = False  # torch.compile: worth its minutes for large sets on a GPU
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


class TrainConfig(StageConfig):
    """How the Mixture of Feature Experts is trained; ``None`` means: as the preset has it."""

    model_config = ConfigDict(allow_inf_nan=False)

    experts: PositiveInt | Literal["auto"] = "auto"
    expert: Literal["auto", ExpertKind] = "auto"  # auto: "end", but "adapter" on features that came without tokens
    router_input: Literal["auto", RouterInput] = "auto"  # auto: "tap_cls" where there is one
    grouping: str = "balanced"  # "balanced", "kmeans" or a JSON file {class: group}
    mixup: Literal["dynamic", "static", "none"] = "dynamic"
    epochs: PositiveInt | None = None
    patience: PositiveInt | None = None  # epochs without a lower held-out loss after which to stop; None: never
    preset: Literal["default", "paper"] = "default"
    batch_size: PositiveInt | None = None
    lr: float | None = Field(default=None, gt=0)
    head_lr: float | None = Field(default=None, gt=0)
    router_lr: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    label_smoothing: float | None = Field(default=None, ge=0, lt=1)
    other_weight: float | None = Field(default=None, ge=0)
    warmup_epochs: float | None = Field(default=None, ge=0)
    alpha_min: float | None = Field(default=None, ge=0)
    alpha_max: float | None = Field(default=None, ge=0)
    alpha_power: float | None = Field(default=None, gt=0)
    gradient_clip: float | None = Field(default=None, gt=0)
    ema: float | None = Field(default=None, ge=0, lt=1)  # 0: the weights themselves and not their moving average
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32, but mixed with bfloat16 on a GPU
    tensorboard: bool = False  # an event file beside metrics.jsonl; needs the extra "tensorboard"


class FinetuneConfig(StageConfig):
    """How the backbone and a linear head are trained; ``None`` means: as the preset has it."""

    model_config = ConfigDict(allow_inf_nan=False)

    epochs: PositiveInt | None = None
    preset: Literal["auto", "small", "paper"] = "auto"
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(strict=False)] | None = None  # some of the study's; None: all
    variants: Annotated[tuple[str, ...], Field(strict=False)] | None = None  # trained on its features; None: all
    batch_size: PositiveInt | None = None
    accumulate: PositiveInt = 1  # forward and backward passes that a batch is made of: less memory, the same batch
    lr: float | None = Field(default=None, gt=0)
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    weight_decay: float | None = Field(default=None, ge=0)
    head_epochs: NonNegativeInt = 0  # of the head alone, before the backbone is trained
    head_lr: float | None = Field(default=None, gt=0)
    warmup_epochs: int | None = Field(default=None, ge=0)
    label_smoothing: float | None = Field(default=None, ge=0, lt=1)
    rand_augment: str | None = None
    random_erasing: float | None = Field(default=None, ge=0, le=1)
    crop_scale: float | None = Field(default=None, gt=0, le=1)  # smallest share of the image that a crop keeps
    hflip: float | None = Field(default=None, ge=0, le=1)  # 0 for images whose mirror image is another class
    beta: Literal["static", "dynamic"] = "static"  # dynamic: harder classes are mixed more (Dynamic-β)
    mixup: float | None = Field(default=None, ge=0)
    cutmix: float | None = Field(default=None, ge=0)
    alpha_min: float | None = Field(default=None, ge=0)
    alpha_max: float | None = Field(default=None, ge=0)
    alpha_power: float | None = Field(default=None, gt=0)
    drop_path: float | None = Field(default=None, ge=0, lt=1)
    gradient_clip: float | None = Field(default=None, ge=0)  # 0: not clipped
    ema: float | None = Field(default=None, ge=0, lt=1)  # 0: the weights themselves and not their moving average
    patience: PositiveInt | None = None  # epochs without a lower held-out loss after which to stop; None: never
    freeze: NonNegativeInt = 0  # first blocks (ViT) or stages (CNN) that stay as they are
    joint: NonNegativeInt = 0  # blocks or stages before the experts that are trained together with them; 0: no experts
    checkpointing: bool = False  # gradient checkpointing: less memory, a third more work
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32, but bfloat16 on a GPU that has it
    compile: bool = False  # torch.compile
    workers: NonNegativeInt | Literal["auto"] = "auto"  # processes that decode and augment in the background
    tensorboard: bool = False  # an event file beside metrics.jsonl; needs the extra "tensorboard"


TAKEN_NAMES = ("id", "average")  # words of the table's own, which no OOD set may be called

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

    scores: list[str] = ["msp", "energy", "knn", "knn+energy"]
    k: PositiveInt | Literal["auto"] = "auto"
    top2: bool = False  # rows of the router's two most probable experts as well; doubles what has to be refined
    profile: Profile = "paper"
    params: dict[str, dict[str, Any]] = {}  # settings of single scores, over those of the profile
    temperature: float = Field(default=1.0, gt=0)
    bootstrap: int = Field(default=1000, ge=100)
