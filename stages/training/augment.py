"""What is drawn for images to train on: random transforms, and how images of a batch are mixed.

What is drawn for an image comes from (seed, epoch, image), what is drawn for a batch from (seed, epoch, batch). So a
run is the same whatever the number of processes that train, of passes that a batch is made of, and of workers.
timm's parts do the work: RandomResizedCrop, RandAugment, random erasing, Mixup and CutMix.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import timm.data
import torch
from numpy.typing import NDArray
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import BackboneConfig
from stages.errors import InputError
from stages.mixture.mixup import mixing_weight
from stages.networks.transfer import to_device
from stages.networks.weights.loading import transform_config
from stages.training.batches import Share
from stages.training.recipes import FinetuneSettings

MIXING = 1  # what is drawn for a batch, apart from what is drawn for the image of the same number


def seed_generators(key: Sequence[int], device: str = "cpu") -> None:
    """Seed Python's, numpy's and torch's own generators, which timm and torchvision draw from.

    Of torch's kinds of devices that which draws alone: `torch.manual_seed` takes milliseconds for those that are not in
    use, each time, to remember who has asked.

    Args:
        key: what is drawn for.
        device: kind of the one where a network draws.
    """
    drawn = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    torch.default_generator.manual_seed(drawn)
    if device == "cuda":
        torch.cuda.manual_seed_all(drawn)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever is drawn and seeded inside, the caller's random numbers stay what they are."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def transforms(model: nn.Module, backbone: BackboneConfig, settings: FinetuneSettings) -> tuple[Any, Any]:
    """The random transform to train with, and the plain one of the extraction.

    Raises:
        InputError: an augmentation that timm does not know.
    """
    config = transform_config(model, backbone)
    try:
        train = timm.data.create_transform(
            input_size=config["input_size"],
            is_training=True,
            scale=(settings.crop_scale, 1.0),
            hflip=settings.hflip,
            color_jitter=0.0,
            auto_augment=settings.rand_augment or None,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            re_prob=settings.random_erasing,
            re_mode="pixel",
        )
    except (AssertionError, ValueError) as error:  # of its parser
        raise InputError(
            f"finetune.rand_augment: {settings.rand_augment!r} given, timm cannot read it ({error}): give one such as "
            '"rand-m9-mstd0.5-inc1", or leave it out'
        ) from error
    return train, timm.data.create_transform(**config)


class Mixer:
    """Mixes the images of a share with each other, and says what they are then.

    Args:
        settings: how.
        n_classes: C.
        seed: of the run.
    """

    def __init__(self, settings: FinetuneSettings, n_classes: int, seed: int) -> None:
        self._settings = settings
        self._n_classes = n_classes
        self._seed = seed
        self._static = Mixup(settings.mixup, settings.cutmix, label_smoothing=0.0, num_classes=n_classes)

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        share: Share,
        epoch: int,
        batch: int,
        alpha: NDArray[np.float64] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mix in place.

        Args:
            images: ``[b, 3, H, W]`` of a share of a batch.
            labels: ``[b]`` int64.
            share: see `share_of`.
            epoch: number of it,
            batch: and of the batch; one mixing weight is drawn for all of it.
            alpha: ``[B]`` for dynamic mixing: Beta parameter of each row of the whole batch; each draws its own weight.

        Returns:
            The images and their soft targets ``[b, C]``.
        """
        targets = F.one_hot(labels, self._n_classes).float()
        paired = slice(0, share.paired)
        if not self._settings.mixes or share.paired == 0:
            return images, targets
        if alpha is None:
            seed_generators([self._seed, epoch, batch, MIXING])
            _, targets[paired] = self._static(images[paired], labels[paired])  # the images in place
            return images, targets
        weights = self._mix_rows(images[paired], share.place[paired], epoch, batch, alpha)
        lam = to_device(torch.from_numpy(weights).float(), targets.device)[:, None]
        targets[paired] = lam * targets[paired] + (1 - lam) * targets[paired].flip(0)
        return images, targets

    def _mix_rows(
        self, images: Tensor, place: NDArray[np.int64], epoch: int, batch: int, alpha: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Each row with its own weight, in place; returns these ``[b]``, those of CutMix by what the box covers."""
        rng = np.random.default_rng((self._seed, epoch, batch, MIXING))
        weight = mixing_weight(alpha, rng)
        cut, box = rng.random(len(alpha)) < self._cutmix_share, rng.integers(2**32, size=len(alpha))
        originals, found = images.flip(0), weight[place]
        for row, at in enumerate(place):
            if not cut[at]:
                images[row].lerp_(originals[row], 1 - found[row])
                continue
            np.random.seed(box[at])  # timm draws where the box is
            (top, bottom, left, right), found[row] = cutmix_bbox_and_lam(images.shape, found[row])
            images[row, :, top:bottom, left:right] = originals[row, :, top:bottom, left:right]
        return found

    @property
    def _cutmix_share(self) -> float:
        """Share of the rows that are mixed by CutMix, as timm has it."""
        both = self._settings.mixup > 0 and self._settings.cutmix > 0
        return 0.5 if both else float(self._settings.cutmix > 0)
