"""Images to fine-tune on: decoded and augmented in the background, and mixed by their place in the batch.

What is drawn for an image comes from (seed, epoch, image), what is drawn for a batch from (seed, epoch, batch). So a
run is the same whatever the number of processes that train, of passes that a batch is made of, and of workers.
timm's parts do the work: RandomResizedCrop, RandAugment, random erasing, Mixup and CutMix.
"""

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import timm.data
import torch
from numpy.typing import NDArray
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from cache import Failure
from stages.config import BackboneConfig
from stages.errors import InputError
from stages.id_data.rows import Labels
from stages.id_data.split import Rows
from stages.inputs.images import ImageError, SampleTable, decode_image
from stages.machine import usable_cores
from stages.mixture.mixup import mixing_weight
from stages.networks.weights.loading import transform_config
from stages.training.recipes import FinetuneSettings

_WORTH_WORKERS = 4096  # images: with fewer to load in all, starting processes takes longer than they save
_MOST_WORKERS = 8
_AHEAD = 4  # batches that each worker prepares in advance

_MIXING = 1  # what is drawn for a batch, apart from what is drawn for the image of the same number

# Which images (the place of their `ImageSet`), which of its rows, and (seed, epoch) to augment by; None: as they are.
Key = tuple[int, int, tuple[int, int] | None]


class ImageSet:
    """Images of some rows of a cache; picklable, so that any process can load them.

    Args:
        samples: the listing of the set.
        ids: of all rows of the cache.
        rows: which of them.
        labels: of all rows.
        augment: random transform to ``[3, H, W]``; drawn from Python's, numpy's and torch's own generators.
        plain: the transform without anything random.

    Raises:
        InputError: an image of the cache is not listed any more.
    """

    def __init__(
        self, samples: SampleTable, ids: NDArray[np.str_], rows: Rows, labels: Labels, augment: Any, plain: Any
    ) -> None:
        place = {id_: index for index, id_ in enumerate(samples.ids)}
        missing = [str(ids[row]) for row in rows if str(ids[row]) not in place]
        if missing:
            raise InputError(
                f"{samples.source}: {len(missing)} images of the cache are gone ({missing[0]} first): run make extract"
            )
        self.source = samples.source
        self.ids = [str(ids[row]) for row in rows]
        self.labels = labels[rows]
        self._index = [place[id_] for id_ in self.ids]
        self._reader = samples.reader()
        self._augment, self._plain = augment, plain

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, row: int, seed: tuple[int, int] | None) -> Tensor | Failure:
        """One image, ``[3, H, W]`` float32, or why it cannot be used."""
        try:
            image = decode_image(self._reader.read(self._index[row]))
        except ImageError as error:
            return Failure(self.ids[row], str(error))
        if seed is None:
            plain: Tensor = self._plain(image)
            return plain
        seed_generators([*seed, row])
        augmented: Tensor = self._augment(image)
        return augmented


def seed_generators(key: Sequence[int]) -> None:
    """Seed Python's, numpy's and torch's own generators, which timm and torchvision draw from."""
    drawn = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)


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


# --------------------------------------------------------------------------------------------------------- loading


class Loaded(NamedTuple):
    """A batch ``[b, 3, H, W]``, and the images of it that could not be used."""

    images: Tensor
    failures: list[Failure]


class ImageLoader:
    """Loads batches of images, in this process or in others in the background.

    Args:
        sets: that the first number of a `Key` counts.
        workers: processes; 0 loads in this one.
        pin: whether batches are put into pinned memory, from where they go to a GPU while it computes.
    """

    def __init__(self, sets: Sequence[ImageSet], workers: int, pin: bool = False) -> None:
        self.sets = sets
        self._asked = _Asked()
        how: dict[str, Any] = {}
        if workers:
            # A fork of this process would copy locks that its threads hold; a server that has only what loading needs.
            context = get_context("forkserver")
            context.set_forkserver_preload(["stages.training.augment"])
            how = {"multiprocessing_context": context, "persistent_workers": True, "prefetch_factor": _AHEAD}
            how |= {"worker_init_fn": _end_with_parent}
        self._loader = DataLoader(
            _Images(sets), batch_sampler=self._asked, num_workers=workers, collate_fn=_collate, pin_memory=pin, **how
        )

    def batches(self, asked: Sequence[list[Key]]) -> Iterator[Loaded]:
        """The batches of these keys, in order."""
        self._asked.batches = asked
        return iter(self._loader)

    def unusable(self, batch_size: int = 64) -> list[tuple[ImageSet, Failure]]:
        """Every image of all sets that cannot be used."""
        found: list[tuple[ImageSet, Failure]] = []
        for number, images in enumerate(self.sets):
            keys: list[Key] = [(number, row, None) for row in range(len(images))]
            batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
            found += [(images, failure) for loaded in self.batches(batches) for failure in loaded.failures]
        return found


def _end_with_parent(worker: int) -> None:
    """Let a worker end when the process that trains is killed: torch looks at the server's number instead of its."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(0)

    Thread(target=wait, daemon=True).start()


class _Asked:
    """What a loader is asked for next; it lasts longer than an epoch, and so do its workers."""

    batches: Sequence[list[Key]] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)


class _Images(Dataset[Tensor | Failure]):
    def __init__(self, sets: Sequence[ImageSet]) -> None:
        self._sets = sets

    def __getitem__(self, key: Key) -> Tensor | Failure:
        number, row, seed = key
        return self._sets[number].load(row, seed)


def _collate(items: list[Tensor | Failure]) -> Loaded:
    tensors = [item for item in items if isinstance(item, Tensor)]
    return Loaded(
        torch.stack(tensors) if tensors else torch.zeros(0), [item for item in items if isinstance(item, Failure)]
    )


def worker_count(asked: int | str, n_loads: int, processes: int) -> int:
    """How many processes decode for each of those that train; ``"auto"``: by the cores, none for little work."""
    if isinstance(asked, int):
        return asked
    if n_loads < _WORTH_WORKERS:
        return 0
    return max(1, min(_MOST_WORKERS, usable_cores() // processes - 1))


# --------------------------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """One step of the optimiser: which images, and who is mixed with whom."""

    number: int  # in its epoch
    rows: Rows  # [B] places in the training set
    partner: NDArray[np.int64]  # [B] place in the batch; a row without a partner is its own


class Share(NamedTuple):
    """What one pass of one process computes of a batch.

    Attributes:
        place: ``[b]`` of each row in the batch.
        paired: how many of them, at the start, are pairs: the i-th and the i-th from their end, as timm's Mixup has it.
    """

    place: NDArray[np.int64]
    paired: int


def plan_epoch(n: int, batch_size: int, seed: int, epoch: int, groups: NDArray[np.int64] | None = None) -> list[Batch]:
    """Batches of an epoch over n images, as equal as can be, so that no small one weighs as much as a whole one.

    The first of a batch is mixed with its last, the second with the one before, and so on, as in timm.

    Args:
        n: images.
        batch_size: the most that a batch may have.
        seed: fixes the order,
        epoch: another one in each.
        groups: ``[n]``: images are mixed with images of their own group alone.
    """
    order = np.random.default_rng((seed, epoch)).permutation(n)
    batches = []
    for number, rows in enumerate(np.array_split(order, -(-n // batch_size))):
        partner = np.arange(len(rows))
        own = np.zeros(len(rows), dtype=np.int64) if groups is None else groups[rows]
        for group in np.unique(own):
            members = np.flatnonzero(own == group)
            partner[members] = members[::-1]
        batches.append(Batch(number, rows, partner))
    return batches


def share_of(batch: Batch, part: int, parts: int) -> Share:
    """One of several parts of a batch; pairs stay together, so that no image is needed in two places."""
    index = np.arange(len(batch.rows))
    first, single = index[index < batch.partner], index[index == batch.partner]
    mine = first[part::parts]
    # Rows without a partner go where fewest pairs went.
    alone = single[(part - len(first)) % parts :: parts]
    return Share(np.concatenate([mine, batch.partner[mine][::-1], alone]), 2 * len(mine))


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
            seed_generators([self._seed, epoch, batch, _MIXING])
            _, targets[paired] = self._static(images[paired], labels[paired])  # the images in place
            return images, targets
        weights = self._mix_rows(images[paired], share.place[paired], epoch, batch, alpha)
        lam = torch.from_numpy(weights).float().to(targets.device)[:, None]
        targets[paired] = lam * targets[paired] + (1 - lam) * targets[paired].flip(0)
        return images, targets

    def _mix_rows(
        self, images: Tensor, place: NDArray[np.int64], epoch: int, batch: int, alpha: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Each row with its own weight, in place; returns these ``[b]``, those of CutMix by what the box covers."""
        rng = np.random.default_rng((self._seed, epoch, batch, _MIXING))
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
