"""Lists of images as spreadsheets, pandas and Arrow write them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.errors import InputError
from stages.inputs.images import Columns, list_images
from tests.test_stages.test_inputs.test_images import classes, save


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", ", "])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_what_separates_fields_is_seen(tmp_path, separator, suffix):
    save(tmp_path, "1.png", "a,b;c.png")
    rows = ["label", "path"], ["big dog", "1.png"], ["", '"a,b;c.png"']
    (tmp_path / f"l.{suffix}").write_text("".join(f"{separator.join(row)}\r\n" for row in rows), "utf-8-sig")
    assert classes(list_images(str(tmp_path / f"l.{suffix}"))) == {"1.png": "big dog", "a,b;c.png": None}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", "1.png 0\n\n./1.png 1\n", "lines 1 and 3 both name '1.png': leave one of them out"),
        ("l.csv", "path\n1.png\n2.png\nx/../1.png\n", "lines 2 and 4 both name '1.png'"),
        (
            "l.csv",
            "where;label\n1.png;a\n",
            "no column of paths (path, file, filename, filepath, image, imagepath) among where, label",
        ),
        ("l.csv", "path;label\n1.png;a;b\n", "line 2: no path, or more fields"),
        ("l.csv", "path;label\n1.png;a\n2.png\n", "line 3: 2 fields are named, this line has fewer"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, name, content, message):
    save(tmp_path, "1.png", "2.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        list_images(str(tmp_path / name))
    assert message in str(caught.value)


PATHS = ["x/1.png", "2.png", "3.png"]


def parquet(root, **columns):
    save(root, *PATHS)
    pq.write_table(pa.table(columns), root / "l.parquet")
    return str(root / "l.parquet")


@pytest.mark.parametrize(
    "paths", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array(["dog", None, " cat "]), ["dog", None, "cat"]),
        (pa.array(["dog", "", "cat"], pa.large_string()), ["dog", None, "cat"]),
        (pa.array(["dog", None, "dog"]).dictionary_encode(), ["dog", None, "dog"]),
        (pa.array([7, None, 10], pa.float32()), ["7", None, "10"]),
        (pa.array([7, float("nan"), -1], pa.float64()), ["7", None, None]),
        (pa.array(np.array([7, 0, 1], np.float16)), ["7", "0", "1"]),
        *(
            (pa.array([7, None, 10], kind), ["7", None, "10"])
            for kind in (pa.int8(), pa.uint8(), pa.int16(), pa.uint16())
        ),
        *(
            (pa.array([7, None, 10], kind), ["7", None, "10"])
            for kind in (pa.int32(), pa.uint32(), pa.int64(), pa.uint64())
        ),
        (pa.array([2**64 - 1, 0, 1], pa.uint64()), [str(2**64 - 1), "0", "1"]),
        (pa.array([3, 4, 4]).dictionary_encode(), ["3", "4", "4"]),
        (pa.nulls(3), [None, None, None]),
    ],
)
def test_parquet_lists(tmp_path, paths, labels, expected):
    source = parquet(tmp_path, label=labels, path=pa.array(PATHS).cast(paths))
    assert classes(list_images(source)) == dict(zip(PATHS, expected, strict=True))


def test_parquet_as_pandas_writes_it(tmp_path):
    source = parquet(tmp_path, where=PATHS, kind=[1, 2, 2], __index_level_0__=[4, 5, 6])
    assert classes(list_images(source, columns=Columns("where", "kind"))) == dict(zip(PATHS, "122", strict=True))
    assert classes(list_images(source, str(tmp_path), Columns("where"))) == dict.fromkeys(PATHS)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["2.png", None, "3.png"]}, "row 1: no path"),
        ({"path": ["2.png", "3.png", "./2.png"]}, "rows 0 and 2 both name '2.png'"),
        ({"path": [1, 2]}, "path is int64, must be text: the paths of image files"),
        ({"image": [{"bytes": b"", "path": "2.png"}]}, "image is struct<bytes: binary, path: string>, must be text"),
        ({"path": ["2.png"], "label": [0.5]}, "label of row 0 is 0.5, must be a name, a class number from 0, or -1"),
        ({"path": ["2.png"], "label": [-2]}, "label of row 0 is -2"),
        ({"path": ["2.png"], "label": [[1]]}, "label is list<element: int64>, must be text or whole numbers"),
        ({"path": ["2.png"], "label": [True]}, "label is bool"),
        ({"cls": [[1.0]], "label": [1]}, "no column of paths"),
        ({"path": pa.array([], pa.string())}, "the list is empty"),
        ({"path": ["9.png"]}, "none of its 1 images is there (the first: row 0, '9.png')"),
    ],
)
def test_parquet_that_is_no_list_is_refused(tmp_path, columns, message):
    with pytest.raises(InputError) as caught:
        list_images(parquet(tmp_path, **columns))
    assert message in str(caught.value)
    assert "l.parquet" in str(caught.value)


def test_damaged_parquet_is_refused(tmp_path):
    source = parquet(tmp_path, path=PATHS)
    whole = (tmp_path / "l.parquet").read_bytes()
    for damaged in (b"", whole[:40], whole[:-8] + bytes(8)):
        (tmp_path / "l.parquet").write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read"):
            list_images(source)
