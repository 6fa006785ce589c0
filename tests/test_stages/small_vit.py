"""A ViT of six small blocks with seeded random weights, and what is needed to fine-tune it on a few digits."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from stages.config import BackboneConfig, FinetuneConfig
from stages.context import Context
from stages.extract import extract_set
from stages.finetune import TuningImages, finetune
from stages.id_data.rows import IdData, id_data
from stages.inputs.images import SampleTable
from stages.networks.backbone import load_backbone
from stages.training.recipes import MixturePlan
from tests.test_stages.drawn import create

NAME = "test_vit"
SMALL = FinetuneConfig(
    epochs=2, batch_size=15, lr=1e-3, hflip=0.0, crop_scale=0.8, warmup_epochs=0, drop_path=0.2, workers=0
)
PLAN = MixturePlan(
    experts=2,
    grouping="balanced",
    router_input="tap_cls",
    lr=3e-4,
    head_lr=1e-2,
    router_lr=1e-2,
    label_smoothing=0.0,
    other_weight=0.1,
)


def small_vit(folder: Path, name: str = NAME, image_size: int = 32) -> BackboneConfig:
    """Its weights in a file."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        save_file({key: tensor.contiguous() for key, tensor in create(name).state_dict().items()}, path)
    return BackboneConfig(name=name, weights=str(path), image_size=image_size)


def cached(config: BackboneConfig, images: SampleTable, folder: Path, patches: str = "full") -> IdData:
    """The ID side of a study on its features."""
    backbone = load_backbone(config)
    spec = backbone.feature_spec("float32", patches)
    cache = extract_set("few", images, spec, folder, lambda: backbone)
    return id_data(cache, None, val_share=0.25, cross_fit=False)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What ``metrics.jsonl`` of a fine-tune says, an epoch each."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tune(
    config: BackboneConfig,
    data: IdData,
    images: SampleTable,
    folder: Path,
    seed: int = 0,
    context: Context = Context(),
    mixture=None,
    **settings,
) -> bool:
    """Fine-tune it with the small settings and some others."""
    asked = SMALL.model_copy(update=settings)
    return finetune(config, TuningImages(data, images, images), asked, seed, folder, context, mixture)
