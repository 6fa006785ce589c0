"""Transformers with seeded random weights whose LayerScale is drawn too, and real photographs to run them on.

At initialisation DINOv2's LayerScale is 1e-5: every block is nearly the identity, and a test that loses a block, or the
registers that it attends to, would pass. Drawn between 0.1 and 1, as large as in the trained models, it cannot.
"""

import re
from functools import cache

import numpy as np
import timm
import torch
from torch import Tensor, nn

from stages.config import BackboneConfig
from stages.inputs.images import decode_image, list_images
from stages.networks.backbone import Backbone

DINOV2 = "vit_small_patch14_dinov2"
DINOV2_REGISTERS = "vit_small_patch14_reg4_dinov2"


def draw_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw what initialisation leaves near a constant: LayerScale, class token, registers, attention."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.uniform_(0.1, 1, generator=generator)
            elif name in ("cls_token", "reg_token"):
                parameter.normal_(0, 0.5, generator=generator)
            elif "attn.qkv.weight" in name:
                parameter.normal_(0, 0.1, generator=generator)  # attention that prefers some tokens to others
    return model


def create(name: str, seed: int = 0, **kwargs) -> nn.Module:
    """A timm model without classifier, with seeded weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return draw_weights(timm.create_model(name, num_classes=0, **kwargs), seed).eval()


def as_dinov3s_files(state: dict[str, Tensor], bias: float) -> dict[str, Tensor]:
    """DINOv3's tensors as its authors' files have them.

    Args:
        state: of timm's model with biases of q and v (``…_qkvb``).
        bias: of q; twice as much of v. Keys share their tensor, and a mask takes theirs away.
    """
    found = {}
    for name, x in state.items():
        if name.endswith("q_bias"):
            parts = [torch.full_like(x, value) for value in (bias, 9.0, 2 * bias)]
            found[name.replace("q_bias", "qkv.bias")] = torch.cat(parts)
            found[name.replace("q_bias", "qkv.bias_mask")] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(len(x))
        elif not name.endswith("v_bias"):
            found[re.sub(r"gamma_(\d)", r"ls\1.gamma", name).replace("reg_token", "storage_tokens")] = x
    return found | {"mask_token": torch.ones_like(state["cls_token"][0])}


@cache
def dinov2(name: str, expert_blocks: int = 1) -> Backbone:
    """A whole DINOv2 ViT-S/14, 4 x 4 patches of 14 pixels."""
    model = _dinov2_model(name)
    return Backbone(model, BackboneConfig(name=name, image_size=56), expert_blocks)


@cache
def _dinov2_model(name: str) -> nn.Module:
    return create(name, img_size=56)


def photos(backbone: Backbone, n: int = 3) -> Tensor:
    """Crops of scikit-learn's two photographs through the backbone's own transform, ``[n, 3, H, W]``."""
    table = list_images("sklearn:photos")
    rows = np.linspace(0, len(table) - 1, n).astype(int)
    return torch.stack([backbone.transform(decode_image(table.reader().read(int(row)))) for row in rows])
