"""Folders of Hugging Face `datasets`: the same bytes in the same order, found without decoding or copying."""

import io
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from stages.errors import InputError
from stages.extract import ExtractOptions, extract_set
from stages.inputs.images import ImageError, decode_image, list_images

ANIMALS = ClassLabel(names=["dog", "cat", "bird"])


@pytest.fixture(autouse=True)
def quiet_library():
    """Saving draws progress bars."""
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def png(gray=0):
    out = io.BytesIO()
    Image.new("L", (4, 3), gray).save(out, "PNG")
    return out.getvalue()


def save(folder, columns, features=None, shards=1):
    features = Features({"image": datasets.Image()} if features is None else features)
    Dataset.from_dict(columns, features=features).save_to_disk(str(folder), num_shards=shards)
    return str(folder)


def rewrite_images(folder, images):
    """Put {"bytes", "path"} rows into the Arrow file, as older versions of the library stored them."""
    (path,) = Path(folder).glob("*.arrow")
    with pa.OSFile(str(path)) as file:
        table = pa.ipc.open_stream(file).read_all()
    place = table.schema.get_field_index("image")
    table = table.set_column(place, table.schema.field(place), pa.array(images, table.schema.field(place).type))
    with pa.OSFile(str(path), "w") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def read(table):
    """Bytes of every image, or the reason why there are none."""
    reader = table.reader()
    outcomes = []
    for i in range(len(table)):
        try:
            outcomes.append(reader.read(i))
        except ImageError as error:
            outcomes.append(str(error))
    return outcomes


def test_bytes_classes_and_names(tmp_path):
    images = [png(0), {"bytes": png(1), "path": "some/where/rex.png"}, Image.new("RGB", (5, 2), "red"), png(3)]
    source = save(
        tmp_path / "pets", {"image": images, "label": [1, 0, 1, -1]}, {"image": datasets.Image(), "label": ANIMALS}
    )

    table = list_images(source)

    assert table.ids == ("00000000", "00000001/rex.png", "00000002", "00000003")
    assert table.class_names == ("cat", "dog")  # no bird occurs
    assert table.labels.tolist() == [0, 1, 0, -1]
    found = read(table)
    assert [found[0], found[1], found[3]] == [png(0), png(1), png(3)]
    assert decode_image(found[2]).getpixel((0, 0)) == (255, 0, 0)
    assert table.sizes.tolist() == [len(data) for data in found]
    (arrow,) = Path(source).glob("*.arrow")
    assert set(table.mtimes_ns.tolist()) == {arrow.stat().st_mtime_ns}


def test_rows_keep_their_order_over_files_and_batches(tmp_path):
    contents = [b"%d" % i * (i % 7) for i in range(2500)]  # in batches of 100; some are empty
    source = save(tmp_path / "set", {"image": [{"bytes": data, "path": None} for data in contents]}, shards=2)
    table = list_images(source)
    assert table.ids == tuple(f"{row:08d}" for row in range(2500))
    assert read(table) == contents
    part = table.reader(1200, 1300)
    assert [part.read(i) for i in range(100)] == contents[1200:1300]


def test_a_filtered_dataset_lists_what_is_left(tmp_path):
    dataset = Dataset.from_dict({"image": [png(i) for i in range(9)]}, features=Features({"image": datasets.Image()}))
    dataset.select([7, 2, 5]).save_to_disk(str(tmp_path / "set"))
    assert read(list_images(str(tmp_path / "set"))) == [png(7), png(2), png(5)]


def test_other_processes_need_neither_the_library_nor_its_memory_map(tmp_path, monkeypatch):
    source = save(tmp_path / "set", {"image": [png(0), png(1)]})
    reader = list_images(source).reader()
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert pickle.loads(pickle.dumps(reader)).read(1) == png(1)
    (arrow,) = Path(source).glob("*.arrow")
    os.truncate(arrow, 300)
    with pytest.raises(ImageError, match=r"truncated"):
        reader.read(1)


def test_images_by_path_without_bytes_and_missing(tmp_path):
    source = save(
        tmp_path / "set",
        {"image": [png()] * 6, "label": ["a"] * 6},
        {"image": datasets.Image(), "label": Value("string")},
    )
    (tmp_path / "set" / "here.png").write_bytes(png(1))
    (tmp_path / "there.png").write_bytes(png(2))
    (tmp_path / "folder.png").mkdir()
    paths = ["here.png", str(tmp_path / "there.png"), "gone.png", str(tmp_path / "folder.png"), "hf://x/y/z.png"]
    rewrite_images(source, [{"bytes": None, "path": path} for path in paths] + [None])

    table = list_images(source)

    assert table.ids == (
        "00000000/here.png",
        "00000001/there.png",
        "00000002/gone.png",
        "00000003/folder.png",
        "00000004/z.png",
        "00000005",
    )
    assert read(table) == [
        png(1),
        png(2),
        "cannot be read: No such file or directory",
        "not a regular file",
        "stored elsewhere, at 'hf://x/y/z.png'",
        "the row has no image",
    ]
    assert table.sizes.tolist() == [len(png(1)), len(png(2)), 0, 0, 0, 0]
    assert table.mtimes_ns[1] == (tmp_path / "there.png").stat().st_mtime_ns


def test_a_row_without_an_image_is_a_listed_failure(tmp_path, backbone):
    images = [png(gray) for gray in range(5)]
    source = save(tmp_path / "set", {"image": [*images[:2], None, *images[2:]]})
    spec = backbone.feature_spec("float16", "none")
    cache = extract_set(
        "set", list_images(source), spec, tmp_path, lambda: backbone, options=ExtractOptions(max_failures=0.5)
    )
    assert cache.n_rows == 5
    assert json.loads((cache.path / "failures.jsonl").read_text()) == {
        "id": "00000002",
        "reason": "the row has no image",
    }


@pytest.mark.parametrize(
    ("column", "kind", "values", "classes"),
    [
        ("label", Value("string"), ["dog", "cat", ""], ["dog", "cat", None]),
        ("labels", Value("int64"), [10, 9, -1], ["10", "9", None]),
        ("class", Value("uint8"), [1, 0, None], ["1", "0", None]),
        ("species", ANIMALS, [2, 1, None], ["bird", "cat", None]),
        ("label", Value("float32"), [0.5, 1.0, 2.0], [None, None, None]),
        ("height", Value("int64"), [1, 2, 3], [None, None, None]),
    ],
)
def test_where_classes_come_from(tmp_path, column, kind, values, classes):
    features = {column: kind, "image": datasets.Image()}
    table = list_images(save(tmp_path / "set", {column: values, "image": [png()] * 3}, features))
    assert [table.class_names[label] if label >= 0 else None for label in table.labels] == classes


def test_of_several_class_columns_label_counts(tmp_path):
    features = {"coarse": ANIMALS, "label": ANIMALS, "image": datasets.Image()}
    columns = {"coarse": [0], "label": [1], "image": [png()]}
    assert list_images(save(tmp_path / "clear", columns, features)).class_names == ("cat",)
    features = {"coarse": ANIMALS, "fine": ANIMALS, "image": datasets.Image()}
    with pytest.raises(InputError, match="coarse, fine: label_column"):
        list_images(save(tmp_path / "not", {"coarse": [0], "fine": [1], "image": [png()]}, features))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"left": png(), "right": png()}, r"several columns of images, left, right \(of left, right, note\)"),
        ({}, r"no column of type Image \(of note\)"),
    ],
)
def test_one_column_of_images_is_needed(tmp_path, columns, message):
    features = dict.fromkeys(columns, datasets.Image()) | {"note": Value("string")}
    columns = {name: [data] for name, data in columns.items()} | {"note": ["n"]}
    with pytest.raises(InputError, match=message):
        list_images(save(tmp_path / "set", columns, features))


def test_several_splits_are_refused_by_name(tmp_path):
    dataset = Dataset.from_dict({"image": [png()]}, features=Features({"image": datasets.Image()}))
    DatasetDict({"train": dataset, "test": dataset}).save_to_disk(str(tmp_path / "set"))
    source = str(tmp_path / "set")
    with pytest.raises(InputError) as caught:
        list_images(source)
    assert str(caught.value) == f"{source}: a dataset of several splits; give {source}/train or {source}/test"
    assert len(list_images(f"{source}/train")) == 1
    (tmp_path / "set" / "dataset_dict.json").write_text("[]")
    with pytest.raises(InputError, match="cannot be read"):
        list_images(source)


def test_an_empty_dataset_is_refused(tmp_path):
    with pytest.raises(InputError, match="no rows"):
        list_images(save(tmp_path / "set", {"image": []}))


def test_without_the_library_the_message_says_what_to_install(tmp_path, monkeypatch):
    source = save(tmp_path / "set", {"image": [png()]})
    monkeypatch.setitem(sys.modules, "datasets", None)  # what Python does for a module that is not there
    with pytest.raises(InputError) as caught:
        list_images(source)
    assert str(caught.value) == f"{source} is a Hugging Face dataset: pip install 'mofe-feature-cache[hf]'"


def test_damaged_files_are_refused_or_their_images_are(tmp_path):
    features = {"image": datasets.Image(), "label": ANIMALS}
    source = save(tmp_path / "set", {"image": [png(i) for i in range(20)], "label": [0] * 20}, features)
    (arrow,) = Path(source).glob("*.arrow")
    whole, rng, outcomes = arrow.read_bytes(), random.Random(0), []
    for size in [0, 1, 8, *(rng.randrange(len(whole)) for _ in range(20)), len(whole) - 8]:
        arrow.write_bytes(whole[:size])
        with pytest.raises(InputError, match="the Hugging Face dataset cannot be read"):
            list_images(source)
    for _ in range(150):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        arrow.write_bytes(flipped)
        try:
            outcomes.append(len(read(list_images(source))))
        except InputError as error:
            outcomes.append(str(error).count("\n"))
    assert set(outcomes) == {0, 20}  # refused in one line, or every row is still there

    arrow.write_bytes(whole)
    for name in ("state.json", "dataset_info.json"):
        text = (tmp_path / "set" / name).read_text()
        for damaged in ("", text[: len(text) // 2], text.replace("data-", "gone-").replace("Image", "Picture")):
            (tmp_path / "set" / name).write_text(damaged)
            with pytest.raises(InputError, match="cannot be read"):
                list_images(source)
        (tmp_path / "set" / name).write_text(text)
    assert len(list_images(source)) == 20


def test_rows_are_not_lost_to_a_damaged_length(tmp_path):
    source = save(tmp_path / "set", {"image": [{"bytes": b"x", "path": None}] * 250})
    (arrow,) = Path(source).glob("*.arrow")
    data = arrow.read_bytes()
    starts = [at for at in range(0, len(data), 8) if data[at : at + 4] == b"\xff" * 4]
    assert len(starts) == 5  # schema, three batches, end
    arrow.write_bytes(data[: starts[2] + 4] + bytes(4) + data[starts[2] + 8 :])
    with pytest.raises(InputError, match="do not end together"):
        list_images(source)


def test_a_class_that_has_no_name_is_damage(tmp_path):
    source = save(tmp_path / "set", {"image": [png()], "label": [2]}, {"image": datasets.Image(), "label": ANIMALS})
    info = tmp_path / "set" / "dataset_info.json"
    body = json.loads(info.read_text())
    body["features"]["label"]["names"] = ["dog"]
    info.write_text(json.dumps(body))
    with pytest.raises(InputError, match=r"row 0 is of class 2, .* 1 classes"):
        list_images(source)


def test_listing_leaves_no_trace(tmp_path):
    """No network, no file in the folder or in the home, no output; twenty files would draw a progress bar."""
    source = save(tmp_path / "set", {"image": [png(i) for i in range(40)]}, shards=20)
    before = {path: path.stat().st_mtime_ns for path in Path(source).iterdir()}
    home = tmp_path / "home"
    home.mkdir()
    code = f"""
import os, sys
sys.addaudithook(lambda event, _: os._exit(3) if event in ("socket.connect", "socket.getaddrinfo") else None)
from stages.inputs.images import list_images
list_images({source!r})
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(__file__).parents[3],
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert list(home.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in Path(source).iterdir()} == before


def test_the_users_progress_bars_are_as_before(tmp_path):
    source = save(tmp_path / "set", {"image": [png()]})
    list_images(source)
    assert datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    list_images(source)
    assert not datasets.are_progress_bars_disabled()


def test_a_folder_that_only_looks_like_one_is_a_folder_of_images(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "state.json").write_text("{}")
    assert list_images(str(tmp_path)).ids == ("a.png",)
    assert np.array_equal(list_images(str(tmp_path)).labels, [-1])
