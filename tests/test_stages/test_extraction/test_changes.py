"""Images that change: what is still true is taken over, the rest computed, and the bytes are those of a new cache."""

import os
import shutil

import numpy as np
import pytest
from sklearn.datasets import load_digits

from cache import FeatureCache
from stages.errors import StageError
from stages.extract import ExtractOptions, extract_set
from stages.extraction.changes import compare_versions
from stages.inputs.images import list_dataset, list_images
from tests.test_stages.slow_extraction import small_shards
from tests.test_stages.test_extraction.digits import (
    Notes,
    StopsAfter,
    counting,
    extract,
    files,
    intact,
    not_needed,
    write,
    write_images,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def test_a_changed_image_makes_a_new_version_beside_the_old_one(images, backbone, tmp_path):
    mine = shutil.copytree(images, tmp_path / "images")
    old = extract(mine, tmp_path, backbone)
    before = files(old.path)
    changed, other = (mine / str(old.ids[row]) for row in (0, -1))
    kept = changed.read_bytes()
    changed.write_bytes(other.read_bytes())
    new = extract(mine, tmp_path, backbone)
    assert new.path.name == f"{old.path.name}-2"
    assert files(old.path) == before
    np.testing.assert_array_equal(new.read("cls")[0], new.read("cls")[-1])
    np.testing.assert_array_equal(new.read("cls")[1:], old.read("cls")[1:])
    assert new.identity != old.identity
    changed.write_bytes(kept)  # and back again: the old version is fresh
    samples = list_images(str(mine))
    assert extract_set("digits", samples, old.spec, tmp_path, not_needed).path == old.path


def test_a_new_version_computes_what_changed_alone_and_has_the_bytes_of_a_new_cache(
    images, backbone, tmp_path, monkeypatch
):
    """Images are changed, added, taken away and put into another class; one that failed is mended."""
    mine = shutil.copytree(images, tmp_path / "images")
    small_shards(backbone, mine, tmp_path / "root", max_failures=1.0)
    names = intact(mine)
    (mine / names[0]).write_bytes((mine / names[-1]).read_bytes())
    (mine / names[5]).unlink()
    (mine / "2").mkdir()
    (mine / names[6]).rename(mine / "2" / "was-a-0.pgm")
    (mine / "1/cut.png").write_bytes((mine / names[-2]).read_bytes())
    write(mine / "0/0000-another.pgm", (mine / names[-3]).read_bytes())
    batches, progress = counting(backbone, monkeypatch), Notes()
    new = small_shards(backbone, mine, tmp_path / "root", max_failures=1.0, progress=progress)
    assert new.path.name.endswith("-2")
    assert progress.lines[0] == (
        f"digits: 2 new, 2 changed, 2 gone since {str(new.path)[:-2]}: 6 of 40 images to extract, "
        "the others are taken over"
    )  # two images that cannot be used are tried again
    assert len(batches) <= 3
    again = small_shards(backbone, mine, tmp_path / "afresh", max_failures=1.0)
    assert files(new.path) == files(again.path)


def test_nothing_is_taken_over_from_a_damaged_shard(images, backbone, tmp_path, monkeypatch):
    mine = shutil.copytree(images, tmp_path / "images")
    old = small_shards(backbone, mine, tmp_path / "root", max_failures=1.0)
    (mine / intact(mine)[0]).unlink()
    shard = old.path / "shard-00001.h5"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    batches, progress = counting(backbone, monkeypatch), Notes()
    new = small_shards(backbone, mine, tmp_path / "root", max_failures=1.0, progress=progress)
    assert progress.lines[0] == f"{shard} is damaged: nothing is taken over from it"
    assert sum(batches) < 4 * 16
    afresh = small_shards(backbone, mine, tmp_path / "afresh", max_failures=1.0)
    assert files(new.path) == files(afresh.path)


def test_what_is_taken_over_keeps_the_versions_that_made_it(images, backbone, tmp_path, monkeypatch):
    mine = shutil.copytree(images, tmp_path / "images")
    old = extract(mine, tmp_path, backbone).manifest.made_with
    (mine / intact(mine)[0]).unlink()
    monkeypatch.setattr("stages.extract.made_with", lambda: {"torch": "9.0"})
    assert extract(mine, tmp_path, backbone).manifest.made_with == {**old, "resumed_with": [{"torch": "9.0"}]}


def test_rehash_finds_an_image_that_changed_behind_size_and_time(images, backbone, tmp_path):
    mine = shutil.copytree(images, tmp_path / "images")
    old = extract(mine, tmp_path, backbone)
    first, last = (mine / str(old.ids[row]) for row in (0, -1))
    times = first.stat()
    first.write_bytes(last.read_bytes())
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert extract(mine, tmp_path, not_needed, spec=old.spec).path == old.path
    new = extract(mine, tmp_path, backbone, rehash=True)
    np.testing.assert_array_equal(new.read("cls")[0], old.read("cls")[-1])
    assert extract(mine, tmp_path, not_needed, spec=old.spec, rehash=True).path == new.path


def test_another_class_of_an_image_needs_no_forward_pass(images, tmp_path, backbone, monkeypatch):
    listing = tmp_path / "images.csv"
    first, *others = intact(images)

    def extract_listed(label_of_the_first: str) -> FeatureCache:
        lines = [f"{images / name},{name[0]}" for name in others]
        listing.write_text("\n".join(["path,label", f"{images / first},{label_of_the_first}", *lines]))
        return extract(listing, tmp_path / "root", backbone)

    old = extract_listed("0")
    batches = counting(backbone, monkeypatch)
    new = extract_listed("1")
    assert batches == []
    assert (old.labels[0], new.labels[0]) == (0, 1)
    np.testing.assert_array_equal(new.read("patches"), old.read("patches"))


def test_an_image_that_was_only_touched_is_the_same_image(images, backbone, tmp_path):
    mine = shutil.copytree(images, tmp_path / "images")
    cache = extract(mine, tmp_path, backbone)
    for name in (*cache.ids[:2], "0/0000-notes.png"):
        os.utime(mine / name, ns=(1, 1))
    assert extract_set("digits", list_images(str(mine)), cache.spec, tmp_path, not_needed).path == cache.path


def test_an_image_that_can_be_read_after_all_is_looked_at_again(images, backbone, tmp_path):
    """Permissions and mounts come back without touching the file."""
    mine = shutil.copytree(images, tmp_path / "images")
    samples = list_images(str(mine))
    hidden = (mine / samples.ids[1]).rename(tmp_path / "hidden")
    spec = backbone.feature_spec("float16", "full")
    without = extract_set("digits", samples, spec, tmp_path, lambda: backbone, options=ExtractOptions(max_failures=1.0))
    assert without.failures()[1].reason == "cannot be read: No such file or directory"
    assert compare_versions("digits", samples, spec, tmp_path).fresh
    hidden.rename(mine / samples.ids[1])
    changes = compare_versions("digits", samples, spec, tmp_path)
    assert (changes.changed, changes.fresh) == (1, False)
    assert extract(mine, tmp_path, backbone).n_rows == without.n_rows + 1


def test_images_that_change_while_a_cache_is_unfinished_begin_another(images, backbone, tmp_path):
    mine = shutil.copytree(images, tmp_path / "images")
    with pytest.raises(KeyboardInterrupt):
        small_shards(backbone, mine, tmp_path, progress=StopsAfter(2))
    (mine / "0/0000-notes.png").unlink()  # the first: every shard now has other images
    cache = small_shards(backbone, mine, tmp_path, max_failures=1.0)
    assert cache.path.name.endswith("-2")
    assert len(cache.failures()) == 2


def test_images_that_are_put_right_after_too_many_failures_keep_what_was_done(images, backbone, tmp_path, monkeypatch):
    mine = shutil.copytree(images, tmp_path / "images")
    with pytest.raises(StageError, match="3 of 40 images"):
        small_shards(backbone, mine, tmp_path, max_failures=0.05)
    shutil.copy(mine / intact(mine)[-1], mine / "1/cut.png")
    batches = counting(backbone, monkeypatch)
    cache = small_shards(backbone, mine, tmp_path, max_failures=0.05)
    assert len(batches) == 1  # that of the shard with the image that was put right
    assert not cache.path.name.endswith("-2")
    assert (len(cache.manifest.shards), cache.n_rows) == (3, 38)


class Pixels:
    """A dataset as torch has them: an image and its class by number."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.images[row], int(self.labels[row])


def test_a_dataset_from_python_is_judged_by_its_pixels(backbone, tmp_path, monkeypatch):
    digits = load_digits()
    data = Pixels((digits.images[:40] * 15).astype(np.uint8), digits.target[:40])
    spec = backbone.feature_spec("float16", "full")
    cache = extract_set("digits", list_dataset(data, "digits"), spec, tmp_path, lambda: backbone)
    assert [int(cache.class_names[label]) for label in cache.labels] == data.labels.tolist()
    assert extract_set("digits", list_dataset(data, "digits"), spec, tmp_path, not_needed).path == cache.path
    data.images[7] = data.images[8]
    batches = counting(backbone, monkeypatch)
    new = extract_set("digits", list_dataset(data, "digits"), spec, tmp_path, lambda: backbone)
    assert (len(batches), new.path.name) == (1, f"{cache.path.name}-2")
    np.testing.assert_array_equal(new.read("cls")[7], new.read("cls")[8])
