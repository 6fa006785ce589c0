"""Images to train on and to judge by: decoded and augmented, in this process or in others in the background."""

from collections.abc import Iterator, Sequence
from multiprocessing import forkserver, get_context
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cache import Failure
from stages.errors import InputError
from stages.id_data.rows import Labels
from stages.id_data.split import Rows
from stages.inputs.images import ImageError, SampleTable, decode_image
from stages.machine import end_with_parent, usable_cores
from stages.training.augment import seed_generators

_WORTH_WORKERS = 4096  # images: with fewer to load in all, starting processes takes longer than they save
_MOST_ON_CPU = 8  # workers beside a network that computes on the same cores
_MOST_AHEAD = 32  # batches that all workers prepare in advance, and so workers: memory does not grow with the cores
_AHEAD = 4  # of these, each worker's at most

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
            expect_workers()
            context = get_context("forkserver")  # a fork of this process would copy locks that its threads hold
            how = {"multiprocessing_context": context, "persistent_workers": True, "worker_init_fn": _begin_worker}
            how |= {"prefetch_factor": batches_ahead(workers)}
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


def _begin_worker(worker: int) -> None:
    end_with_parent()  # torch looks at the server's number instead of the training process's


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


def worker_count(asked: int | str, n_loads: int, processes: int, device: str) -> int:
    """How many processes decode for each of those that train.

    Args:
        asked: the setting; ``"auto"``: a core each, but for that of the process that trains, and none for little work.
        n_loads: images that one of those that train loads in all its epochs.
        processes: that train together on this machine.
        device: kind of the one that computes.
    """
    if isinstance(asked, int):
        return asked
    if n_loads < _WORTH_WORKERS:
        return 0
    most = _MOST_ON_CPU if device == "cpu" else _MOST_AHEAD
    return max(1, min(most, usable_cores() // processes - 1))


def batches_ahead(workers: int) -> int:
    """How many batches each worker prepares in advance: the more workers, the fewer."""
    return max(1, min(_AHEAD, _MOST_AHEAD // workers))


def expect_workers() -> None:
    """Begin to start the server that workers are forked from: it imports what loading needs, which takes seconds."""
    get_context("forkserver").set_forkserver_preload([__name__])
    forkserver.ensure_running()
