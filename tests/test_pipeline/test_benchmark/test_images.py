"""Whether a folder holds the images of a list, by the bytes of each."""

import csv
import gzip
import hashlib
import shutil
import tarfile

import pytest

from pipeline.benchmark.images import BenchmarkImages, compare_images, images_digest, listed_images
from stages.errors import InputError


@pytest.fixture
def home(tmp_path):
    """Tars of two sets in ``data``, the files that they hold beside them, and their list."""
    files = {"threes": ["a.png", "b.png", "c.png"], "photos": ["x/d.jpg", "x/e.jpg"]}
    (tmp_path / "data").mkdir()
    with gzip.open(tmp_path / "listed.csv.gz", "wt", newline="") as listed:
        writer = csv.writer(listed)
        writer.writerow(["set", "id", "sha256"])
        for name, ids in files.items():
            for id_ in ids:
                path = tmp_path / name / id_
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(id_.encode())
                writer.writerow([name, id_, hashlib.sha256(path.read_bytes()).hexdigest()])
            with tarfile.open(tmp_path / "data" / f"{name}.tar", "w") as tar:
                tar.add(tmp_path / name, arcname=".")
    return tmp_path


def test_the_images_of_the_list_whether_packed_or_not(home):
    listed = home / "listed.csv.gz"
    whole = compare_images(home / "data", listed)
    assert whole == BenchmarkImages(images_digest(listed_images(listed)), None)
    (home / "data" / "threes.tar").unlink()
    shutil.copytree(home / "threes", home / "data" / "threes")  # a folder is as good as a tar
    assert compare_images(home / "data", listed) == whole
    (home / "data" / "photos.tar").unlink()
    assert compare_images(home / "data", listed, {"threes"}).difference is None  # the others are not asked for


def test_what_differs_is_counted_and_named(home):
    shutil.copytree(home / "threes", home / "data" / "threes")
    own = home / "data" / "threes"
    (own / "a.png").write_bytes(b"other")
    (own / "b.png").rename(own / "new.png")
    (home / "data" / "photos.tar").unlink()
    found = compare_images(home / "data", home / "listed.csv.gz")
    assert found.difference == (
        "3 missing (threes/b.png, photos/x/d.jpg, photos/x/e.jpg); 1 with other bytes (threes/a.png); "
        "1 not in the list (threes/new.png)"
    )
    assert found.digest != images_digest(listed_images(home / "listed.csv.gz"))


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path / 'no'}"):
        compare_images(tmp_path / "no", tmp_path / "listed.csv.gz")
