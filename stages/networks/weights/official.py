"""What DINOv2's authors do around the network: position embeddings at another size, and the evaluation's transform.

From the official code, github.com/facebookresearch/dinov2: `interpolate_pos_encoding` in
``dinov2/models/vision_transformer.py``, the settings of each model in ``dinov2/hub/backbones.py``, and
`make_classification_eval_transform` in ``dinov2/data/transforms.py``, which its k-NN and linear evaluations use.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Resize the short side to 256, crop 224 in the middle; other sizes by the same ratio. ImageNet's mean and deviation.
TRANSFORM = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 224 / 256,
}

# Added to the number of patches before it is divided: the models without registers were evaluated so.
_OFFSET = 0.1


def interpolate_positions(stored: Tensor, side: int, registers: bool) -> Tensor:
    """Position embeddings at another number of patches, as the official code gives them.

    Args:
        stored: ``[1, (1 +) N, D]``, N = M x M patches row-major, that of the class token first where there is one.
        side: patches a side that are asked for.
        registers: whether the model has registers: those models resize to a size, with antialiasing, and the others
            by a factor, 0.1 of a patch too large, without.

    Returns:
        ``[1, (1 +) side * side, D]`` in float32; what is stored, where the number is the same.
    """
    n_prefix = 0 if math.isqrt(stored.shape[1]) ** 2 == stored.shape[1] else 1
    prefix, patches = stored[:, :n_prefix].float(), stored[:, n_prefix:].float()
    before = math.isqrt(patches.shape[1])
    if before == side:
        return stored
    grid = patches.reshape(1, before, before, -1).permute(0, 3, 1, 2)
    if registers:
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    else:
        factor = (side + _OFFSET) / before
        grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", antialias=False)
    resized = grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)
    return torch.cat([prefix, resized], dim=1)
