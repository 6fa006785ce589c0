"""Extraction with taps: each row has the tokens after the blocks that were asked for, and nothing else is other."""

import h5py
import numpy as np
import pytest

from stages.extract import extract_features, repair_set
from stages.inputs.images import decode_image, list_images
from stages.networks.backbone import load_backbone
from tests.test_stages.small_vit import small_vit
from tests.test_stages.test_extraction.digits import extract, files, intact, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return load_backbone(small_vit(tmp_path_factory.mktemp("vit")))


@pytest.fixture(scope="module")
def tapped(images, vit, tmp_path_factory):
    spec = vit.feature_spec("float16", "full", (2, 6))
    return extract(images, tmp_path_factory.mktemp("tapped"), vit, spec=spec, shard_rows=16)


def test_rows_are_what_the_backbone_says_of_each_image_whatever_failed_beside_it(images, vit, tapped):
    assert tapped.read("taps").shape == (37, 2, 2, vit.dim)
    for row in (0, 20, 36):
        image = decode_image((images / str(tapped.ids[row])).read_bytes())
        _, live = vit.encode_with_taps(vit.transform(image)[None], (2, 6))
        cached = tapped.read("taps", np.array([row]))
        np.testing.assert_allclose(cached, live, rtol=2**-10, atol=1e-3)


def test_all_other_features_are_those_of_a_cache_without_taps(images, vit, tapped, tmp_path):
    plain = extract(images, tmp_path, vit)
    assert plain.fingerprint != tapped.fingerprint
    assert plain.fingerprint == tapped.spec.without_taps().fingerprint
    for name in plain.spec.datasets():
        np.testing.assert_array_equal(tapped.read(name), plain.read(name))


def test_any_hdf5_tool_reads_them(tapped):
    with h5py.File(tapped.path / "shard-00000.h5") as file:
        assert set(file) == {"cls", "tap_cls", "patches", "taps", "label", "id", "image_hash"}
        np.testing.assert_array_equal(file["taps"][:], tapped.read("taps", slice(0, len(file["taps"]))))


def test_damage_is_found_and_repaired_to_the_same_bytes(images, vit, tmp_path):
    spec = vit.feature_spec("float16", "none", (2, 6))
    cache = extract(images, tmp_path, vit, spec=spec)
    whole, path = files(cache.path), cache.path / "shard-00000.h5"
    with h5py.File(path, "r+") as file:
        file["taps"][3, 1, 0, 5] += 1
    (damage,) = cache.verify()
    repaired = repair_set(cache, [damage.file], list_images(str(images)), lambda: vit)
    assert repaired.verify() == []
    assert files(cache.path)[path.name] == whole[path.name]


def test_all_of_them_are_those_that_are_named(images, vit, tmp_path):
    few = [images / name for name in intact(images)[:3]]
    options = {"patches": "none", "out": tmp_path, "name": "few"}
    named = extract_features(few, vit, taps=[1, 2, 3, 4, 5, 6], **options)
    assert extract_features(few, vit, taps="all", **options).path == named.path
    assert named.spec.taps == (1, 2, 3, 4, 5, 6)
