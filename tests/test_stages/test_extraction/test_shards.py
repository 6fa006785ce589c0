"""Shards: the same bits, whoever makes them, in whatever order and size."""

from dataclasses import replace

import numpy as np
import pytest

from stages.errors import StageError
from stages.extraction.shards import make_shards
from tests.test_stages.slow_extraction import small_shards
from tests.test_stages.test_extraction.digits import extract, files, write, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images, backbone, tmp_path_factory):
    return extract(images, tmp_path_factory.mktemp("whole"), backbone)


@pytest.fixture(scope="module")
def sharded(images, backbone, tmp_path_factory):
    return small_shards(backbone, images, tmp_path_factory.mktemp("sharded"), max_failures=1.0)


def test_features_do_not_depend_on_shards_or_on_what_fills_a_batch(images, whole, sharded, backbone, tmp_path):
    assert len(sharded.manifest.shards) == 3
    for name in ("cls", "tap_cls", "patches"):
        np.testing.assert_array_equal(sharded.read(name), whole.read(name))
    few = tmp_path / "few"  # 5 images in a batch of 16, the rest padded
    for name in whole.ids[-5:]:
        write(few / name, (images / name).read_bytes())
    np.testing.assert_array_equal(extract(few, tmp_path, backbone).read("patches"), whole.read("patches")[-5:])


def test_images_decoded_ahead_stay_in_order(images, whole, backbone, tmp_path):
    def none_ahead(_, tasks):
        return make_shards(tasks, backbone, ahead=0)

    assert files(extract(images, tmp_path, backbone, mapper=none_ahead).path) == files(whole.path)


def test_shards_may_be_made_by_other_processes_in_any_order(images, sharded, backbone, tmp_path):
    def backwards(fn, tasks):
        return (fn(task) for task in reversed(list(tasks)))

    cache = small_shards(backbone, images, tmp_path, max_failures=1.0, mapper=backwards)
    assert files(cache.path) == files(sharded.path)


def test_a_worker_with_other_weights_is_refused(images, backbone, tmp_path):
    def elsewhere(fn, tasks):
        return (fn(replace(task, spec=replace(task.spec, weights_sha="0a1b"))) for task in tasks)

    with pytest.raises(StageError, match=r"other weights .* embedded"):
        extract(images, tmp_path, backbone, mapper=elsewhere)
