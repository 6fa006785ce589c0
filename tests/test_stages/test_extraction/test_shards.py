"""Shards: the same bits, whoever makes them, in whatever order and size."""

import threading
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from stages.errors import StageError
from stages.extract import ExtractOptions, extract_set
from stages.extraction.shards import make_shards
from stages.extraction.writer import Writer
from stages.inputs.images import list_images
from stages.progress import NullProgress
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


class Counts(NullProgress):
    """How many images are done, for whoever waits for some number of them."""

    def __init__(self):
        self.done, self.changed = 0, threading.Condition()

    def advance(self, n=1, **fields):
        with self.changed:
            self.done += n
            self.changed.notify_all()

    def wait_for(self, n):
        with self.changed:
            return self.changed.wait_for(lambda: self.done >= n, timeout=20)


def test_the_next_shard_fills_while_one_is_written(backbone, tmp_path, monkeypatch):
    """On a disk so slow that all batches of the next shard are done by then but the one that makes it complete."""
    samples, spec = list_images("sklearn:digits[0]/train"), backbone.feature_spec("float16", "none")
    commit, counts, shards, seen = Writer.commit, Counts(), count(1), []

    def slow(writer):
        n = 48 * next(shards)  # of 3 batches each; the last shard has fewer
        seen.append(counts.wait_for(n + 32 if n + 48 <= len(samples) else 0))
        commit(writer)

    monkeypatch.setattr(Writer, "commit", slow)
    options = ExtractOptions(
        shard_rows=48, progress=counts, mapper=lambda _, tasks: make_shards(tasks, backbone, ahead=0)
    )
    cache = extract_set("digits", samples, spec, tmp_path, lambda: backbone, options=options)
    assert cache.n_rows == len(samples) == counts.done
    assert seen == [True] * len(cache.manifest.shards)


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
