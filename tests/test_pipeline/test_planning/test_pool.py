"""Features of pilots: really extracted, no image that cannot be used among them, copies of the same class."""

import numpy as np

from cache import FeatureCache
from pipeline.planning.kept import kept_options
from pipeline.planning.pool import Pool, drawn, of_images, write_cache
from pipeline.planning.sample import PilotSet


def wanted(labels, ids=None):
    n = len(labels)
    names = tuple(map(str, range(max(labels) + 1)))
    ids = tuple(map(str, range(n))) if ids is None else ids
    return PilotSet(np.arange(n), ids, np.asarray(labels, np.int32), names, np.arange(n), np.arange(n))


def test_a_broken_image_is_left_out(backbone, few_images):
    table = few_images.take(range(40))
    table.contents[3] = b"no image"
    rows = wanted(table.labels.tolist(), table.ids)
    found = of_images({"train": rows}, {"train": table}, backbone, backbone.feature_spec("float16", "full"), 1.0)
    assert table.ids[3] not in found.sets["train"].ids
    assert len(found.sets["train"]) == 39
    assert found.seconds > 0
    assert found.pools["train"].features["cls"].shape[1] == backbone.dim


def test_copies_are_of_the_same_class(tmp_path, backbone):
    spec = backbone.feature_spec("float16", "none")
    shapes = {name: shape for name, (shape, _) in spec.datasets().items()}
    labels = np.array([0, 1, 2, 0, 1, 2], np.int32)
    features = {
        name: np.stack([np.full(shape, 10.0 * x, np.float16) for x in labels]) for name, shape in shapes.items()
    }
    pool = Pool(features, np.arange(6 * 32, dtype=np.uint8).reshape(6, 32), labels)
    cache = write_cache(tmp_path, "train", wanted([0, 1, 2] * 20), pool, spec)
    assert np.abs(cache.read("cls").astype(np.float32) - 10 * cache.labels[:, None]).max() < 5
    assert len({row.tobytes() for row in cache.image_hashes}) == 60


def test_drawn_images_are_images(backbone):
    table = drawn([str(number) for number in range(8)])
    found = of_images({"a": wanted([0] * 8)}, {"a": table}, backbone, backbone.feature_spec("float16", "none"), 1.0)
    assert len(found.pools["a"].digests) == 8


def test_bytes_are_those_of_a_cache(caches, backbone):
    """What is kept of an image is, times the rows, what the arrays of a sealed cache take."""
    cache: FeatureCache = caches["train"]
    full, *others = kept_options(backbone.feature_spec("float16", "full"), backbone)
    assert full.row_bytes * cache.n_rows == sum(cache.read(name).nbytes for name in cache.spec.datasets())
    for kept in others:
        assert kept.row_bytes == backbone.feature_spec("float16", kept.patches).row_bytes
        assert kept.row_bytes + kept.tap_bytes == backbone.feature_spec("float16", kept.patches, "all").row_bytes
