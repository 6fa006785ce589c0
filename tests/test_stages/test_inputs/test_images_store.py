"""Images in an object store: what a source holds there is what it holds on disk, and a cut line is no bad image."""

import io
import tarfile

import pytest
from PIL import Image

from cache import CacheUnreachableError, RemotePath
from stages.errors import InputError
from stages.inputs.images import list_images
from tests.object_store import BUCKET

NAMES = ("cat/1.png", "cat/2", "dog/1.png", "dog/notes.txt", ".hidden/3.png")
LISTS = {"list.txt": "cat/1.png 0\r\ndog/1.png 1\r\n", "list.csv": "path,label\ncat/1.png,cat\ndog/1.png,dog\n"}


def picture(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def sources(object_store, tmp_path_factory):
    """The same files below a folder and below a URL."""
    folder, url = tmp_path_factory.mktemp("data"), RemotePath(f"s3://{BUCKET}/data")
    for number, name in enumerate(NAMES):
        path = folder / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"notes" if name.endswith(".txt") else picture(number))
    for name, text in LISTS.items():
        (folder / name).write_bytes(text.encode())
    for shard, names in (("t-0.tar", NAMES[:2]), ("t-1.tar", NAMES[2:])):
        with tarfile.open(folder / shard, "w", format=tarfile.PAX_FORMAT) as tar:
            for name in names:
                tar.add(folder / "tree" / name, name)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            (url / str(path.relative_to(folder))).write_bytes(path.read_bytes())
    return folder, url


@pytest.mark.parametrize("name", ["tree", "t-0.tar", "t-{0..1}.tar", "t-*.tar", "tree/cat/1.png", *LISTS])
def test_a_source_holds_there_what_it_holds_here(sources, name):
    folder, url = sources
    root = name.startswith("list")
    here = list_images(f"{folder}/{name}", f"{folder}/tree" if root else None)
    there = list_images(f"{url}/{name}", f"{url}/tree" if root else None)
    assert (there.ids, there.class_names, there.left_out) == (here.ids, here.class_names, here.left_out)
    assert there.labels.tolist() == here.labels.tolist()
    assert there.sizes.tolist() == here.sizes.tolist()
    assert (there.mtimes_ns > 0).all()
    assert [there.reader().read(i) for i in range(len(there))] == [here.reader().read(i) for i in range(len(here))]


def test_a_list_of_this_machine_may_name_images_of_a_store(sources):
    folder, url = sources
    table = list_images(f"{folder}/list.txt", f"{url}/tree")
    assert table.reader().read(0) == (folder / "tree/cat/1.png").read_bytes()


def test_what_is_not_there_is_said_before_any_work(sources):
    with pytest.raises(InputError, match="no such file or folder"):
        list_images(f"s3://{BUCKET}/nothing")
    with pytest.raises(InputError, match="s3://nowhere: no such bucket"):
        list_images("s3://nowhere/data")
    with pytest.raises(InputError, match="s3://bucket/prefix"):
        list_images("gs://bucket/data")


def test_an_image_is_not_bad_because_a_line_was_cut(sources, object_store):
    _, url = sources
    table = list_images(f"{url}/tree")
    with object_store.cut(after=200), pytest.raises(CacheUnreachableError, match="after all retries"):
        table.reader().read(0)
    with object_store.cut(after=200, times=1):
        assert table.reader().read(0) == picture(0)
