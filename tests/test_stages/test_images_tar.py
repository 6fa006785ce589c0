"""Listing of tars: the same table as a folder, WebDataset pairs, damaged archives."""

import io
import json
import random
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from stages.errors import InputError
from stages.images import ImageError, list_images


def png(gray=0):
    out = io.BytesIO()
    Image.new("L", (4, 3), gray).save(out, "PNG")
    return out.getvalue()


def write_tar(path, files, mode="w"):
    """Tar of {name: bytes, or the name of an earlier member as a hard link}, as tarfile writes it."""
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type, member.linkname = tarfile.LNKTYPE, data
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


def classes(table):
    return {
        i: table.class_names[label] if label >= 0 else None for i, label in zip(table.ids, table.labels, strict=True)
    }


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_a_folder_gives_the_folders_table(tmp_path, form):
    names = [
        "dog/1.png",
        "cat/é/2.png",
        "cat/" + "long" * 20 + "/3.png",
        "top.png",
        "cat/notes.md",
        ".git/4.png",
        "cat/.5.png",
    ]
    for gray, name in enumerate(names):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"no image" if name.endswith(".md") else png(gray))
    with tarfile.open(tmp_path / "set.tar", "w", format=form) as tar:
        tar.add(tmp_path / "set", ".")

    folder, tar = list_images(str(tmp_path / "set")), list_images(str(tmp_path / "set.tar"))

    assert tar.ids == folder.ids
    assert len(tar) == 4
    assert tar.class_names == folder.class_names == ("cat", "dog")
    assert tar.labels.tolist() == folder.labels.tolist()
    assert tar.sizes.tolist() == folder.sizes.tolist()
    assert tar.left_out == folder.left_out == {".md": 1}
    assert [tar.reader().read(i) for i in range(4)] == [folder.reader().read(i) for i in range(4)]


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


def test_of_two_members_with_one_name_the_later_counts_and_hard_links_are_followed(tmp_path):
    path = write_tar(tmp_path / "s.tar", {"a/1.png": png(1), "b/2.png": "a/1.png"})
    write_tar(path, {"a/1.png": png(9)}, "a")
    table = list_images(path)
    assert [table.reader().read(i) for i in range(2)] == [png(9), png(1)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.png": png(), "1.cls": b"\xff"}, "1.cls: the class cannot be read"),
        ({"1.png": png(), "1.json": b"{"}, "1.json: the class cannot be read"),
        ({"1.png": png(), "1.json": b"[" * 100_000}, "1.json: the class cannot be read"),
        ({"1.png": png(), "1.json": b'{"label": 1.5}'}, "the class is 1.5, must be a name or a whole number"),
        ({"1.png": png(), "1.json": b'{"label": true}'}, "the class is True"),
        ({"a.txt": b"", "b.txt": b""}, "no images found (left out: 2 files: 2 .txt)"),
        ({}, "no images found"),
    ],
)
def test_bad_members_are_refused(tmp_path, files, message):
    with pytest.raises(InputError) as caught:
        list_images(write_tar(tmp_path / "s.tar", files))
    assert message in str(caught.value)


def test_compressed_and_damaged_tars_are_refused(tmp_path):
    files = {f"{c}/{i}.png": png(i) for c in "ab" for i in range(3)}
    whole = Path(write_tar(tmp_path / "s.tar", files)).read_bytes()
    for name, data in {
        "empty.tar": b"",
        "text.tar": b"not a tar " * 100,
        "gzip.tar": Path(write_tar(tmp_path / "x", files, "w:gz")).read_bytes(),
        "cut.tar": whole[:1500],
        "cut-header.tar": whole[: 1024 * 2 + 200],
        "bad-header.tar": whole[:2048] + b"\x01" * 512 + whole[2560:],
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="not an uncompressed tar, or a damaged one"):
            list_images(str(tmp_path / name))


def test_a_tar_that_shrank_gives_image_errors(tmp_path):
    path = write_tar(tmp_path / "s.tar", {"1.png": png(), "2.png": png()})
    reader = list_images(path).reader()
    with open(path, "r+b") as file:
        file.truncate(1540)
    assert reader.read(0) == png()
    with pytest.raises(ImageError, match="truncated"):
        reader.read(1)


def test_flipped_bits_never_raise_anything_else(tmp_path):
    files = {"a/1.png": png(), "a/1.cls": b"3", "ü" * 90 + "/2.png": png(), "b.json": b"{}"}
    whole = Path(write_tar(tmp_path / "s.tar", files)).read_bytes()
    random.seed(0)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(random.randint(1, 8)):
            data[random.randrange(len(data) // 2)] ^= 1 << random.randrange(8)
        (tmp_path / "t.tar").write_bytes(data)
        try:
            table = list_images(str(tmp_path / "t.tar"))
            for i in range(len(table)):
                table.reader().read(i)
        except InputError:
            pass


def test_hostile_sizes_are_refused(tmp_path):
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-512 + (1 << 96)).to_bytes(12, "big")  # size -512: the next header would be this one
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "s.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(InputError, match="damaged"):
        list_images(str(tmp_path / "s.tar"))
