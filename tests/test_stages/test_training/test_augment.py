"""Batches are the same whoever computes them: shares, pairs, mixing, loading in the background."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data.mixup import Mixup

from stages.config import BackboneConfig
from stages.errors import InputError
from stages.machine import usable_cores
from stages.training.augment import (
    MIXING,
    Mixer,
    generators_kept,
    seed_generators,
    transforms,
)
from stages.training.batches import plan_epoch, share_of
from stages.training.loading import ImageLoader, ImageSet, batches_ahead, worker_count
from stages.training.recipes import FinetuneSettings

EMBEDDED = BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=48)


@given(n=st.integers(1, 60), size=st.integers(1, 20), seed=st.integers(0, 9), n_groups=st.integers(0, 3))
def test_an_epoch_has_every_image_once(n, size, seed, n_groups):
    groups = np.random.default_rng(seed).integers(n_groups, size=n) if n_groups else None
    batches = plan_epoch(n, size, seed, 0, groups)
    assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(n))
    sizes = [len(batch.rows) for batch in batches]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    for batch in batches:
        np.testing.assert_array_equal(batch.partner[batch.partner], np.arange(len(batch.rows)))
        if groups is None:
            np.testing.assert_array_equal(batch.partner, np.arange(len(batch.rows))[::-1])  # as timm has it
        else:
            np.testing.assert_array_equal(groups[batch.rows], groups[batch.rows[batch.partner]])


@given(n=st.integers(1, 40), parts=st.integers(1, 7), seed=st.integers(0, 9), n_groups=st.integers(1, 4))
def test_shares_are_the_batch_and_keep_pairs_together(n, parts, seed, n_groups):
    groups = np.random.default_rng(seed).integers(n_groups, size=n)
    (batch,) = plan_epoch(n, n, seed, 0, groups)
    shares = [share_of(batch, part, parts) for part in range(parts)]
    assert sorted(np.concatenate([share.place for share in shares])) == list(range(n))
    for share in shares:
        pairs, alone = share.place[: share.paired], share.place[share.paired :]
        np.testing.assert_array_equal(batch.partner[pairs], pairs[::-1])
        np.testing.assert_array_equal(batch.partner[alone], alone)
    units = [share.paired // 2 + len(share.place) - share.paired for share in shares]
    assert max(units) - min(units) <= 1


# ----------------------------------------------------------------------------------------------------------- mixing


def mixed_in(parts: int, settings: FinetuneSettings, n: int = 10, alpha=None):
    """A batch mixed in several shares, put together again: (images, targets)."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(n, 3, 8, 8, generator=generator), torch.arange(n) % 4
    (batch,) = plan_epoch(n, n, 0, 0)
    mixer = Mixer(settings, 4, seed=0)
    whole, targets = torch.zeros_like(images), torch.zeros(n, 4)
    for part in range(parts):
        share = share_of(batch, part, parts)
        rows = torch.from_numpy(share.place)
        with generators_kept():
            whole[rows], targets[rows] = mixer(images[rows], labels[rows], share, 3, 5, alpha)
    return whole, targets, images, labels


def test_a_seed_is_that_of_all_generators():
    found = []
    with generators_kept():
        for seed in (lambda drawn: seed_generators([0, 3]), torch.manual_seed):
            drawn = int(np.random.SeedSequence([0, 3]).generate_state(1)[0])
            random.seed(drawn)
            np.random.seed(drawn)
            seed(drawn)
            found.append((random.random(), np.random.random(), torch.rand(3).tolist()))
    assert found[0] == found[1]


KINDS = [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}]


@pytest.mark.parametrize("kind", KINDS)
def test_static_mixing_is_timms(kind):
    settings = FinetuneSettings(**kind)
    images, targets, originals, labels = mixed_in(1, settings)
    mixup = Mixup(settings.mixup, settings.cutmix, label_smoothing=0.0, num_classes=4)
    with generators_kept():
        seed_generators([0, 3, 5, MIXING])
        expected, expected_targets = mixup(originals.clone(), labels)
    assert torch.equal(images, expected)
    torch.testing.assert_close(targets, expected_targets)
    assert not torch.equal(images, originals)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [None, np.linspace(0, 2, 11)])
def test_mixing_does_not_depend_on_who_computes_what(kind, alpha):
    settings = FinetuneSettings(**kind)
    images, targets, originals, _ = mixed_in(1, settings, 11, alpha)
    assert not torch.equal(images, originals)
    assert torch.equal(images[5], originals[5])  # in the middle of an odd batch: without a partner
    assert torch.equal(targets[5], torch.tensor([0.0, 1, 0, 0]))
    for parts in (2, 3):
        again, again_targets, *_ = mixed_in(parts, settings, 11, alpha)
        assert torch.equal(again, images)
        assert torch.equal(again_targets, targets)


def test_harder_classes_are_mixed_more():
    n = 200
    alpha = np.where(np.arange(n) % 4 == 0, 0.0, np.where(np.arange(n) % 4 == 1, 0.1, 5.0))
    images, targets, originals, labels = mixed_in(1, FinetuneSettings(mixup=0.8), n, alpha)
    own = targets[torch.arange(n), labels]
    mixing = [float(torch.minimum(own, 1 - own)[labels == label].mean()) for label in range(3)]
    assert mixing[0] == 0
    assert 0 < mixing[1] < 0.15 < 0.3 < mixing[2]
    assert torch.equal(images[labels == 0], originals[labels == 0])
    lam = own[2]  # and the image is mixed as its label is
    torch.testing.assert_close(images[2], lam * originals[2] + (1 - lam) * originals[-3])


def test_the_target_of_a_cut_image_says_what_is_left_of_it():
    n = 12
    images, targets, originals, labels = mixed_in(1, FinetuneSettings(cutmix=1.0), n, np.ones(n))
    for row in range(n):
        kept = float((images[row] == originals[row]).all(0).float().mean())
        assert float(targets[row, labels[row]]) == pytest.approx(kept, abs=1e-6)


def test_nothing_asked_nothing_mixed():
    images, targets, originals, labels = mixed_in(1, FinetuneSettings())
    assert torch.equal(images, originals)
    assert torch.equal(targets.argmax(1), labels)


# ---------------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def image_set(few_images, backbone):
    def image_set(images=few_images):
        settings = FinetuneSettings(rand_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
        both = transforms(backbone.model, EMBEDDED, settings)
        return ImageSet(images, np.asarray(few_images.ids), np.arange(48), few_images.labels, *both)

    return image_set


ASKED = [
    [(0, row, (0, 0)) for row in (1, 2, 3)],
    [],
    [(0, 1, (0, 1)), (0, 2, None)],
    [(0, row, (0, 0)) for row in (3, 1)],
]


def loaded(loader):
    with generators_kept():
        return [batch.images for batch in loader.batches(ASKED)]


def test_workers_load_what_this_process_would(image_set):
    here = loaded(ImageLoader([image_set()], workers=0))
    with_workers = ImageLoader([image_set()], workers=2)
    for _ in range(2):  # the workers stay for the next epoch
        for ours, expected in zip(loaded(with_workers), here, strict=True):
            assert torch.equal(ours, expected)
    assert torch.equal(here[3], here[0][[2, 0]])  # whatever else is in the batch
    assert not torch.equal(here[2][0], here[0][0])  # anew each epoch
    assert here[1].shape == (0,)


def test_all_images_that_cannot_be_used_are_found(image_set, few_images):
    contents = list(few_images.contents)
    contents[3], contents[40] = b"no image", b""
    loader = ImageLoader([image_set(), image_set(replace(few_images, contents=tuple(contents)))], workers=0)
    (one,) = loader.batches([[(1, row, None) for row in (2, 3, 4)]])
    assert len(one.images) == 2
    assert [failure.id for failure in one.failures] == [few_images.ids[3]]
    found = loader.unusable()
    assert [failure.id for _, failure in found] == [few_images.ids[3], few_images.ids[40]]
    assert all(failure.reason for _, failure in found)


def test_images_that_are_not_listed_any_more(image_set, few_images):
    with pytest.raises(InputError, match=r"1 images .* run make extract"):
        image_set(replace(few_images, ids=few_images.ids[1:], contents=few_images.contents[1:]))


def test_number_of_workers(monkeypatch):
    for device in ("cpu", "cuda"):
        assert worker_count(3, 10, 1, device) == 3
        assert worker_count("auto", 100, 1, device) == 0  # not worth starting any
        assert 1 <= worker_count("auto", 10**6, 1, device) <= max(1, usable_cores() - 1)
        assert worker_count("auto", 10**6, 10**6, device) == 1
    monkeypatch.setattr("stages.training.loading.usable_cores", lambda: 128)
    assert worker_count("auto", 10**6, 1, "cpu") == 8  # beside a network that computes on the same cores
    assert worker_count("auto", 10**6, 8, "cuda") == 15
    assert worker_count("auto", 10**6, 1, "cuda") == 32


def test_memory_of_batches_in_advance_does_not_grow_with_the_workers():
    assert [batches_ahead(workers) for workers in (1, 4, 8, 15, 32, 64)] == [4, 4, 4, 2, 1, 1]
