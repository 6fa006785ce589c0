"""How a backbone is fine-tuned: the settings with every default filled in, for small data and for large.

The large-data recipe is that of the paper's official code. The small-data recipe trains longer on each image than it
disturbs it: no Mixup, no RandAugment, and a learning rate for a few hundred steps.
"""

from dataclasses import dataclass
from typing import Any, Literal

from stages.config import FinetuneConfig
from stages.errors import InputError

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
PAPER: dict[str, Any] = {
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
    filled = (PAPER if paper else {}) | given
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
