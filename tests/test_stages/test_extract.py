"""Stage one: every image is a row or a listed failure, nothing is done twice, and the bits depend on nothing else."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from cache import CacheError, CacheMismatchError, FeatureCache
from stages.config import BackboneConfig
from stages.errors import StageError
from stages.extract import ExtractOptions, extract_set, made_with, repair_set
from stages.extraction.changes import compare_versions
from stages.extraction.shards import make_shards
from stages.inputs.images import ImageReader, decode_image, list_dataset, list_images
from stages.networks.backbone import Backbone
from stages.progress import NullProgress
from tests.test_stages.drawn import create
from tests.test_stages.slow_extraction import small_shards

BROKEN = {"0/0000-notes.png": b"no image at all", "1/cut.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "1/empty.jpg": b""}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """37 digits and three files that are no images: two whole batches and a part of one."""
    folder = tmp_path_factory.mktemp("images")
    table = list_images("sklearn:digits[0,1]")
    reader = table.reader()
    for index in [*range(20), *range(len(table) - 17, len(table))]:
        write(folder / table.ids[index], reader.read(index))
    for name, content in BROKEN.items():
        write(folder / name, content)
    return folder


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def extract(images, root, backbone, **options) -> FeatureCache:
    spec = options.pop("spec", None) or backbone.feature_spec("float16", "full")
    options = ExtractOptions(**{"max_failures": 1.0} | options)
    return extract_set("digits", list_images(str(images)), spec, root, lambda: backbone, options=options)


def not_needed() -> Backbone:
    raise AssertionError("a backbone is loaded where nothing is to be done")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(images, backbone, tmp_path_factory):
    return extract(images, tmp_path_factory.mktemp("whole"), backbone)


@pytest.fixture(scope="module")
def sharded(images, backbone, tmp_path_factory):
    return small_shards(backbone, images, tmp_path_factory.mktemp("sharded"), max_failures=1.0)


def test_every_input_is_a_row_or_a_listed_failure(images, whole):
    names = sorted(str(path.relative_to(images)) for path in images.glob("*/*"))
    assert whole.inputs().ids == tuple(names)
    assert whole.ids.tolist() == [name for name in names if name not in BROKEN]
    assert [failure.id for failure in whole.failures()] == sorted(BROKEN)
    assert all(failure.reason for failure in whole.failures())
    assert whole.n_rows + len(whole.failures()) == len(names)
    assert (whole.path / "failures.jsonl").read_text().count("\n") == 3
    assert [whole.class_names[label] for label in whole.labels] == [name[0] for name in whole.ids]
    digests = [hashlib.sha256((images / name).read_bytes()).digest() for name in whole.ids]
    assert [row.tobytes() for row in whole.image_hashes] == digests
    assert whole.verify() == []


def test_cached_rows_are_what_the_backbone_says_of_each_image(images, whole, backbone):
    """Image by image, without batches, padding and shards."""
    for row in range(0, whole.n_rows, 5):
        image = decode_image((images / str(whole.ids[row])).read_bytes())
        live = backbone.encode(backbone.transform(image)[None])
        for name in ("cls", "tap_cls", "patches"):
            expected = getattr(live, name)[0].numpy()
            cached = whole.read(name, np.array([row]))[0]
            assert cached.dtype == np.float16
            np.testing.assert_allclose(cached, expected, rtol=2**-11, atol=1e-4, err_msg=f"{name} of row {row}")


def test_a_second_run_does_nothing(images, whole, backbone, monkeypatch):
    monkeypatch.setattr(ImageReader, "read", None)  # no image is opened
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in whole.path.iterdir()}
    spec = backbone.feature_spec("float16", "full")
    again = extract_set(
        "digits",
        list_images(str(images)),
        spec,
        whole.path.parent,
        not_needed,
        options=ExtractOptions(max_failures=0.0),
    )
    assert again.path == whole.path
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in whole.path.iterdir()} == before


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


def test_killed_and_resumed_gives_the_same_bytes(images, sharded, backbone, tmp_path, monkeypatch):
    command = [sys.executable, "-m", "tests.test_stages.slow_extraction", str(images), str(tmp_path)]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        for _ in range(2):  # it has begun; the first shard is done
            assert process.stdout.readline()
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.stdout.readline()  # a batch: now it stands in the midst of the second shard
        process.kill()
    assert process.returncode == -signal.SIGKILL
    (unfinished,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert not (unfinished / "manifest.json").exists()
    assert [path.name for path in unfinished.glob("shard-*.h5")] == ["shard-00000.h5"]

    batches = counting(backbone, monkeypatch)
    resumed = small_shards(backbone, images, tmp_path, max_failures=1.0)
    assert len(batches) == 2  # what was done is not done again
    assert resumed.path == unfinished
    assert files(resumed.path) == files(sharded.path)


def test_too_many_failures_keep_the_work(images, whole, backbone, tmp_path):
    with pytest.raises(
        StageError, match=r"digits: 3 of 40 images cannot be used.*--max-failures 0.05.*0/0000-notes\.png"
    ):
        extract(images, tmp_path, backbone, max_failures=0.05)
    assert compare_versions("digits", list_images(str(images)), whole.spec, tmp_path) is None
    samples = list_images(str(images))
    sealed = extract_set(
        "digits", samples, whole.spec, tmp_path, not_needed, options=ExtractOptions(max_failures=0.075)
    )  # 3 of 40 is allowed
    assert files(sealed.path) == files(whole.path)


def intact(images: Path) -> list[str]:
    return [name for name in list_images(str(images)).ids if name not in BROKEN]


class Notes(NullProgress):
    def __init__(self):
        self.lines = []

    def note(self, line):
        self.lines.append(line)


def counting(backbone, monkeypatch) -> list[int]:
    """Images in each forward pass from now on."""
    sizes, encode = [], backbone.encode
    monkeypatch.setattr(backbone, "encode", lambda images: sizes.append(len(images)) or encode(images))
    return sizes


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


class StopsAfter(Notes):
    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def advance(self, n=1, **fields):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


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
    with pytest.raises(StageError, match="3 of 40 images cannot be used"):
        small_shards(backbone, mine, tmp_path, max_failures=0.05)
    shutil.copy(mine / intact(mine)[-1], mine / "1/cut.png")
    batches = counting(backbone, monkeypatch)
    cache = small_shards(backbone, mine, tmp_path, max_failures=0.05)
    assert len(batches) == 1  # that of the shard with the image that was put right
    assert not cache.path.name.endswith("-2")
    assert (len(cache.manifest.shards), cache.n_rows) == (3, 38)


def test_interrupted_it_finishes_what_it_computes_and_says_how_far_it_is(images, backbone, tmp_path):
    progress = StopsAfter(2)
    with pytest.raises(KeyboardInterrupt):
        small_shards(backbone, images, tmp_path, progress=progress)
    (path,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert progress.lines == [f"digits: stopped after 32 of 40 images; finished shards are kept in {path}"]
    assert [file.name for file in sorted(path.glob("shard-*.h5"))] == ["shard-00000.h5", "shard-00001.h5"]
    assert not (tmp_path / f"{path.name}.lock").exists()


def test_going_on_with_other_versions_is_said(images, backbone, tmp_path, monkeypatch):
    now = made_with() | {"torch": "9.0"}
    with pytest.raises(KeyboardInterrupt):
        small_shards(backbone, images, tmp_path, progress=StopsAfter(2))
    monkeypatch.setattr("stages.extract.made_with", lambda: now)
    progress = Notes()
    cache = small_shards(backbone, images, tmp_path, progress=progress, max_failures=1.0)
    assert progress.lines[1].startswith("digits: going on with torch 9.0 what was begun with torch 2")
    assert cache.manifest.made_with["resumed_with"] == [now]


@pytest.mark.parametrize("damaged", ["shard-00000.h5", "shard-00002.h5", "inputs.parquet", "failures.jsonl"])
@pytest.mark.parametrize("how", ["a bit is flipped", "it is gone"])
def test_tampering_is_found_and_repaired_to_the_same_bytes(images, sharded, backbone, tmp_path, damaged, how):
    cache = FeatureCache.open(shutil.copytree(sharded.path, tmp_path / sharded.path.name))
    path = cache.path / damaged
    if how == "it is gone":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert [damage.file for damage in cache.verify()] == [damaged]
    repaired = repair_set(cache, [damaged], list_images(str(images)), lambda: backbone)
    assert repaired.verify() == []
    assert files(repaired.path) == files(sharded.path)


def test_other_images_repair_nothing(images, sharded, backbone, tmp_path):
    mine = shutil.copytree(images, tmp_path / "images")
    cache = FeatureCache.open(shutil.copytree(sharded.path, tmp_path / sharded.path.name))
    (cache.path / "inputs.parquet").unlink()
    (mine / "0/0000-notes.png").unlink()
    with pytest.raises(CacheMismatchError, match="made from 40 inputs, 39 are listed now"):
        repair_set(cache, ["inputs.parquet"], list_images(str(mine)), lambda: backbone)


@pytest.mark.parametrize(("patches", "kept"), [("none", 0), ("pool:1", 1)])
def test_fewer_patches_leave_the_rest_as_it_is(images, whole, backbone, tmp_path, patches, kept):
    cache = extract(images, tmp_path, backbone, spec=backbone.feature_spec("float16", patches))
    np.testing.assert_array_equal(cache.read("cls"), whole.read("cls"))
    if kept:
        expected = whole.read("patches").astype(np.float32).mean(1)
        np.testing.assert_allclose(cache.read("patches")[:, 0], expected, rtol=1e-2, atol=1e-3)
    assert ("patches" in cache.spec.datasets()) == bool(kept)


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


def test_a_set_without_a_usable_image_is_sealed_where_that_is_allowed(images, backbone, tmp_path):
    only = tmp_path / "only"
    write(only / "0" / "notes.png", b"no image at all")
    cache = extract(only, tmp_path, backbone)
    assert (cache.n_rows, len(cache.failures())) == (0, 1)
    assert cache.read("cls").shape == (0, backbone.dim)


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


def test_features_that_float16_cannot_hold_are_never_stored(images, tmp_path):
    """Weights as some networks have them: their maps reach beyond 65,504."""
    model = create("test_efficientnet")
    with torch.no_grad():
        model.bn2.weight *= 1e7
    large = Backbone(model, BackboneConfig(name="test_efficientnet", image_size=48))
    with pytest.raises(CacheError, match=r'cls of .*: inf: too large for float16.*set cache.dtype = "float32"'):
        extract(images, tmp_path, large)
    assert not list(tmp_path.glob("*/shard-*.h5"))
    cache = extract(images, tmp_path, large, spec=large.feature_spec("float32", "full"))
    assert cache.read("cls").max() > 65504
