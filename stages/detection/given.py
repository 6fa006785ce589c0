"""What a detector is given: images in whatever form, one or many, and arrays of features."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.errors import InputError

_IMAGES = "give images, their paths, or a list of them"


def images_of(given: Any) -> Iterator[Any]:
    """The images of whatever holds several, or the one that is given; none is left out silently.

    Args:
        given: as of `stages.detection.detector.Detector.score`.

    Raises:
        InputError: what is given, or an item of it, may be read in two ways or in none.

    >>> list(images_of("cat.jpg")), list(images_of([("cat.jpg", 3), ("dog.jpg", 5)]))
    (['cat.jpg'], ['cat.jpg', 'dog.jpg'])
    """
    if _is_one(given):
        return iter([given])
    if hasattr(given, "collate_fn"):  # a DataLoader
        return _of_loader(given)
    if hasattr(given, "read"):
        raise InputError(f"a {type(given).__name__} given: give the bytes that it reads, or the path of the file")
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise InputError(f"a {type(given).__name__} given: {_IMAGES}")
    return map(_of_item, given)


def _is_one(given: Any) -> bool:
    """Whether it is an image, and no collection of them."""
    if isinstance(given, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(given, "getexif"):
        return True
    if "object" in str(getattr(given, "dtype", "")) or getattr(getattr(given, "dtype", None), "kind", "") in ("U", "T"):
        return False  # paths, of numpy or pandas
    return hasattr(given, "dtype") and getattr(given, "ndim", 0) < 4


def _is_image(given: Any) -> bool:
    """Whether it may be one image: an array of one dimension or none is a label."""
    return _is_one(given) and getattr(given, "ndim", 3) > 1


def _is_several(given: Any) -> bool:
    return isinstance(given, tuple | list)


def _of_item(item: Any) -> Any:
    """The image that an item of a dataset is, or begins with: (image, label)."""
    if not _is_several(item) or not item:
        return item
    if any(_is_image(other) and not isinstance(other, str | bytes) for other in item[1:]):  # a text names a class
        raise InputError(f"an item is a {type(item).__name__} of several images: {_IMAGES}")
    return item[0]


def _of_loader(loader: Any) -> Iterator[Any]:
    is_batched = getattr(loader, "batch_sampler", None) is not None
    by_torch = getattr(loader.collate_fn, "__name__", "") == "default_collate"
    for batch in loader:
        if is_batched:
            yield from _of_batch(batch, by_torch)
        else:
            yield _of_item(batch)


def _of_batch(batch: Any, by_torch: bool) -> Iterable[Any]:
    """Images of a batch: of stacked ones, of a column of such beside labels, or of items.

    Args:
        batch: as a DataLoader gives it.
        by_torch: whether torch's own `default_collate` made it, which makes columns of tuples.
    """
    if hasattr(batch, "ndim"):
        return batch  # stacked, whatever the shape of one
    if not _is_several(batch):
        raise InputError(
            f"a batch of the DataLoader is a {type(batch).__name__}: it must be images, or begin with them"
        )
    if not batch:
        return batch
    if hasattr(batch[0], "ndim"):  # stacked, beside labels or masks; or an image of a list
        return batch[0] if by_torch or not all(map(_is_image, batch)) else batch
    if not _is_several(batch[0]):
        return map(_of_item, batch)
    if by_torch:
        return _of_batch(batch[0], by_torch)
    if not all(map(_is_image, batch[0])):  # (image, label), …
        return map(_of_item, batch)
    if len(batch) > 1 and _is_several(batch[1]) and all(map(_is_image, batch[1])):
        raise InputError("a batch of the DataLoader may be read in two ways: let collate_fn give a list of images")
    return batch[0]


def _has_truth(given: Any) -> bool:
    """Whether there is True or False somewhere in a list, which NumPy would take for 1 and 0."""
    kinds = set(map(type, given))
    return any(map(_has_truth, given)) if kinds <= {list, tuple} else bool in kinds


def numbers_of(name: str, given: Any) -> NDArray[Any]:
    """An array of features, also of a tensor: of bfloat16, on a GPU, with a gradient.

    Raises:
        InputError: it is no array of real numbers.
    """
    if hasattr(given, "detach"):
        given = given.detach().cpu()
        given = given.float() if "bfloat16" in str(given.dtype) else given
    try:
        found = np.asarray(given)
    except ValueError:  # rows of different lengths
        found = np.asarray(None)
    if found.dtype.kind not in "iuf" or (isinstance(given, list | tuple) and _has_truth(given)):
        raise InputError(f"features: {name} is no array of numbers")
    return found
