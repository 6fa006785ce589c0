"""How a mixture and a backbone are trained: the settings with every default filled in.

A backbone has a recipe for small data and one for large. The large-data recipe is that of the paper's official code.
The small-data recipe trains longer on each image than it disturbs it: no Mixup, no RandAugment, and a learning rate for
a few hundred steps.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from cache import FeatureSpec
from stages.config import ExpertKind, FinetuneConfig, RouterInput, TrainConfig
from stages.errors import InputError
from stages.mixture.grouping import experts_for

# ---------------------------------------------------------------------------------------- a mixture, on cached features


@dataclass(frozen=True)
class TrainSettings:
    """`TrainConfig` with every default filled in."""

    experts: int
    grouping: str
    mixup: str
    epochs: int = 8  # with these rates the held-out ID loss is lowest after four to seven
    expert: ExpertKind = "end"
    router_input: RouterInput = "tap_cls"
    patience: int | None = None
    batch_size: int = 64
    lr: float = 1e-5  # of the experts' ends, which start from trained weights: three times more costs far-OOD
    head_lr: float = 1e-2  # new layers; with a tenth of it they lag, and what they teach the ends is late
    router_lr: float = 1e-2
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    other_weight: float = 0.1
    warmup_epochs: float = 1.0
    alpha_min: float = 0.1
    alpha_max: float = 0.8
    alpha_power: float = 1.0
    gradient_clip: float = 1.0
    ema: float = 0.99  # decay of the moving average of the weights
    precision: Literal["auto", "float32", "bfloat16"] = "auto"


# The official code's recipe, where METHOD-relevant settings differ from ours; its α_min = α_max is not copied, since
# with it the difficulty of a class cannot matter. It keeps no average of the weights.
PAPER_TRAIN: dict[str, Any] = {
    "epochs": 20,
    "label_smoothing": 0.1,
    "lr": 3.5e-5,
    "head_lr": 3.5e-5,
    "router_lr": 3.5e-5,
    "ema": 0.0,
}

# Keys of [train] that say how or where to work, or stand for others; the result is the same whatever they are.
_NOT_SETTINGS = {"preset", "tensorboard"}


def resolve_settings(config: TrainConfig, n_classes: int, spec: FeatureSpec | None = None) -> TrainSettings:
    """Fill in the preset's values.

    Args:
        config: as the experiment has it.
        n_classes: C.
        spec: what there is to train on; by default all tokens, and a backbone whose end reads them.

    Raises:
        InputError: ``alpha_min`` not below ``alpha_max`` with dynamic mixup; experts that need tokens, or the end of a
            backbone, where there is none.
    """
    given = {k: v for k, v in config.model_dump().items() if v is not None and k not in _NOT_SETTINGS}
    has_end, has_tap = (spec is None or spec.expert_blocks > 0), (spec is None or spec.tap_dim > 0)
    if given["expert"] == "auto":
        given["expert"] = "end" if has_end else "adapter"
    if given["router_input"] == "auto":
        given["router_input"] = "tap_cls" if has_tap else "cls"
    if given["expert"] in ("end", "dense") and not has_end:
        raise InputError(
            f'train.expert: "{given["expert"]}" is made of copies of a backbone\'s end, which read tokens: give '
            'features with tap_cls and patches and a [backbone], or take "adapter"'
        )
    if given["router_input"] == "tap_cls" and not has_tap:
        raise InputError('train.router_input: the features have no tap_cls: give it, or take "cls"')
    if given["experts"] == "auto":
        given["experts"] = experts_for(n_classes)
    settings = TrainSettings(**((PAPER_TRAIN if config.preset == "paper" else {}) | given))
    if settings.mixup == "static":
        settings = replace(settings, alpha_max=settings.alpha_min)
    elif settings.mixup == "none":
        settings = replace(settings, alpha_min=0.0, alpha_max=0.0)
    elif settings.alpha_min >= settings.alpha_max:
        raise InputError(
            f"train.alpha_min: {settings.alpha_min:g} given, must be below alpha_max = {settings.alpha_max:g}: "
            'with equal values difficulty cannot matter; that is mixup = "static"'
        )
    return settings


@dataclass(frozen=True)
class MixturePlan:
    """A mixture that is to be trained together with the blocks before it.

    Attributes:
        experts, grouping: how classes are grouped, by the features to start from.
        router_input: what the router reads.
        lr, head_lr, router_lr: of the experts' ends, their heads, and the router.
        label_smoothing, other_weight: as in stage two on cached features.
    """

    experts: int
    grouping: str
    router_input: RouterInput
    lr: float
    head_lr: float
    router_lr: float
    label_smoothing: float
    other_weight: float


# ------------------------------------------------------------------------------------------- a whole network, on images

SMALL_DATA = 50_000  # images below which preset = "auto" takes the small-data recipe

# Settings that say how or where to work; the result is the same whatever they are.
_NOT_OF_THE_RESULT = {"preset", "workers", "seeds", "variants", "tensorboard"}


@dataclass(frozen=True)
class FinetuneSettings:
    """`FinetuneConfig` with every default filled in; the defaults are the small-data recipe.

    Batch norm is frozen in both: its statistics stay the pre-trained ones, since small batches would spoil them, and
    several processes need not agree on any. Its scale and shift are trained.

    Attributes:
        batch_size: images of one step of the optimiser, over all processes and all of `accumulate` passes.
        head_epochs: epochs at the start in which the head alone is trained, at the constant rate `head_lr`.
        warmup_epochs: of the rising learning rate that follows; a cosine to zero ends the run.
        beta: whether the Beta distribution of the mixing weight depends on the class (dynamic) or not (static).
        mixup, cutmix: α of the static distribution; above 0: whether images are mixed so at all.
        freeze: how many first blocks (ViT) or stages (CNN) stay as they are, with all that stands before them.
        joint: how many blocks or stages before the tap are trained together with the experts; 0: no experts.
    """

    epochs: int = 10
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 3e-4
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    head_epochs: int = 0
    head_lr: float = 1e-3
    warmup_epochs: int = 1
    label_smoothing: float = 0.1
    rand_augment: str = ""
    random_erasing: float = 0.0
    crop_scale: float = 0.5
    hflip: float = 0.5
    beta: Literal["static", "dynamic"] = "static"
    mixup: float = 0.0
    cutmix: float = 0.0
    alpha_min: float = 0.1
    alpha_max: float = 0.8
    alpha_power: float = 1.0
    drop_path: float = 0.0
    gradient_clip: float = 1.0
    ema: float = 0.0
    patience: int | None = None
    freeze: int = 0
    joint: int = 0
    checkpointing: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0


# The official recipe: AdamW (0.9, 0.99), layer decay 0.75, RandAugment, erasing, Mixup and CutMix, 10 warm-up epochs.
PAPER_FINETUNE: dict[str, Any] = {
    "epochs": 100,
    "batch_size": 128,
    "lr": 3.5e-5,
    "warmup_epochs": 10,
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "crop_scale": 0.08,
    "mixup": 0.8,
    "cutmix": 1.0,
    "drop_path": 0.1,
}


def resolve_recipe(config: FinetuneConfig, n_train: int) -> FinetuneSettings:
    """Fill in the preset's values; ``auto`` takes the paper's recipe from `SMALL_DATA` images on.

    With ``beta = "dynamic"`` and neither Mixup nor CutMix asked for, Mixup is what is made dynamic.

    Raises:
        InputError: settings that contradict each other.
    """
    given = {k: v for k, v in config.model_dump(exclude=_NOT_OF_THE_RESULT).items() if v is not None}
    paper = config.preset == "paper" or (config.preset == "auto" and n_train >= SMALL_DATA)
    filled = (PAPER_FINETUNE if paper else {}) | given
    if filled["beta"] == "dynamic" and not filled.get("mixup") and not filled.get("cutmix"):
        filled["mixup"] = filled.get("alpha_max", FinetuneSettings.alpha_max)
    settings = FinetuneSettings(**filled)
    _check(settings)
    return settings


def _check(settings: FinetuneSettings) -> None:
    if settings.head_epochs >= settings.epochs:
        raise InputError(
            f"finetune.head_epochs: {settings.head_epochs} given, must be below epochs = {settings.epochs}: "
            "the backbone would never be trained"
        )
    if settings.accumulate > settings.batch_size:
        raise InputError(
            f"finetune.accumulate: {settings.accumulate} passes given for a batch of {settings.batch_size} images: "
            "give at most one pass an image"
        )
    if settings.beta == "dynamic" and settings.alpha_min >= settings.alpha_max:
        raise InputError(
            f"finetune.alpha_min: {settings.alpha_min:g} given, must be below alpha_max = {settings.alpha_max:g}: "
            'with equal values difficulty cannot matter; that is beta = "static"'
        )
    if settings.joint and settings.freeze:
        raise InputError("finetune.freeze: joint says already which blocks are trained: give one of the two")
