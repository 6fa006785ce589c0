"""Images in whatever form they are given: each of them is there, in order, or it is said why not."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from stages.detection.given import images_of, numbers_of
from stages.errors import InputError

PIL = [Image.new("RGB", (4, 4), (index, 0, 0)) for index in range(5)]
PATHS = [f"{index}.png" for index in range(5)]
PIXELS = [np.full((4, 4, 3), index, np.uint8) for index in range(5)]
GRAY = [np.full((4, 4), index, np.uint8) for index in range(5)]


def columns(items):
    return [*zip(*items, strict=True)]


def numbers(images):
    """Which of the images of above each is."""
    found = []
    for image in images:
        if isinstance(image, str):
            found.append(int(image.partition(".")[0]))
        else:
            found.append(int(np.asarray(image).flat[0]))
    return found


@pytest.mark.parametrize("images", [PIL, PATHS, PIXELS, GRAY])
@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        iter,
        lambda images: [(image, 7) for image in images],
        lambda images: [[image, "cat"] for image in images],
        lambda images: DataLoader(images, batch_size=2, collate_fn=list),
        lambda images: DataLoader(images, batch_size=2, collate_fn=tuple),
        lambda images: DataLoader([(image, 7) for image in images], batch_size=2, collate_fn=list),
        lambda images: DataLoader([(image, 7) for image in images], batch_size=3, collate_fn=columns),
        lambda images: DataLoader([(image, 7) for image in images], batch_size=1, collate_fn=columns),
        lambda images: DataLoader(images, batch_size=None, collate_fn=lambda image: image),
        lambda images: DataLoader([(image, 7) for image in images], batch_size=None, collate_fn=lambda item: item),
    ],
)
def test_all_are_there_in_order(form, images):
    assert numbers(images_of(form(images))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("images", [PATHS, PIXELS, GRAY, [torch.from_numpy(each) for each in PIXELS]])
@pytest.mark.parametrize("label", [None, 7, "cat"])
def test_torch_makes_batches(images, batch, label):
    """Stacked; of grey images a batch of three is no image of three colours."""
    items = images if label is None else [(image, label) for image in images]
    assert numbers(images_of(DataLoader(items, batch_size=batch))) == [0, 1, 2, 3, 4]


def test_masks_beside_images_are_left_alone():
    for images in (PIXELS, GRAY):
        pairs = [(image, image + 100) for image in images]
        for batch in (1, 3):
            assert numbers(images_of(DataLoader(pairs, batch_size=batch))) == [0, 1, 2, 3, 4]


def test_one_is_one():
    for image in (PIL[0], PATHS[0], PIXELS[0], GRAY[0], b"bytes", bytearray(b"bytes"), memoryview(b"bytes")):
        (found,) = images_of(image)
        assert found is image
    assert numbers(images_of(np.stack(PIXELS))) == [0, 1, 2, 3, 4]
    assert numbers(images_of(np.array(PATHS))) == numbers(images_of(np.array(PATHS, object))) == [0, 1, 2, 3, 4]
    for nothing in ([], np.zeros((0, 4, 4, 3), np.uint8), DataLoader([])):
        assert list(images_of(nothing)) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (3, "a int given: give images, their paths, or a list of them"),
        (None, "a NoneType given"),
        ({"a": PIL[0]}, "a dict given"),
        (io.BytesIO(b"bytes"), "a BytesIO given: give the bytes that it reads"),
        ([PIL[:2], PIL[2:]], "an item is a list of several images"),
        (DataLoader([{"image": 0}]), "a batch of the DataLoader is a dict"),
        (DataLoader([("a.png", "cat")] * 2, batch_size=2, collate_fn=list), "may be read in two ways"),
    ],
)
def test_what_is_not_clear_is_refused(given, said):
    with pytest.raises(InputError, match=said):
        list(images_of(given))


def test_features_are_arrays_of_numbers():
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = torch.from_numpy(rows)
    for given in (rows, rows.tolist(), rows.astype(int), tensor, tensor.bfloat16(), tensor.clone().requires_grad_()):
        np.testing.assert_array_equal(numbers_of("cls", given), rows)
    for given in (None, [["1"]], [[1.5, True]], rows.astype(complex), rows > 0, [[1], [1, 2]], {}, rows.astype(object)):
        with pytest.raises(InputError, match=r"^features: cls is no array of numbers$"):
            numbers_of("cls", given)
