"""The held-out split: by image, per class, the same whatever the order of the rows, the other classes or the seed."""

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.id_data.split import CROSS_FITTING_FOLDS, MIN_ROWS, N_PARTS, split_rows, split_with_validation_set


def hashes(names) -> np.ndarray:
    """SHA-256 of each image, as a cache holds them."""
    return np.frombuffer(b"".join(hashlib.sha256(str(name).encode()).digest() for name in names), np.uint8).reshape(
        -1, 32
    )


def id_set(per_class: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat(np.arange(classes, dtype=np.int32), per_class)
    return labels, hashes(range(len(labels)))


def images(rows, image_hashes) -> set[bytes]:
    return {image_hashes[row].tobytes() for row in rows}


def parts(split) -> list[np.ndarray]:
    (fold,) = split.folds
    return [fold.train, fold.select, fold.calibrate]


def test_a_share_of_each_class_is_held_out_and_halved():
    labels, image_hashes = id_set(40)
    split = split_rows(labels, image_hashes, val=0.2)
    assert not split.cross_fitted
    assert split.held_out == "id-train"
    assert np.array_equal(np.sort(np.concatenate(parts(split))), np.arange(120))  # every row has one part
    assert [np.bincount(labels[rows]).tolist() for rows in parts(split)] == [[32] * 3, [4] * 3, [4] * 3]
    assert np.array_equal(split.final_train, split.folds[0].train)
    assert split.rule == "held-out split: 0.2 of id-train per class by image hash, halved into select and calibrate"


def test_time_does_not_grow_with_rows_times_classes():
    labels, image_hashes = id_set(2, classes=20_000)  # the middles of all classes are looked up among all rows
    start = time.process_time()
    split_rows(labels, image_hashes, val=0.2, cross_fit=False)
    assert time.process_time() - start < 3


@given(
    image=st.lists(st.integers(0, 25), min_size=2, max_size=80),
    label=st.randoms(use_true_random=False),
    val=st.floats(0.05, 0.6),
    cross_fit=st.booleans(),
)
def test_no_image_stands_in_two_parts(image, label, val, cross_fit):
    """Copies of an image are one image, under whatever label."""
    labels = np.array([label.randrange(3) for _ in image], np.int32)
    image_hashes = hashes(image)
    split = split_rows(labels, image_hashes, val, cross_fit)
    for fold in split.folds:
        assert not images(fold.train, image_hashes) & images(
            np.concatenate([fold.select, fold.calibrate]), image_hashes
        )
        assert np.array_equal(
            np.unique(np.concatenate([fold.train, fold.select, fold.calibrate])), np.arange(len(image))
        )
        assert not images(fold.select, image_hashes) & images(fold.calibrate, image_hashes)
        assert np.array_equal(fold.select, split.select)
    assert not images(split.final_train, image_hashes) & images(split.select, image_hashes)


@given(per_class=st.lists(st.integers(1, 9), min_size=2, max_size=12), first=st.integers(0, 99))
def test_both_halves_have_rows_however_few_a_class_has(per_class, first):
    """Classes are halved to a row, and so is the whole; one row a class is enough."""
    labels = np.repeat(np.arange(len(per_class), dtype=np.int32), per_class)
    image_hashes = hashes(range(first, first + len(labels)))
    _, select, calibrate = parts(split_with_validation_set(9, labels, image_hashes))
    assert np.array_equal(np.sort(np.concatenate([select, calibrate])), np.arange(len(labels)))
    counts = [np.bincount(labels[rows], minlength=len(per_class)) for rows in (select, calibrate)]
    assert np.abs(counts[0] - counts[1]).max() <= 1
    assert 0 <= len(select) - len(calibrate) <= 1


@given(per_class=st.lists(st.integers(3, 12), min_size=2, max_size=12), val=st.floats(0.05, 0.6))
def test_every_model_has_rows_of_every_class_from_three_images_on(per_class, val):
    labels = np.repeat(np.arange(len(per_class), dtype=np.int32), per_class)
    split = split_rows(labels, hashes(range(len(labels))), val)
    for fold in split.folds:
        assert np.bincount(labels[fold.train], minlength=len(per_class)).min() >= 1
        assert min(len(fold.select), len(fold.calibrate)) >= 1


@pytest.mark.parametrize("per_class", [10, 40])
def test_split_follows_the_images_and_not_their_order(per_class):
    labels, image_hashes = id_set(per_class)
    order = np.random.default_rng(0).permutation(len(labels))
    here, there = split_rows(labels, image_hashes, 0.2), split_rows(labels[order], image_hashes[order], 0.2)
    assert here.rule == there.rule
    for ours, theirs in zip(here.folds, there.folds, strict=True):
        for name in ("train", "select", "calibrate"):
            assert images(getattr(ours, name), image_hashes) == images(getattr(theirs, name), image_hashes[order])


def test_other_classes_change_nothing():
    labels, image_hashes = id_set(40, classes=5)
    first = labels < 2
    for some, every in zip(
        parts(split_rows(labels[first], image_hashes[first], 0.2)),
        parts(split_rows(labels, image_hashes, 0.2)),
        strict=True,
    ):
        assert np.array_equal(some, every[labels[every] < 2])


def test_numbers_of_the_classes_change_nothing():
    """Renaming classes reorders them; images that stand in two classes must not change sides."""
    labels, image_hashes = np.repeat(np.arange(3, dtype=np.int32), 40), hashes(np.arange(120) % 70)
    for here, there in zip(
        parts(split_rows(labels, image_hashes, 0.2)), parts(split_rows(2 - labels, image_hashes, 0.2)), strict=True
    ):
        assert np.array_equal(here, there)


def test_new_images_of_a_class_move_few_rows():
    """The hash decides: with a tenth more images, nearly every old one stays on its side."""
    labels, image_hashes = id_set(440, classes=1)
    before, after = (parts(split_rows(labels[:n], image_hashes[:n], 0.2))[0] for n in (400, 440))
    assert len(np.setxor1d(before, after[after < 400])) < 20


def test_split_depends_on_nothing_random():
    """It takes no seed; every method, variant and seed of a study sees the same rows."""
    labels, image_hashes = id_set(40)
    first = parts(split_rows(labels, image_hashes, 0.2))
    np.random.seed(1)
    assert all(np.array_equal(a, b) for a, b in zip(first, parts(split_rows(labels, image_hashes, 0.2)), strict=True))
    assert first[1].tolist() == [22, 24, 25, 38, 48, 63, 68, 75, 103, 106, 108, 110]


# ----------------------------------------------------------------------------------------------- small classes


@pytest.mark.parametrize(("per_class", "cross_fitted"), [(29, False), (26, False), (25, True), (10, True)])
def test_cross_fitting_where_a_class_has_too_few_rows(per_class, cross_fitted):
    """A fifth of 26 rows is 6, two halves of 3; a fifth of 25 is 5, too few. One small class is enough."""
    labels, image_hashes = id_set(60)
    kept = np.concatenate([np.flatnonzero(labels != 1), np.flatnonzero(labels == 1)[:per_class]])
    split = split_rows(labels[kept], image_hashes[kept], 0.2)
    assert split.cross_fitted == cross_fitted
    if not cross_fitted:
        counts = [np.bincount(labels[kept][rows]).min() for rows in parts(split)[1:]]
        assert min(counts) >= MIN_ROWS


def test_cross_fitting_selects_all_models_on_the_share_and_calibrates_every_other_row_by_one_that_did_not_see_it():
    labels, image_hashes = id_set(10)
    split = split_rows(labels, image_hashes, 0.2)
    assert len(split.folds) == CROSS_FITTING_FOLDS
    assert np.bincount(labels[split.select]).tolist() == [2, 2, 2]
    kept = np.setdiff1d(np.arange(30), split.select)
    for fold in split.folds:
        assert np.array_equal(fold.select, split.select)
        assert np.array_equal(np.sort(np.concatenate([fold.train, fold.calibrate])), kept)
        assert set(np.bincount(labels[fold.calibrate])) <= {2, 3}  # every class, evenly
    assert np.array_equal(np.sort(np.concatenate([fold.calibrate for fold in split.folds])), kept)
    assert np.array_equal(split.final_train, kept)
    assert split.rule == (
        "cross-fitting: 0.2 of id-train per class by image hash selects, 3 folds of the rest calibrate (a half of that "
        "share would have fewer than 3 rows of a class), banks and heads leave out 20 parts in turn"
    )


def test_final_model_has_the_same_rows_whether_it_is_cross_fitted_or_not():
    """So have the pre-trained and the fine-tuned backbone of two studies."""
    labels, image_hashes = id_set(10)
    crossed, halved = (split_rows(labels, image_hashes, 0.2, cross_fit) for cross_fit in (True, False))
    assert np.array_equal(crossed.final_train, halved.final_train)
    assert np.array_equal(crossed.select, np.union1d(*parts(halved)[1:]))


def test_a_class_of_two_images_is_cross_fitted_and_selects_on_none():
    labels, image_hashes = id_set(10)
    kept = np.concatenate([np.flatnonzero(labels != 1), np.flatnonzero(labels == 1)[:2]])
    split = split_rows(labels[kept], image_hashes[kept], 0.6)
    assert np.bincount(labels[kept][split.select]).tolist() == [6, 0, 6]
    for fold in split.folds:
        assert (labels[kept][fold.train] == 1).any()


def test_backbone_that_is_trained_cannot_be_cross_fitted_and_halves_few_rows():
    labels, image_hashes = id_set(10)
    split = split_rows(labels, image_hashes, 0.2, cross_fit=False)
    train, select, calibrate = parts(split)
    assert [np.bincount(labels[rows]).tolist() for rows in (select, calibrate)] == [[1, 1, 1]] * 2
    assert np.array_equal(np.sort(np.concatenate([train, select, calibrate])), np.arange(30))
    assert split.rule.endswith("halved into select and calibrate (1 of a class in the smaller half)")
    large = id_set(40)
    assert split_rows(*large, 0.2, cross_fit=False).rule == split_rows(*large, 0.2).rule


@given(
    image=st.lists(st.integers(0, 60), min_size=6, max_size=90),
    label=st.randoms(use_true_random=False),
)
def test_parts_are_all_rows_that_calibrate_and_no_image_stands_in_two(image, label):
    labels, image_hashes = np.array([label.randrange(3) for _ in image], np.int32), hashes(image)
    split = split_rows(labels, image_hashes, 0.2)
    assert split.parts or not split.cross_fitted
    for fold, own in enumerate(split.folds if split.parts else ()):
        dealt = [part.rows for part in split.parts if part.fold == fold]
        assert np.array_equal(np.sort(np.concatenate(dealt)), own.calibrate)
        assert sum(len(images(rows, image_hashes)) for rows in dealt) == len(images(own.calibrate, image_hashes))
        sizes = [len(images(rows, image_hashes)) for rows in dealt]
        assert len(dealt) <= N_PARTS // CROSS_FITTING_FOLDS
        assert max(sizes) - min(sizes) <= 1
    for part in split.parts:
        assert np.array_equal(np.sort(np.concatenate([part.rows, split.without(part)])), split.final_train)


@pytest.mark.parametrize("per_class", [5, 12, 24])
def test_a_part_has_one_row_of_a_class_at_most(per_class):
    """A class that has few rows misses no more of them than by leaving out one row at a time."""
    labels, image_hashes = id_set(per_class, classes=10)
    split = split_rows(labels, image_hashes, 0.2)
    assert len(split.parts) == N_PARTS
    assert max(np.bincount(labels[part.rows]).max() for part in split.parts) == 1


def test_numbers_and_order_of_the_classes_do_not_move_parts():
    labels, image_hashes = id_set(10)
    order = np.random.default_rng(0).permutation(len(labels))
    here, there = split_rows(labels, image_hashes, 0.2), split_rows(2 - labels[order], image_hashes[order], 0.2)
    for ours, theirs in zip(here.parts, there.parts, strict=True):
        assert images(ours.rows, image_hashes) == images(theirs.rows, image_hashes[order])


# ------------------------------------------------------------------------------------------------- a set of its own


def test_validation_set_is_halved_and_id_train_trains_whole():
    labels, image_hashes = id_set(9)
    split = split_with_validation_set(100, labels, image_hashes)
    train, select, calibrate = parts(split)
    assert split.held_out == "id-val"
    assert np.array_equal(train, np.arange(100))
    assert np.array_equal(split.final_train, train)
    assert np.array_equal(np.sort(np.concatenate([select, calibrate])), np.arange(27))
    assert sorted(np.bincount(labels[select])) == [4, 5, 5]  # the odd row of each class, in turn


def test_copies_in_a_validation_set_stay_together():
    labels, image_hashes = np.repeat(np.arange(2, dtype=np.int32), 20), hashes(np.arange(40) % 10)
    _, select, calibrate = parts(split_with_validation_set(1, labels, image_hashes))
    assert not images(select, image_hashes) & images(calibrate, image_hashes)
