"""Classes beside the images of a tar: whose file counts, which field, what is said."""

import json
import string

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from stages.errors import InputError
from stages.inputs.images import Columns, list_images
from stages.inputs.images.webdataset import key_of
from tests.test_stages.tars import classes, png, write_tar


@given(st.text(string.ascii_lowercase + "./_", min_size=1, max_size=12).map(lambda name: f"a{name}"))
def test_a_key_is_what_webdataset_takes(name):
    key, _ = webdataset.tariterators.base_plus_ext(name)
    assert key in (None, key_of(name))  # webdataset passes over files without an extension


def test_what_webdatasets_own_writer_writes(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        for i in range(4):
            pixels = np.full((3, 4, 3), 40 * i, np.uint8)
            writer.write(
                {"__key__": f"part/{i:04d}", "png": pixels, "cls": i % 3, "json": {"label": 9}, "txt": "a cat"}
            )
    table = list_images(str(tmp_path / "s.tar"))
    assert classes(table) == {"part/0000.png": "0", "part/0001.png": "1", "part/0002.png": "2", "part/0003.png": "0"}
    assert table.left_out == {".json": 4, ".txt": 4}


def test_webdataset_pairs(tmp_path):
    table = list_images(
        write_tar(
            tmp_path / "shard.tar",
            {
                "part/0001.jpg": png(1),
                "part/0001.cls": b"7\n",
                "part/0002.cls": b"-1",
                "part/0002.left.jpg": png(2),
                "part/0003.jpg": png(3),
                "part/0003.json": json.dumps({"label": 12, "width": 4}).encode(),
                "part/0004.jpg": png(4),
                "part/0004.json": json.dumps({"width": 4}).encode(),  # names no class
            },
        )
    )
    assert classes(table) == {
        "part/0001.jpg": "7",
        "part/0002.left.jpg": None,
        "part/0003.jpg": "12",
        "part/0004.jpg": None,
    }
    assert table.class_names == ("7", "12")
    assert table.left_out == {".json": 1}  # 0004.json


def test_webdataset_class_names(tmp_path):
    files = {"1.png": png(), "1.cls": "Kätzchen".encode(), "2.png": png(), "2.json": b'{"class": "dog"}'}
    assert list_images(write_tar(tmp_path / "s.tar", files)).class_names == ("Kätzchen", "dog")


def test_json_without_classes_leaves_the_folders(tmp_path):
    files = {"cat/1.png": png(), "cat/1.json": b"[1, 2]", "meta.json": b"not even json"}
    table = list_images(write_tar(tmp_path / "s.tar", files))
    assert classes(table) == {"cat/1.png": "cat"}
    assert table.left_out == {".json": 2}


def test_an_image_takes_the_file_of_its_own_stem_else_of_its_key(tmp_path):
    files = {"22.05.jpg": png(1), "22.05.cls": b"a", "22.cls": b"b", "22.06.jpg": png(2), "22.06.json": b"{}"}
    table = list_images(write_tar(tmp_path / "s.tar", files))
    assert classes(table) == {"22.05.jpg": "a", "22.06.jpg": "b"}
    assert table.left_out == {".json": 1}


def test_all_images_of_a_key_are_rows_and_extensions_may_be_in_capitals(tmp_path):
    files = {
        "1.left.JPG": png(1),
        "1.right.jpg": png(2),
        "1.CLS": b"3",
        "1.seg.png": png(3),
        "2.JPEG": png(4),
        "2.Json": b'{"label": 5}',
    }
    table = list_images(write_tar(tmp_path / "s.tar", files))
    assert classes(table) == {"1.left.JPG": "3", "1.right.jpg": "3", "1.seg.png": "3", "2.JPEG": "5"}
    assert table.left_out == {}


def test_a_key_that_stands_twice_is_said(tmp_path):
    apart = {"1.jpg": png(1), "1.cls": b"3", "2.jpg": png(2), "2.cls": b"4", "1.png": png(3)}
    (note,) = list_images(write_tar(tmp_path / "apart.tar", apart)).notes
    assert note == f"{tmp_path}/apart.tar: keys that stand there twice, others in between: 1 ('1')"
    capitals = {"1.jpg": png(1), "1.cls": b"3", "1.CLS": b"4"}
    table = list_images(write_tar(tmp_path / "capitals.tar", capitals))
    assert classes(table) == {"1.jpg": "4"}
    (note,) = table.notes
    assert note.endswith("files that stand there twice but for capitals, the later counts: '1.cls' and '1.CLS'")


def test_label_column_is_a_field_of_the_sample(tmp_path):
    files = {
        "1.jpg": png(1), "1.json": b'{"label": 7, "species": "cat"}', "1.txt": b"tabby", "1.cls": b"8",
        "2.jpg": png(2), "2.json": b'{"label": 7, "species": "dog"}', "2.txt": b"pug",
    }  # fmt: skip
    path = write_tar(tmp_path / "s.tar", files)
    for column, first, second in [("species", "cat", "dog"), ("txt", "tabby", "pug"), (None, "8", "7")]:
        assert classes(list_images(path, columns=Columns(label=column))) == {"1.jpg": first, "2.jpg": second}
    with pytest.raises(InputError, match=r"1.json: label_column 'specie' is not there; did you mean 'species'"):
        list_images(path, columns=Columns(label="specie"))
    bare = write_tar(tmp_path / "bare.tar", {"1.jpg": png(1)})
    with pytest.raises(InputError, match="label_column 'cls' is not there: no image has a file"):
        list_images(bare, columns=Columns(label="cls"))


@pytest.mark.parametrize(
    ("texts", "folder", "expected"),
    [
        ((b"3\n", b"-1"), "", ("3", None)),  # whole numbers, and nothing else gives a class
        ((b"3", b"a cat on a mat"), "", (None, None)),  # captions
        ((b"3", b""), "", (None, None)),  # img2dataset's, where there is no caption
        ((b"3", b"4"), "dog/", ("dog", "dog")),  # the folder gives one
    ],
)
def test_a_caption_is_no_class(tmp_path, texts, folder, expected):
    files = {f"{folder}{i}.jpg": png(i) for i in range(2)} | {f"{folder}{i}.txt": text for i, text in enumerate(texts)}
    table = list_images(write_tar(tmp_path / "s.tar", files))
    assert tuple(classes(table).values()) == expected
    assert table.left_out == ({} if "3" in expected else {".txt": 2})
    assert any("whole numbers in .txt files" in note for note in table.notes) is ("3" in expected)


def test_whole_numbers_of_json_may_have_a_point(tmp_path):
    files = {"1.jpg": png(1), "1.json": b'{"label": 7.0}', "2.jpg": png(2), "2.json": b'\xef\xbb\xbf{"label": "007"}'}
    assert classes(list_images(write_tar(tmp_path / "s.tar", files))) == {"1.jpg": "7", "2.jpg": "7"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.png": png(), "1.cls": b"\xff"}, "1.cls: the class cannot be read"),
        ({"1.png": png(), "1.json": b"{"}, "1.json: the class cannot be read"),
        ({"1.png": png(), "1.json": b"[" * 100_000}, "1.json: the class cannot be read"),
        ({"1.png": png(), "1.json": b'{"label": 1.5}'}, "the class is 1.5, must be a name or a whole number"),
        ({"1.png": png(), "1.json": b'{"label": true}'}, "the class is True"),
    ],
)
def test_files_that_cannot_be_a_class_are_refused(tmp_path, files, message):
    with pytest.raises(InputError) as caught:
        list_images(write_tar(tmp_path / "s.tar", files))
    assert message in str(caught.value)
