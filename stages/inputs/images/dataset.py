"""Any map-style `torch.utils.data.Dataset` as a source of images, from Python."""

import operator
import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.errors import InputError
from stages.inputs.images.decode import ImageError, as_seen, short
from stages.inputs.images.names import given_class
from stages.inputs.images.netpbm import to_netpbm
from stages.inputs.images.table import FileRange, Sample, SampleTable, make_table

_ONE_AT_A_TIME = threading.Lock()  # a dataset may hold an open file; PyTorch itself reads one in one thread a process


class _Item(NamedTuple):
    """Image of one item of a dataset."""

    dataset: Any
    row: int

    def read(self) -> bytes:
        """Bytes of the file that the item gives, or its pixels as netpbm."""
        try:
            with _ONE_AT_A_TIME:
                item = self.dataset[self.row]
        except ImageError:
            raise
        except Exception as error:  # a dataset may raise anything
            raise ImageError(f"the dataset cannot give it: {type(error).__name__}: {short(error)}") from error
        return image_bytes(item[0] if isinstance(item, tuple | list) and item else item)


def list_dataset(
    dataset: Any,
    source: str,
    labels: Sequence[int | str | None] | None = None,
    class_names: Sequence[str] | None = None,
) -> SampleTable:
    """List the items of a dataset from Python; ids are their numbers.

    An item is an image or begins with one: a PIL image, bytes of an image file, a path, or uint8 pixels [h, w] or
    [h, w, 3] (a tensor: [3, h, w] as well). Give it no transform to floats: the backbone brings its own. Sizes and
    times are unknown without reading everything, so whether a cache is fresh is judged by the images' bytes.

    Args:
        dataset: Has a length and gives item i for index i, always the same. Worker processes get it pickled.
        source: What messages and the cache call it.
        labels: A number or a name per item, -1 or None where unknown; by default `dataset.targets` (as torchvision
            has it), else the second entry of every item, which takes one pass over the dataset.
        class_names: Name of each number; by default `dataset.classes`, else the numbers themselves.

    Raises:
        InputError: The dataset has no length or no item, or labels and class names do not fit.
    """
    try:
        n = len(dataset)
    except TypeError as error:
        raise InputError(f"{source}: the dataset has no length; give a map-style dataset") from error
    if not n:
        raise InputError(f"{source}: the dataset has no items")
    if labels is None:
        labels = getattr(dataset, "targets", None)
    if labels is None:
        labels = _second_entries(dataset, n)
    if len(labels) != n:
        raise InputError(f"{source}: {len(labels)} labels for {n} items; give one per item")
    names = _names(source, getattr(dataset, "classes", None) if class_names is None else class_names)
    return make_table(
        source,
        (
            Sample(f"{row:08d}", _class_name(source, row, label, names), -1, 0, _Item(dataset, row))
            for row, label in enumerate(labels)
        ),
    )


def _second_entries(dataset: Any, n: int) -> list[Any]:
    """Labels that the items themselves give; unknown where an item cannot be had, which is told when it is read."""
    labels: list[Any] = []
    for row in range(n):
        try:
            item = dataset[row]
        except Exception:
            labels.append(None)
            continue
        if not isinstance(item, tuple | list) or len(item) < 2:
            return [None] * n
        labels.append(item[1])
    return labels


def _names(source: str, class_names: Sequence[Any] | None) -> list[str] | None:
    """Class names by number; torchvision's ImageNet has a tuple of synonyms for each."""
    if class_names is None:
        return None
    names = [name if isinstance(name, str) else ", ".join(map(str, name)) for name in class_names]
    number_of: dict[str, int] = {}
    for number, name in enumerate(names):
        if (first := number_of.setdefault(name, number)) != number:
            raise InputError(f"{source}: classes {first} and {number} are both called {name!r}; give class_names")
    return names


def _class_name(source: str, row: int, label: Any, names: list[str] | None) -> str | None:
    if getattr(label, "ndim", None) == 0:  # a number of numpy or torch
        label = label.item()
    if isinstance(label, float) and (label != label or label.is_integer()):
        label = None if label != label else int(label)  # NaN is how pandas writes that there is none
    if label is None:
        return None
    if isinstance(label, str):
        return given_class(label)
    try:
        number = operator.index(label)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{source}: the label of item {row} is a {type(label).__name__}, must be a whole number or a name; "
            "give labels, -1 for unknown"
        ) from error
    if number < -1 or (names is not None and number >= len(names)):
        raise InputError(f"{source}: item {row} is of class {number}, must be -1 or the number of one of its classes")
    if number == -1:
        return None
    return str(number) if names is None else names[number]


def image_bytes(image: Any) -> bytes:
    """An image file's bytes of whatever stands for an image, as `list_dataset` takes it.

    Raises:
        ImageError: It is none.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return FileRange(os.fsdecode(image)).read()
    if isinstance(image, Image.Image):
        return to_netpbm(np.asarray(as_seen(image)))
    if hasattr(image, "detach") or isinstance(image, np.ndarray):
        return to_netpbm(_pixels(image))
    raise ImageError(f"a {type(image).__name__}, not an image; an item must be or begin with one")


def _pixels(image: Any) -> NDArray[np.uint8]:
    """Pixels [h, w] or [h, w, 3] of an array or a tensor."""
    dtype, shape = str(image.dtype).removeprefix("torch."), tuple(image.shape)
    if "float" in dtype:
        raise ImageError("already transformed: give a dataset without transform")
    is_tensor = hasattr(image, "detach")
    if dtype == "uint8" and is_tensor and len(shape) == 3 and shape[0] in (1, 3):
        if shape[2] in (1, 3):
            raise ImageError(f"a tensor of shape {list(shape)} may be read in two ways: give a NumPy array [h, w, 3]")
        image, shape = image.movedim(0, -1), (*shape[1:], shape[0])
    if dtype != "uint8" or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))):
        raise ImageError(f"pixels of type {dtype} and shape {list(shape)}; uint8 [h, w] or [h, w, 3] are expected")
    pixels: NDArray[np.uint8] = image.detach().cpu().numpy() if is_tensor else image
    return pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
