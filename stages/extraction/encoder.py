"""From pixels to rows of a cache: forward passes that all have one shape."""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from cache import FeatureSpec
from stages.networks.backbone import Backbone
from stages.networks.tokens import reduce_patches


class Encoder:
    """Runs a backbone on exactly ``backbone.batch`` images at a time; several threads may.

    Args:
        backbone: the network.
        spec: what is kept of its tokens, and in which type.
    """

    def __init__(self, backbone: Backbone, spec: FeatureSpec) -> None:
        self._backbone = backbone
        self._spec = spec

    def encode(self, images: Sequence[Tensor]) -> dict[str, NDArray[Any]]:
        """One forward pass; a batch that is not full is padded with its last image.

        Args:
            images: one to ``backbone.batch``, each ``[3, H, W]`` uint8, all on the CPU or all on the backbone's device.

        Returns:
            ``[n, …]`` for each of the spec's datasets, as it is stored; what does not fit the type is inf.
        """
        backbone, spec = self._backbone, self._spec
        padding = [images[-1]] * (backbone.batch - len(images))
        batch = torch.stack([*images, *padding])
        if backbone.device.type == "cuda" and not batch.is_cuda:
            batch = batch.pin_memory().to(backbone.device, non_blocking=True)
        batch = backbone.preprocessing.normalise(batch)
        tokens = reduce_patches(backbone.encode(batch), backbone.grid, spec.patches)[: len(images)]
        # torch casts four times faster than numpy.
        return {name: getattr(tokens, name).to(getattr(torch, spec.dtype)).cpu().numpy() for name in spec.datasets()}
