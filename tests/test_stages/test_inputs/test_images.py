"""Listing of images: folders, single files, text and CSV lists."""

import os
import pickle
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stages.errors import InputError
from stages.inputs.images import ImageError, list_images, only_classes
from stages.inputs.images.classes import read_classes
from stages.inputs.images.kind import EMPTY, SPECIAL, describe_left_out
from stages.inputs.images.names import tidy
from stages.inputs.images.table import Sample, make_table


def save(root, *names):
    """Tiny images, each of another gray, so that no two files are equal."""
    for gray, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 3), gray).save(path)


def classes(table):
    return {
        i: table.class_names[label] if label >= 0 else None for i, label in zip(table.ids, table.labels, strict=True)
    }


def test_folder_per_class(tmp_path):
    save(tmp_path, "dog/1.png", "cat/black/2.PNG", "cat/1.png", "loose.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    save(tmp_path, ".hidden/1.png", "dog/.thumbnail.png")

    table = list_images(str(tmp_path))

    assert classes(table) == {"cat/1.png": "cat", "cat/black/2.PNG": "cat", "dog/1.png": "dog", "loose.png": None}
    assert table.class_names == ("cat", "dog")
    assert table.labels.tolist() == [0, 0, 1, -1]
    assert table.labels.dtype == np.int32
    assert table.left_out == {".txt": 1}
    assert table.sizes.tolist() == [os.path.getsize(tmp_path / i) for i in table.ids]
    assert table.mtimes_ns.tolist() == [os.stat(tmp_path / i).st_mtime_ns for i in table.ids]


def test_flat_folder_has_no_classes(tmp_path):
    save(tmp_path, "b.png", "a.png")
    table = list_images(str(tmp_path))
    assert table.ids == ("a.png", "b.png")
    assert table.labels.tolist() == [-1, -1]
    assert table.class_names == ()


def test_one_file(tmp_path):
    save(tmp_path, "a.png")
    table = list_images(str(tmp_path / "a.png"))
    assert classes(table) == {"a.png": None}
    assert table.reader().read(0) == (tmp_path / "a.png").read_bytes()


def test_reader_gives_the_stored_bytes_in_parts_and_in_other_processes(tmp_path, monkeypatch):
    save(tmp_path, *(f"{c}/{i}.png" for c in "xy" for i in range(3)))
    monkeypatch.chdir(tmp_path)
    table = list_images(".")
    monkeypatch.chdir("/")  # a worker has another working folder
    reader = pickle.loads(pickle.dumps(table.reader()))
    assert [reader.read(i) for i in range(6)] == [(tmp_path / i).read_bytes() for i in table.ids]
    part = table.reader(2, 5)
    assert [part.read(i) for i in range(len(part))] == [reader.read(i) for i in range(2, 5)]


def test_names_are_numbered_by_utf8_bytes_and_numbers_by_value(tmp_path):
    save(tmp_path / "words", "é/1.png", "z/1.png", "Z/1.png", "𝔸/1.png", "\uffee/1.png")
    assert list_images(str(tmp_path / "words")).class_names == tuple(sorted("éZz𝔸\uffee", key=str.encode))
    save(tmp_path / "numbers", *(f"{i}/1.png" for i in range(12)))
    assert list_images(str(tmp_path / "numbers")).class_names == tuple(map(str, range(12)))


def test_a_name_that_is_not_utf8_is_escaped_and_still_read(tmp_path):
    save(tmp_path, "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    table = list_images(str(tmp_path))
    assert table.ids == ("\\udcff.png",)
    assert table.reader().read(0).startswith(b"\x89PNG")


def test_links_are_followed_and_circles_end(tmp_path):
    save(tmp_path, "real/cat/1.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "real" / "cat")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "self.png").symlink_to("self.png")
    table = list_images(str(tmp_path / "set"))
    assert table.ids == ("cat/1.png", "self.png")
    with pytest.raises(ImageError, match="cannot be read"):  # a broken link is an input, and fails when it is read
        table.reader().read(1)


def test_a_file_that_went_away_is_an_image_error(tmp_path):
    save(tmp_path, "a.png")
    reader = list_images(str(tmp_path)).reader()
    (tmp_path / "a.png").unlink()
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        reader.read(0)


def test_a_pipe_is_no_image(tmp_path):
    save(tmp_path, "a.png", "b.png")
    table = list_images(str(tmp_path))
    os.remove(tmp_path / "b.png")
    os.mkfifo(tmp_path / "b.png")
    reading = threading.Thread(target=pytest.raises, args=(ImageError, table.reader().read, 1), daemon=True)
    reading.start()
    reading.join(5)
    assert not reading.is_alive()  # opening it would have waited for a writer
    assert list_images(str(tmp_path)).left_out == {SPECIAL: 1}


def test_a_class_folder_without_an_image_is_counted(tmp_path):
    """A class that is empty by mistake is not missing without a word; what is hidden, or further down, is no class."""
    save(tmp_path, "cat/a.png", "dog/black/b.png")
    for folder in ("cow", "bird/black", ".thumbnails", "cat/empty"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "bird" / "notes.txt").write_text("none yet")
    table = list_images(str(tmp_path))
    assert table.class_names == ("cat", "dog")
    assert table.left_out == {EMPTY: 2, ".txt": 1}
    assert describe_left_out(table.left_out) == "left out: 1 file: 1 .txt; 2 folders without an image"
    save(tmp_path, "c.png")
    assert list_images(str(tmp_path)).left_out == {".txt": 1}  # folders are no classes here


def test_openood_list(tmp_path):
    save(tmp_path, "a b/1.png", "a b/2.png", "c/3.png", "c/4.png")
    (tmp_path / "list.txt").write_text(
        "./a b/1.png 10\nc/3.png\t2\r\n\na b/2.png -1\nc/gone.png 2\n", encoding="utf-8-sig"
    )
    table = list_images(str(tmp_path / "list.txt"))
    assert classes(table) == {"a b/1.png": "10", "a b/2.png": None, "c/3.png": "2", "c/gone.png": "2"}
    assert table.class_names == ("2", "10")
    assert table.reader().read(0) == (tmp_path / "a b/1.png").read_bytes()
    with pytest.raises(ImageError):
        table.reader().read(3)


def test_csv(tmp_path):
    save(tmp_path, "1.png", "2,3.png", "4.png")
    (tmp_path / "list.csv").write_text('label,path\ncat,1.png\n"big dog","2,3.png"\n,4.png\n')
    table = list_images(str(tmp_path / "list.csv"))
    assert classes(table) == {"1.png": "cat", "2,3.png": "big dog", "4.png": None}
    (tmp_path / "list.csv").write_text("path\n1.png\n")
    assert classes(list_images(str(tmp_path / "list.csv"))) == {"1.png": None}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", "1.png 0\n1.png cat\n", "line 2: '1.png cat'; `path label` is expected"),
        ("l.txt", "1.png\n", "line 1"),
        ("l.txt", "1.png -2\n", "line 1"),
        ("l.txt", "1.png 0\n./1.png 1\n", "lines 1 and 2 both name '1.png'"),
        (
            "l.txt",
            "no.png 0\nnope.png 0\n",
            "none of its 2 images is there (the first: line 1, 'no.png'); paths are relative to",
        ),
        ("l.txt", ". 0\n", "line 1: '.' is no file"),
        ("l.txt", "\n", "the list is empty"),
        ("l.txt", b"\xff\xfe1", "not UTF-8"),
        ("l.txt", "a\0.png 0", "zero bytes"),
        ("l.csv", "", "no column of paths"),
        ("l.csv", "where,label\n1.png,0\n", "no column of paths"),
        ("l.csv", "path,label\n,0\n", "line 2: no path"),
        ("l.csv", "path\n1.png,0\n", "line 2: no path, or more fields"),
        ("l.csv", 'path\n"1.png', "not CSV"),
        ("l.csv", "path\n" + "x" * 200_000, "not CSV"),
        ("l.csv", "path\n" + "x" * 5000, "none of its 1 images"),
        ("l.tgz", "", "not a source of images"),
        ("l.npy", "", "not a source of images; give a folder"),
    ],
)
def test_bad_lists_are_refused(tmp_path, name, content, message):
    save(tmp_path, "1.png")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        list_images(str(tmp_path / name))
    assert message in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("a.txt", "x/1.png 3\n"), ("a.csv", "path,label\nx/1.png,3\n")])
def test_the_paths_of_a_list_may_be_relative_to_another_folder(tmp_path, name, content):
    save(tmp_path, "images/x/1.png")
    (tmp_path / name).write_text(content)
    table = list_images(str(tmp_path / name), str(tmp_path / "images"))
    assert classes(table) == {"x/1.png": "3"}
    assert table.reader().read(0) == (tmp_path / "images/x/1.png").read_bytes()
    with pytest.raises(InputError, match="none of its 1 images is there"):
        list_images(str(tmp_path / name))
    with pytest.raises(InputError, match=r"its root .*nowhere is no folder"):
        list_images(str(tmp_path / name), str(tmp_path / "nowhere"))


@pytest.mark.parametrize("source", ["folder", "sklearn:photos"])
def test_a_root_is_for_lists(tmp_path, source):
    save(tmp_path, "folder/1.png")
    with pytest.raises(InputError, match="a root is for the paths of a list"):
        list_images(source if ":" in source else str(tmp_path / source), str(tmp_path))


def test_some_classes_of_a_source(tmp_path):
    save(tmp_path, "data/cat/1.png", "data/dog/1.png", "data/dog/2.png", "data/eel/1.png", "data/loose.png")
    (tmp_path / "some.txt").write_text("# two of them\neel\n\ndog \n")
    whole = list_images(str(tmp_path / "data"))
    table = only_classes(whole, str(tmp_path / "some.txt"))
    assert classes(table) == {"dog/1.png": "dog", "dog/2.png": "dog", "eel/1.png": "eel"}
    assert table.class_names == ("dog", "eel")
    assert table.labels.tolist() == [0, 0, 1]
    assert table.labels.dtype == np.int32
    for row, name in enumerate(table.ids):
        assert table.reader().read(row) == (tmp_path / "data" / name).read_bytes()
        assert table.sizes[row] == os.path.getsize(tmp_path / "data" / name)
        assert table.mtimes_ns[row] == os.stat(tmp_path / "data" / name).st_mtime_ns


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\nyak\ngnu\n", r"2 of its 3 classes have no image in .*: 'yak', 'gnu'"),
        (b"# none\n", "names no class"),
        (b"\xff", r"not UTF-8 text \(byte 0\)"),
        (None, "cannot be read: No such file"),
    ],
)
def test_class_lists_that_cannot_be_used_are_refused(tmp_path, content, message):
    save(tmp_path, "data/cat/1.png")
    if content is not None:
        (tmp_path / "some.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        only_classes(list_images(str(tmp_path / "data")), str(tmp_path / "some.txt"))


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        list_images(str(tmp_path / "gone"))
    with pytest.raises(InputError, match="no such file or folder"):
        list_images("a\0b")
    (tmp_path / "a.md").touch()
    with pytest.raises(InputError, match=r"left out: 1 file: 1 \.md.*\.jpg"):
        list_images(str(tmp_path))


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(st.dictionaries(NAMES, st.none() | NAMES.map(lambda name: tidy(f"a {name}")), min_size=1))
def test_a_table_is_sorted_and_labels_name_their_class(class_of):
    table = make_table("any", [Sample(i, name, 1, 2, i.encode()) for i, name in class_of.items()])
    assert [i.encode() for i in table.ids] == sorted(i.encode() for i in class_of)
    assert [table.reader().read(i).decode() for i in range(len(table))] == list(table.ids)
    assert classes(table) == class_of
    assert set(table.class_names) == set(class_of.values()) - {None}


@pytest.mark.parametrize("name", ["a.jpg", "a.csv", "a.parquet", "a.txt"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: cannot be read: .*not a regular file"):
        list_images(str(tmp_path / name))


def test_a_pipe_names_no_classes(tmp_path):
    os.mkfifo(tmp_path / "classes.txt")
    with pytest.raises(InputError, match=r"classes.txt: cannot be read: not a regular file; give a text file"):
        read_classes(str(tmp_path / "classes.txt"))
