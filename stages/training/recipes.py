"""How a mixture and a backbone are trained: presets, and the settings of the experiment with nothing left open.

A backbone has a recipe for small data and one for large. The large-data recipe is that of the paper's official code.
The small-data recipe trains longer on each image than it disturbs it: no Mixup, no RandAugment, and a learning rate for
a few hundred steps.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import PositiveInt

from cache import FeatureSpec
from stages.config import ExpertKind, FinetuneConfig, RouterInput, TrainConfig
from stages.errors import InputError
from stages.mixture.grouping import experts_for

# Settings that say how or where to work, or stand for others; the result is the same whatever they are.
_NOT_OF_THE_RESULT = {"preset", "workers", "seeds", "variants", "tensorboard"}


def recorded_settings(settings: "TrainSettings | FinetuneSettings") -> dict[str, Any]:
    """What the result depends on, as identities and documents have it."""
    recorded = settings.model_dump(exclude=_NOT_OF_THE_RESULT)
    # As all was trained before there was a choice.
    for key, before in (("start", "zero"), ("rate_steps", 0), ("l2_sp", 0.0)):
        if recorded.get(key) == before:
            del recorded[key]
    return recorded


# ---------------------------------------------------------------------------------------- a mixture, on cached features


class TrainSettings(TrainConfig):
    """Those of the experiment with the preset's values and nothing left open."""

    experts: PositiveInt
    expert: ExpertKind
    router_input: RouterInput


# "paper": the official code's recipe, where METHOD-relevant settings differ from ours; its α_min = α_max is not copied,
# since with it the difficulty of a class cannot matter. It keeps no average of the weights.
# "default": linear probing before fine-tuning (Kumar et al., "Fine-Tuning can Distort Pretrained Features and
# Underperform Out-of-Distribution", ICLR 2022): heads that start at zero teach the experts noise until they have
# learned, the more the more steps there are. What starts trained has a way to go that does not grow with the data: its
# rates are for `rate_steps` steps, and many steps are shorter ones.
TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # New layers learn a hundred times as fast: with a tenth of that they lag, and what they teach the ends is late. The
    # held-out ID loss is lowest after four to seven epochs.
    "zero": {"start": "zero", "epochs": 8, "head_lr": 1e-2, "router_lr": 1e-2, "rate_steps": 0},
    "paper": {
        "start": "zero",
        "epochs": 20,
        "label_smoothing": 0.1,
        "lr": 3.5e-5,
        "head_lr": 3.5e-5,
        "router_lr": 3.5e-5,
        "rate_steps": 0,
        "ema": 0.0,
    },
}


def resolve_settings(config: TrainConfig, n_classes: int, spec: FeatureSpec | None = None) -> TrainSettings:
    """Fill in the preset's values.

    Args:
        config: as the experiment has it.
        n_classes: C.
        spec: what there is to train on; by default all tokens, and a backbone whose end reads them.

    Raises:
        InputError: experts that need tokens, or the end of a backbone, where there is none.
    """
    has_end, has_tap = (spec is None or spec.expert_blocks > 0), (spec is None or spec.tap_dim > 0)
    given = TRAIN_PRESETS[config.preset] | config.model_dump(exclude_unset=True)
    started = given.get("start", config.start) == "probe"  # what the probe reads is known to separate the classes
    automatic: dict[str, Any] = {
        "experts": experts_for(n_classes),
        "expert": "end" if has_end else "adapter",
        "router_input": "tap_cls" if has_tap and not started else "cls",
    }
    resolved = {key: value for key, value in automatic.items() if getattr(config, key) == "auto"}
    settings = TrainSettings(**given | resolved)
    if settings.expert in ("end", "dense") and not has_end:
        raise InputError(
            f'train.expert: "{settings.expert}" is made of copies of a backbone\'s end, which read tokens: give '
            'features with tap_cls and patches and a [backbone], or take "adapter"'
        )
    if settings.router_input == "tap_cls" and not has_tap:
        raise InputError('train.router_input: the features have no tap_cls: give it, or take "cls"')
    if settings.mixup == "static":
        return settings.model_copy(update={"alpha_max": settings.alpha_min})
    if settings.mixup == "none":
        return settings.model_copy(update={"alpha_min": 0.0, "alpha_max": 0.0})
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


class FinetuneSettings(FinetuneConfig):
    """Those of the experiment with the preset's values and nothing left open."""

    preset: Literal["small", "paper"] = "small"

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0


# "paper": the official recipe: AdamW (0.9, 0.99), layer decay 0.75, RandAugment, erasing, Mixup and CutMix, 10 warm-up
# epochs.
FINETUNE_PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "paper": {
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
    },
}


def resolve_recipe(config: FinetuneConfig, n_train: int) -> FinetuneSettings:
    """Fill in the preset's values; ``auto`` takes the paper's recipe from `SMALL_DATA` images on.

    With ``beta = "dynamic"`` and neither Mixup nor CutMix asked for, Mixup is what is made dynamic.

    Raises:
        InputError: settings that contradict each other.
    """
    preset = config.preset
    if preset == "auto":
        preset = "paper" if n_train >= SMALL_DATA else "small"
    given = config.model_dump(exclude_unset=True)
    settings = FinetuneSettings(**FINETUNE_PRESETS[preset] | given | {"preset": preset})
    _check(settings)
    if settings.beta == "dynamic" and not settings.mixes:
        return settings.model_copy(update={"mixup": settings.alpha_max})
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
    if settings.joint and settings.freeze:
        raise InputError("finetune.freeze: joint says already which blocks are trained: give one of the two")
