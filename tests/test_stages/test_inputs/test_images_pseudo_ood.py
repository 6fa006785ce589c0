"""Images that play OOD: made of the bytes of ID images and of nothing else, whatever their size and shape."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from stages.inputs.images import decode_image, list_dataset, list_images
from stages.inputs.images.pseudo_ood import PSEUDO_IMAGES, list_pseudo_ood

PHOTOS = list_images("sklearn:photos")


def made(samples, row=0, other=90):
    """Pixels of an image of every kind."""
    table = list_pseudo_ood(samples, [row], [other])
    return {
        name.partition("/")[0]: np.asarray(decode_image(table.reader().read(at))) for at, name in enumerate(table.ids)
    }


def test_every_kind_is_made_and_none_is_the_image_or_another_kind():
    found = made(PHOTOS)
    assert set(found) == set(PSEUDO_IMAGES)
    image = np.asarray(decode_image(PHOTOS.reader().read(0)))
    small = {kind: np.asarray(Image.fromarray(own).resize((28, 28)), float) for kind, own in found.items()}
    small["as it is"] = np.asarray(Image.fromarray(image).resize((28, 28)), float)
    kinds = list(small)
    apart = [np.abs(small[one] - small[other]).mean() for one in kinds for other in kinds if one < other]
    assert min(apart) > 0.2  # of 255; what is blurred and what is coarse are alike in the small
    assert np.abs(small["blurred"] - small["as it is"]).mean() < np.abs(small["tiles"] - small["as it is"]).mean()


def test_the_same_bytes_give_the_same_image_wherever_they_stand():
    again = replace(PHOTOS, ids=tuple(f"renamed/{name}" for name in PHOTOS.ids), contents=PHOTOS.contents)
    for kind, pixels in made(PHOTOS).items():
        np.testing.assert_array_equal(pixels, made(again)[kind])
    moved = made(PHOTOS, row=1)
    assert all(not np.array_equal(pixels, moved[kind]) for kind, pixels in made(PHOTOS).items())


def test_tiles_keep_the_pixels_and_two_images_are_in_what_is_mixed():
    found, image = made(PHOTOS), np.asarray(decode_image(PHOTOS.reader().read(0)))
    np.testing.assert_array_equal(np.sort(found["tiles"].reshape(-1)), np.sort(image.reshape(-1)))
    assert not np.array_equal(found["tiles"], image)
    others = made(PHOTOS, other=91)
    changed = {kind for kind, pixels in found.items() if not np.array_equal(pixels, others[kind])}
    assert changed == {"blended", "pasted"}


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (5, 70), (300, 40, 3), (1000, 700, 3)])
def test_images_of_any_size_and_shape(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    samples = list_dataset([pixels, pixels[::-1].copy()], "drawn", labels=[0, 1])
    assert all(min(own.shape[:2]) >= 50 for own in made(samples, 0, 1).values())
    assert all(min(own.shape[:2]) <= 256 for own in made(samples, 0, 1).values())


def test_they_are_listed_by_kind_and_are_new_where_an_image_is():
    table = list_pseudo_ood(PHOTOS, [3, 5], [80, 81])
    assert list(table.ids) == sorted(f"{kind}/{PHOTOS.ids[row]}" for kind in PSEUDO_IMAGES for row in (3, 5))
    assert (table.labels == -1).all()
    assert set(table.sizes.tolist()) == {int(PHOTOS.sizes[[3, 80]].sum()), int(PHOTOS.sizes[[5, 81]].sum())}
    unknown = replace(PHOTOS, sizes=np.full_like(PHOTOS.sizes, -1))
    assert set(list_pseudo_ood(unknown, [3], [4]).sizes.tolist()) == {-1}
