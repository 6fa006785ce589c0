"""The embedded sets: scikit-learn's digits and photographs."""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_sample_images

from stages.errors import InputError
from stages.inputs.images import decode_image, list_images
from stages.inputs.images.embedded import _train_part


def read_all(table):
    return [table.reader().read(i) for i in range(len(table))]


def test_digits_are_scikit_learns():
    table, digits = list_images("sklearn:digits"), load_digits()
    assert len(table) == len(digits.target)
    for sample_id, label, data in zip(table.ids, table.labels, read_all(table), strict=True):
        row = int(sample_id[2:6])
        assert label == digits.target[row] == int(sample_id[0])
        pixels = np.asarray(decode_image(data))
        assert pixels.shape == (8, 8, 3)
        np.testing.assert_allclose(pixels[..., 0], digits.images[row] * 255 / 16, atol=0.5)
    assert table.sizes.tolist() == [len(data) for data in read_all(table)]


def test_train_and_test_parts_are_disjoint_complete_and_stratified():
    whole, train, test = (list_images(f"sklearn:digits[0-6]/{part}") for part in ("all", "train", "test"))
    assert sorted(train.ids + test.ids) == list(whole.ids)
    assert whole.class_names == train.class_names == test.class_names == tuple("0123456")
    share = np.bincount(train.labels) / np.bincount(whole.labels)
    np.testing.assert_allclose(share, 0.6, atol=0.005)
    assert not set(read_all(train)) & set(read_all(test))


def test_equal_images_fall_on_one_side():
    pixels = np.random.default_rng(0).integers(0, 255, (5, 8, 8), np.uint8)
    part = _train_part(np.concatenate([pixels, pixels, pixels]), np.zeros(15, int))
    assert part[:5] == part[5:10] == part[10:]
    assert sum(part[:5]) == 3


def test_the_split_never_changes():
    ids = "\n".join(list_images("sklearn:digits/train").ids)
    assert hashlib.sha256(ids.encode()).hexdigest()[:16] == "a7a119301f4cfc9d"


def test_classes_can_be_chosen():
    assert list_images("sklearn:digits[3,5]").class_names == ("3", "5")
    assert list_images("sklearn:digits[0-1,8]/test").class_names == ("0", "1", "8")
    near = list_images("sklearn:digits[7-9]")
    assert near.class_names == ("7", "8", "9")
    assert not set(near.ids) & set(list_images("sklearn:digits[0-6]").ids)


def test_photos_are_cut_on_a_regular_grid():
    table, photos = list_images("sklearn:photos"), load_sample_images().images
    assert len(table) == 154
    assert table.class_names == ("china", "flower")
    crops = dict(zip(table.ids, read_all(table), strict=True))
    assert np.array_equal(decode_image(crops["china/000-000.ppm"]), photos[0][:112, :112])
    assert np.array_equal(decode_image(crops["flower/300-500.ppm"]), photos[1][300:412, 500:612])


@pytest.mark.parametrize(
    "source",
    [
        "sklearn:",
        "sklearn:iris",
        "sklearn:digits[]",
        "sklearn:digits[0-6",
        "sklearn:digits[6-0]",
        "sklearn:digits[10]",
        "sklearn:digits[a]",
        "sklearn:digits/val",
        "sklearn:digits[1]/",
        "sklearn:photos/train",
    ],
)
def test_other_names_are_refused_with_what_there_is(source):
    with pytest.raises(InputError, match=r"sklearn:digits, .* and sklearn:photos"):
        list_images(source)
