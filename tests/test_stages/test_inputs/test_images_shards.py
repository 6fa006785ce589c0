"""Several tars that are one set: folders of them, wildcards, brace ranges; what is missing, damaged or left out."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.errors import InputError
from stages.inputs.images import Columns, list_images
from tests.test_stages.tars import classes, contents, png, write_tar


def write_shards(folder, names=("train-00.tar", "train-01.tar", "train-02.tar")):
    """Tars that each have the same two WebDataset samples, of other classes; returns what a listing has to give."""
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        files = {"0.jpg": png(number), "0.cls": str(number).encode(), "1.jpg": png(number + 1), "1.cls": b"9"}
        write_tar(folder / name, files)
        expected |= {f"{name}/0.jpg": (str(number), png(number)), f"{name}/1.jpg": ("9", png(number + 1))}
    return expected


def listed(source):
    table = list_images(str(source))
    return {name: (class_name, contents(table)[name]) for name, class_name in classes(table).items()}


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "*.tar",
        "train-*.tar",
        "train-{00..02}.tar",
        "train-{00,01,02}.tar",
        "tr[a-z]in-0?.tar",
        "{train-0{0,1},*2}.tar",
    ],
)
def test_shards_are_one_set_however_they_are_named(tmp_path, pattern):
    expected = write_shards(tmp_path / "data [2026]" / "set")
    assert listed(tmp_path / "data [2026]" / "set" / pattern) == expected
    (tmp_path / "data [2026]").rename(tmp_path / "elsewhere")
    assert listed(tmp_path / "elsewhere" / "set" / pattern) == expected  # ids do not depend on the place


def test_ranges_with_and_without_zeros_and_several_braces(tmp_path):
    names = [f"{part}-{number}.tar" for part in ("a", "b") for number in range(8, 12)]
    expected = write_shards(tmp_path, names)
    assert listed(tmp_path / "{a..b}-{8..11}.tar") == expected
    every_other = listed(tmp_path / "{a,b}-{8..11..2}.tar")
    assert every_other == {name: row for name, row in expected.items() if "-8." in name or "-10." in name}
    with pytest.raises(InputError, match=r"not there in .*: 'a-08.tar', 'a-09.tar', 'b-08.tar', 'b-09.tar'"):
        list_images(str(tmp_path / "{a,b}-{08..11}.tar"))


def test_shards_may_lie_in_folders(tmp_path):
    expected = write_shards(tmp_path, ["a/0.tar", "b/0.tar", "b/c/1.tar"])
    assert listed(tmp_path) == listed(tmp_path / "**" / "*.tar") == listed(tmp_path / "{a/0,b/0,b/c/1}.tar") == expected


def test_a_file_that_is_called_like_a_pattern_is_itself(tmp_path):
    write_shards(tmp_path, ["a{1,2}.tar", "b[1].tar"])
    assert list_images(str(tmp_path / "a{1,2}.tar")).ids == list_images(str(tmp_path / "b[1].tar")).ids
    assert list_images(str(tmp_path / "a{1,2}.tar")).ids == ("0.jpg", "1.jpg")


def test_a_missing_shard_is_refused_by_its_name_before_any_is_read(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "train-00.tar").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"not there in .*: 'train-03.tar', 'train-04.tar'$"):
        list_images(str(tmp_path / "train-{00..04}.tar"))
    with pytest.raises(InputError, match=r"not there in .*: 'test-\*.tar'$"):
        list_images(str(tmp_path / "{train,test}-*.tar"))
    (tmp_path / "train-01.tar").unlink()
    (tmp_path / "train-01.tar").symlink_to("gone")
    with pytest.raises(InputError, match=r"train-01.tar: cannot be read: No such file or directory"):
        list_images(str(tmp_path))


def test_all_damaged_shards_are_named(tmp_path):
    write_shards(tmp_path, [f"{i}.tar" for i in range(9)])
    for name in ("1.tar", "7.tar"):
        os.truncate(tmp_path / name, 1100)
    with pytest.raises(InputError) as caught:
        list_images(str(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: 2 of 9 shards cannot be read: ")
    for name in ("1.tar", "7.tar"):
        assert f"{tmp_path}/{name}: damaged: it ends within the header, after '0.jpg'" in message
    for i in range(9):
        os.truncate(tmp_path / f"{i}.tar", 1100)
    with pytest.raises(InputError) as caught:
        list_images(str(tmp_path))
    assert all(f"{tmp_path}/{i}.tar" in str(caught.value) for i in range(9))


def test_a_class_in_one_shard_makes_all_of_them_webdataset(tmp_path):
    write_tar(tmp_path / "0.tar", {"a/0.jpg": png()})
    write_tar(tmp_path / "1.tar", {"a/0.jpg": png(), "a/0.cls": b"cat"})
    assert classes(list_images(str(tmp_path))) == {"0.tar/a/0.jpg": None, "1.tar/a/0.jpg": "cat"}


def test_every_member_is_dated_by_its_own_tar(tmp_path):
    write_shards(tmp_path)
    for number in range(3):
        os.utime(tmp_path / f"train-0{number}.tar", ns=(0, number))
    assert list_images(str(tmp_path)).mtimes_ns.tolist() == [0, 0, 1, 1, 2, 2]


def test_in_a_folder_of_images_tars_are_left_out_and_counted(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1").write_bytes(png())  # by its first bytes
    table = list_images(str(tmp_path))
    assert table.ids == ("cat/1",)
    assert table.left_out == {".tar": 3}


def write_img2dataset(folder, n_shards=2, classes=None):
    """A folder as img2dataset's WebDatasetSampleWriter leaves it: one download of three has failed in each shard."""
    folder.mkdir()
    for shard in range(n_shards):
        files, rows = {}, []
        for i in range(3):
            key = f"{shard:05d}{i:04d}"
            row = {"url": f"https://x/{key}", "caption": f"{i} cats", "key": key}
            row |= {"status": "success", "error_message": None}
            row |= {"width": 4, "height": 3, "original_width": 8, "original_height": 6, "sha256": "00"}
            row |= {"breed": classes[i]} if classes else {}
            if i == 1:
                row |= {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"}
            else:
                files |= {f"{key}.jpg": png(shard), f"{key}.txt": row["caption"].encode()}
                files |= {f"{key}.json": json.dumps(row, indent=4).encode()}
            rows.append(row)
        write_tar(folder / f"{shard:05d}.tar", files)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        stats = {"count": 3, "successes": 2, "failed_to_download": 1, "status_dict": {"success": 2}}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))


def test_img2datasets_output_folder_is_read_as_it_is(tmp_path):
    write_img2dataset(tmp_path / "laion")
    (tmp_path / "laion" / "_tmp").mkdir()
    table = list_images(str(tmp_path / "laion"))
    ids = ["00000.tar/000000000.jpg", "00000.tar/000000002.jpg", "00001.tar/000010000.jpg", "00001.tar/000010002.jpg"]
    assert list(table.ids) == ids
    assert contents(table)["00001.tar/000010002.jpg"] == png(1)
    assert classes(table) == dict.fromkeys(ids)
    assert table.left_out == {".parquet": 2, ".json": 2 + 4, ".txt": 4}


def test_a_column_that_img2dataset_was_told_to_save_is_the_class(tmp_path):
    write_img2dataset(tmp_path / "pets", classes=["pug", "pug", "tabby"])
    table = list_images(str(tmp_path / "pets"), columns=Columns(label="breed"))
    assert set(classes(table).values()) == {"pug", "tabby"}
    assert table.left_out == {".parquet": 2, ".json": 2, ".txt": 4}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a/*", r"a pattern is for tars, but '1.jpg' is none; give a folder of images"),
        ("{a/1.jpg,s.tar}", r"a pattern is for tars, but 'a/1.jpg' is none"),
        ("{s.tar", r"no such file, and its braces do not pair"),
        ("{0..99999999}.tar", r"a range of more than 1,000,000 shards"),
        ("none-*.tar", r"not there in .*: 'none-\*.tar'"),
    ],
)
def test_bad_patterns_are_refused(tmp_path, pattern, message):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(png())
    write_tar(tmp_path / "s.tar", {"1.jpg": png()})
    with pytest.raises(InputError, match=message):
        list_images(str(tmp_path / pattern))


def test_what_a_wildcard_matches_beside_tars_is_left_out(tmp_path):
    write_img2dataset(tmp_path / "laion")
    table = list_images(str(tmp_path / "laion" / "0000*"))
    assert len(table) == 4
    assert table.left_out[".parquet"] == 2
    assert Path(table.source).name == "0000*"
