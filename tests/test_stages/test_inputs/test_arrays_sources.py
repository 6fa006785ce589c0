"""Features as people have them: other names, other columns, several files, other types, heads of more classes."""

import os
import pickle
import resource
import zipfile

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from stages.errors import InputError
from stages.inputs.arrays import list_arrays
from stages.inputs.arrays.columns import FromBFloat16, Held, InParts
from tests.test_stages.test_inputs.test_arrays import as_hdf5, as_npz, as_parquet, as_torch, imported

CLS = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)


def read(table, key="cls"):
    return table.columns[key].read(0, len(table))


def message(path, *args):
    with pytest.raises(InputError) as caught:
        list_arrays(str(path), *args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def class_of(table):
    return [table.samples.class_names[label] if label >= 0 else None for label in table.samples.labels]


# ---------------------------------------------------------------------------------------------------- labels and ids


@pytest.mark.parametrize(
    "kind", [pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(), pa.int8(), pa.float32(), pa.float64()]
)
def test_labels_of_any_number_in_parquet(tmp_path, kind):
    pq.write_table(
        pa.table(
            {"cls": CLS[:3].tolist(), "label": pa.array([3, None, 7], kind), "id": pa.array([3, 2**40, 7], pa.uint64())}
        ),
        tmp_path / "f.parquet",
    )
    table = list_arrays(str(tmp_path / "f.parquet"))
    assert class_of(table) == ["3", None, "7"]
    assert table.samples.ids == ("3", str(2**40), "7")


@pytest.mark.parametrize("ids", [["a", None, "c"], [5, None, 7], ["a", "", "c"]])
def test_an_id_that_is_none_is_refused_with_its_row(tmp_path, ids):
    pq.write_table(pa.table({"cls": CLS[:3].tolist(), "id": ids}), tmp_path / "f.parquet")
    assert message(tmp_path / "f.parquet").endswith("f.parquet: id of row 1 is empty")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint64, np.int16, np.float32, np.float64])
def test_labels_of_any_number_in_numpy(tmp_path, dtype):
    as_npz(
        tmp_path / "f.npz", {"cls": CLS[:3], "label": np.array([3, 0, 7], dtype), "id": np.array([1, 2, 3], np.uint16)}
    )
    table = list_arrays(str(tmp_path / "f.npz"))
    assert (class_of(table), table.samples.ids) == (["3", "0", "7"], ("1", "2", "3"))


# ------------------------------------------------------------------------------------------------------------ names


WRITERS = {"npz": as_npz, "parquet": as_parquet, "h5": as_hdf5, "pt": as_torch}


@pytest.mark.parametrize("suffix", WRITERS)
def test_columns_by_name_and_others_left_out(tmp_path, suffix):
    others = {
        "__index_level_0__": np.arange(9),
        "cls": np.zeros((9, 2), np.float32),
        "caption": np.array(list("abcdefghi")),
    }
    path = WRITERS[suffix](tmp_path / f"f.{suffix}", {"emb": CLS, "y": np.arange(9) % 2} | others)
    table = list_arrays(str(path), {"cls": "emb", "label": "y"})
    np.testing.assert_array_equal(read(table), CLS)
    assert class_of(table) == ["0", "1"] * 4 + ["0"]
    (note,) = table.samples.notes
    assert note.startswith(f"{path}: left out: ")
    assert {name for name in others if repr(name) in note} == set(others)
    assert message(path, {"cls": "emd"}).startswith(
        f"{path}: columns.cls: 'emd' is not there; did you mean 'emb'? (it has "
    )


def test_columns_beside_a_npy(tmp_path):
    for name, array in {"f": CLS, "f.y": np.arange(9), "f.notes": np.array([None])}.items():
        np.save(tmp_path / f"{name}.npy", array)
    table = list_arrays(str(tmp_path / "f.npy"), {"label": "y"})
    assert class_of(table) == [str(i) for i in range(9)]
    assert table.samples.notes == (f"{tmp_path / 'f.npy'}: left out: 'notes': columns that no key names",)


def test_without_names_pandas_columns_are_left_out_and_misspelt_keys_are_not(tmp_path):
    table = {"cls": CLS[:2].tolist(), "url": ["a", "b"], "__index_level_0__": [0, 1]}
    pq.write_table(pa.table(table), tmp_path / "f.parquet")
    assert (
        list_arrays(str(tmp_path / "f.parquet"))
        .samples.notes[0]
        .endswith("left out: 'url', '__index_level_0__': columns that no key names")
    )
    pq.write_table(pa.table(table | {"Labels": [0, 1]}), tmp_path / "f.parquet")
    assert "did you mean 'label'? Say so by columns = { label = \"Labels\" }" in message(tmp_path / "f.parquet")
    assert class_of(list_arrays(str(tmp_path / "f.parquet"), {"label": "Labels"})) == ["0", "1"]
    assert class_of(list_arrays(str(tmp_path / "f.parquet"), {"cls": "cls"})) == [None, None]
    pq.write_table(pa.table({"emb": CLS.tolist()}), tmp_path / "f.parquet")
    assert 'columns = { cls = "…" } says what they are called' in message(tmp_path / "f.parquet")


# ------------------------------------------------------------------------------------------------------------ parts


def write_parts(folder, suffix, n=12):
    """A row a part; names in which 10 stands before 9 as text."""
    folder.mkdir()
    cls = np.arange(n, dtype=np.float32)[:, None] + [0, 0.5]
    for row in range(n):
        WRITERS[suffix](folder / f"part-{row}.{suffix}", {"cls": cls[row : row + 1], "label": np.array([row % 3])})
    return cls


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("pattern", ["", "part-*", "part-[0-9]*.*"])
def test_parts_are_one_set(tmp_path, suffix, pattern):
    cls = write_parts(tmp_path / "set", suffix)
    (tmp_path / "set" / "_SUCCESS").touch()
    (tmp_path / "set" / ".hidden.npz").touch()
    table = list_arrays(str(tmp_path / "set" / pattern) if pattern else str(tmp_path / "set"))
    np.testing.assert_array_equal(read(table), cls)
    np.testing.assert_array_equal(table.columns["cls"].read(7, 11), cls[7:11])
    assert class_of(table) == [str(row % 3) for row in range(12)]
    assert table.samples.ids == tuple(map(str, range(12)))
    assert imported(table, tmp_path).n_rows == 12
    if not pattern:
        assert table.samples.notes == (f"{tmp_path / 'set'}: left out: 1 file: 1 without extension",)


def test_npy_parts_with_what_stands_beside_them(tmp_path):
    for part, rows in {"a": slice(0, 4), "b.c": slice(4, 9)}.items():
        np.save(tmp_path / f"{part}.npy", CLS[rows])
        np.save(tmp_path / f"{part}.label.npy", np.arange(9)[rows])
    for source in (tmp_path, tmp_path / "*.npy"):
        table = list_arrays(str(source))
        np.testing.assert_array_equal(read(table), CLS)
        assert class_of(table) == list("012345678")


def test_a_part_that_was_changed_is_seen(tmp_path):
    write_parts(tmp_path / "set", "npz")
    first = imported(list_arrays(str(tmp_path / "set")), tmp_path)
    path = tmp_path / "set" / "part-3.npz"
    as_npz(path, {"cls": np.array([[99, 99]], np.float32), "label": np.array([0])})
    os.utime(path, (1, 1))  # older than the others
    second = imported(list_arrays(str(tmp_path / "set")), tmp_path)
    assert second.read("cls", slice(3, 4)).tolist() == [[99, 99]]
    assert second.path != first.path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cls": np.ones((1, 3), np.float32), "label": np.array([0])}, "cls has rows of shape (3,), in "),
        ({"cls": np.ones((1, 2), np.float32)}, "has no 'label', which "),
        ({"cls": np.ones((2, 2), np.float32), "label": np.array([0])}, "label has shape (1,), must be (2,)"),
        ({"cls": np.ones((0, 2), np.float32), "label": np.zeros(0, int)}, "cls has no rows"),
    ],
)
def test_parts_that_do_not_go_together_are_named(tmp_path, change, said):
    write_parts(tmp_path / "set", "npz")
    as_npz(tmp_path / "set" / "part-3.npz", change)
    assert message(tmp_path / "set").startswith(f"{tmp_path / 'set' / 'part-3.npz'}: {said}")


def test_folders_that_hold_no_set_are_refused(tmp_path):
    assert message(tmp_path).startswith(f"{tmp_path}: no file of features there; they end in .npz, ")
    assert "no file of features there" in message(tmp_path / "*.npz")
    as_npz(tmp_path / "a.npz", {"cls": CLS})
    as_parquet(tmp_path / "b.parquet", {"cls": CLS})
    assert "holds files of several kinds (1 .npz, 1 .parquet): give a pattern, such as '*.npz'" in message(tmp_path)
    as_npz(tmp_path / "b.npz", {"cls": CLS, "id": np.arange(9)})
    as_npz(tmp_path / "a.npz", {"cls": CLS, "id": np.arange(9)})
    assert "id '0' stands in rows 0 and 9: name every row once" in message(tmp_path / "*.npz")


def test_more_parts_than_a_process_may_open(tmp_path):
    cls = write_parts(tmp_path / "set", "parquet", 150)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        table = list_arrays(str(tmp_path / "set"))
        np.testing.assert_array_equal(np.concatenate([table.columns["cls"].read(i, i + 1) for i in range(150)]), cls)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@settings(max_examples=50)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
def test_joined_columns_are_their_concatenation(sizes, data):
    whole = np.arange(2 * sum(sizes)).reshape(-1, 2)
    joined = InParts([Held(part) for part in np.split(whole, np.cumsum(sizes)[:-1])])
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole)))))
    np.testing.assert_array_equal(joined.read(start, stop), whole[start:stop])
    assert joined.shape == whole.shape


# --------------------------------------------------------------------------------------------------- clip-retrieval


def clip_output(root, names, metadata=None):
    """As its writer leaves them: a folder of arrays, one of tables that pandas wrote, numbered with leading zeros."""
    (root / "img_emb").mkdir(parents=True)
    (root / "metadata").mkdir()
    (root / "text_emb").mkdir()
    for number in range(3):
        rows = slice(3 * number, 3 * number + 3)
        np.save(root / "img_emb" / f"img_emb_{number:02d}.npy", CLS[rows].astype(np.float16))
        columns = {
            "image_path": names[rows],
            "caption": ["c"] * 3,
            "breed": list("aab"),
            "__index_level_0__": [0, 1, 2],
        }
        pq.write_table(pa.table(columns), root / "metadata" / f"metadata_{number:02d}.parquet")
    (root / "image.index").touch()
    return root


NAMES = [f"{i:09d}" for i in range(9)]


@pytest.mark.parametrize("inside", ["", "img_emb", "img_emb/img_emb_*.npy"])
def test_the_output_of_clip_retrieval(tmp_path, inside):
    source = clip_output(tmp_path / "out", NAMES) / inside
    table = list_arrays(str(source), {"label": "breed"})
    np.testing.assert_array_equal(read(table), CLS.astype(np.float16))
    assert table.samples.ids == tuple(NAMES)
    assert class_of(table) == list("aab") * 3
    assert table.dtype == "float16"
    assert "left out: 'caption', '__index_level_0__'" in table.samples.notes[0]
    assert class_of(list_arrays(str(source))) == [None] * 9


def test_paths_of_clip_retrieval_that_are_not_unique_name_no_rows(tmp_path):
    table = list_arrays(str(clip_output(tmp_path / "out", [*NAMES[:-1], NAMES[0]])))
    assert table.samples.ids == tuple(map(str, range(9)))
    assert "'000000000' is that of rows 0 and 8" in table.samples.notes[-1]


def test_a_table_of_clip_retrieval_that_is_missing_or_too_short(tmp_path):
    source = clip_output(tmp_path / "out", NAMES)
    second = source / "metadata" / "metadata_01.parquet"
    pq.write_table(pa.table({"image_path": ["x", "y"], "breed": ["a", "b"]}), second)
    assert "img_emb_01.npy: id has shape (2,), must be (3,) as cls has 3 rows" in message(source)
    second.unlink()
    assert "metadata_01.parquet is missing, which clip-retrieval writes beside it" in message(source)


# ------------------------------------------------------------------------------------------------------ other types


BFLOATS = torch.tensor([[1.0, -2.5], [3.0e38, 1.1754944e-38], [0.0, -0.0]], dtype=torch.bfloat16)


def test_bfloat16_is_read_as_float32_and_said(tmp_path):
    torch.save({"cls": BFLOATS}, tmp_path / "f.pt")
    torch.save(BFLOATS, tmp_path / "alone.pth")
    save_file({"cls": BFLOATS}, tmp_path / "f.safetensors")
    for path in sorted(tmp_path.iterdir()):
        table = list_arrays(str(path))
        assert table.samples.notes == (f"{path}: cls: bfloat16 is stored as float32",)
        assert table.dtype == "float32"
        np.testing.assert_array_equal(read(table), BFLOATS.float().numpy())
        np.testing.assert_array_equal(
            imported(table, tmp_path / f"{path.name}.cache").read("cls"), BFLOATS.float().numpy()
        )


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1))
def test_every_bfloat16_is_the_float_that_torch_says(bits):
    values = np.array(bits, np.uint16)[:, None]
    expected = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(FromBFloat16(Held(values)).read(0, len(bits)), expected)


def test_tensors_are_read_as_they_are(tmp_path):
    torch.save(
        {
            "cls": torch.nn.Parameter(torch.from_numpy(CLS).T.contiguous().T),  # by columns, with a gradient
            "label": torch.arange(9, dtype=torch.uint8),
            "id": [f"{i}.jpg" for i in range(9)],
            "epoch": 3,
        },
        tmp_path / "f.pt",
    )
    table = list_arrays(str(tmp_path / "f.pt"))
    np.testing.assert_array_equal(read(table), CLS)
    assert class_of(table) == list("012345678")
    assert table.samples.ids[8] == "8.jpg"
    assert "left out: 'epoch'" in table.samples.notes[0]


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ([torch.ones(2, 2)], "holds a list, must be a tensor or a dictionary of tensors by name"),
        ({"cls": 3}, "cls is a int, must be a tensor"),
        ({"cls": torch.ones(2, 2).to_sparse()}, "cls is a tensor of another layout"),
        ({"cls": torch.ones(2, 2).to(torch.float8_e4m3fn)}, "cls is torch.float8_e4m3fn, must be float16, bfloat16, "),
        ({"cls": torch.ones(2, 2, dtype=torch.complex64)}, "cls is complex64, must be float16"),
        ({"cls": torch.ones(2)}, "cls has shape (2,), must have 2 axes"),
        ({"cls": torch.ones(1, 2).expand(10**12, 2)}, "cls is a view of fewer values, repeated: save its own"),
        (
            {"state_dict": {"cls": torch.ones(2, 2)}},
            "'cls' is missing: the features of n rows, [n, D] (it has state_dict)",
        ),
    ],
)
def test_what_torch_saved_and_cannot_be_used(tmp_path, stored, said):
    torch.save(stored, tmp_path / "f.pt")
    assert message(tmp_path / "f.pt").startswith(f"{tmp_path / 'f.pt'}: {said}")


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"\x80\x02}.", b"PK\3\4", pickle.dumps({"cls": [1]})])
def test_what_torch_did_not_save(tmp_path, content):
    (tmp_path / "f.pt").write_bytes(content)
    assert message(tmp_path / "f.pt").startswith(f"{tmp_path / 'f.pt'}: ")


def test_datasets_in_groups(tmp_path):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["train/emb"] = CLS
        file["train/y"] = np.array([b"cat", b"dog", b"eel"] * 3)
        file["again"] = file["train"]  # a hard link back
        file["train/up"] = file["/"]
    table = list_arrays(str(tmp_path / "f.h5"), {"cls": "train/emb", "label": "train/y"})
    np.testing.assert_array_equal(read(table), CLS)
    assert table.samples.class_names == ("cat", "dog", "eel")


def test_what_an_hdf5_file_takes_from_others_is_not_read(tmp_path):
    secret = as_hdf5(tmp_path / "secret.h5", {"cls": CLS})
    raw = tmp_path / "raw"
    raw.write_bytes(CLS.tobytes())
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["a"] = h5py.ExternalLink(str(secret), "cls")
        file["b"] = h5py.SoftLink("/c")
        file.create_dataset("c", (9, 4), np.float32, external=[(str(raw), 0, CLS.nbytes)])
        layout = h5py.VirtualLayout((9, 4), np.float32)
        layout[:] = h5py.VirtualSource(str(secret), "cls", (9, 4))
        file.create_virtual_dataset("d", layout)
        file["e"] = h5py.Empty("f")
        file.create_dataset("f", (10**12, 4), np.float32, chunks=(1000, 4))  # nothing but its fill value
        file.create_dataset("g", (10**12, 4), np.float32, chunks=(1000, 4))[:1000] = 1  # or hardly more
    for name in "abcdefg":
        assert f"columns.cls: '{name}' is not there" in message(tmp_path / "f.h5", {"cls": name})


def test_types_of_hdf5_that_are_no_features(tmp_path):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["cls"] = np.zeros(3, [("a", "f4"), ("b", "f4")])
        file.create_dataset("lists", (3,), h5py.vlen_dtype(np.float32))[0] = np.zeros(2)
        file["small"] = np.zeros((3, 2), np.float16)
    assert "cls has shape (3,), must have 2 axes" in message(tmp_path / "f.h5")
    assert "cls has shape (3,), must have 2 axes" in message(tmp_path / "f.h5", {"cls": "lists"})
    assert list_arrays(str(tmp_path / "f.h5"), {"cls": "small"}).dtype == "float16"


def test_a_shape_below_zero(tmp_path):
    np.save(tmp_path / "f.npy", CLS)
    array = (tmp_path / "f.npy").read_bytes().replace(b"(9, 4), }", b"(-9, 4), }", 1).replace(b" \n", b"\n", 1)
    (tmp_path / "f.npy").write_bytes(array)
    assert message(tmp_path / "f.npy").endswith("f.npy: cannot be read: its shape is (-9, 4)")


def test_rows_that_a_header_promises_and_no_file_could_hold(tmp_path):
    np.save(tmp_path / "f.npy", CLS)
    array = (tmp_path / "f.npy").read_bytes().replace(b"(9, 4), }         ", b"(9999999999, 4), }", 1)
    (tmp_path / "f.npy").write_bytes(array)
    for name, method in {"f.npz": zipfile.ZIP_STORED, "g.npz": zipfile.ZIP_DEFLATED}.items():
        with zipfile.ZipFile(tmp_path / name, "w", method) as archive:
            archive.writestr("cls.npy", array)
    for path in tmp_path.iterdir():
        assert message(path).endswith(f"{path.name}: cannot be read: it ends before its last row")


@settings(max_examples=60)
@given(st.data())
def test_damaged_files_are_one_line(tmp_path_factory, data):
    """Whatever bytes of a file are changed, it is read, or refused in one line."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    rows = {"cls": CLS[:2], "label": np.array([0, 1])}
    suffix = data.draw(st.sampled_from([*WRITERS, "pth", "safetensors"]))
    path = folder / f"f.{suffix}"
    if suffix == "pth":
        as_torch(path, rows, _use_new_zipfile_serialization=False)
    elif suffix == "safetensors":
        save_file({name: torch.from_numpy(array) for name, array in rows.items()}, path)
    else:
        WRITERS[suffix](path, rows)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.sampled_from([len(whole), len(whole) // 2]))])
    try:
        table = list_arrays(str(path))
        table.columns["cls"].read(0, len(table))
    except InputError as error:
        said = str(error)
    else:
        said = "read"
    assert "\n" not in said


# --------------------------------------------------------------------------------------------- heads of more classes


HEAD = ["zebra", "dog", "apple", "cat", "bus"]


def with_logits(path, **arrays):
    logits = np.arange(45, dtype=np.float32).reshape(9, 5)
    return str(as_npz(path / "f.npz", {"cls": CLS, "logits": logits} | arrays)), logits


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("labels", [np.array(["cat", "dog", "dog"] * 3), np.array([3, 1, 1] * 3)])
def test_of_a_larger_head_the_columns_of_the_classes_are_taken(tmp_path, labels, as_file):
    path, logits = with_logits(tmp_path, label=labels)
    (tmp_path / "head.txt").write_text("\n".join(HEAD))
    table = list_arrays(path, classes=str(tmp_path / "head.txt") if as_file else HEAD)
    assert class_of(table) == ["cat", "dog", "dog"] * 3
    chosen = table.of_classes(table.samples.class_names)
    chosen.check_logits()
    np.testing.assert_array_equal(read(chosen, "logits"), logits[:, [3, 1]])
    assert chosen.samples.notes == (f"{path}: 3 of 5 columns of logits are of no ID class and left out",)
    assert chosen.samples.reader().read(4) == CLS[4].tobytes() + logits[4, [3, 1]].tobytes()
    with pytest.raises(InputError, match=r"no column of logits is 'Bus' \(classes has 'bus', in other case\)"):
        table.of_classes(["cat", "Bus"])


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.arange(1, 10) % 5 + 1, "labels run from 1 to 5 for 5 columns: subtract 1, they count from 0"),
        (np.array([0, 1, 2, 3, 9, 0, 1, 2, 3]), "label of row 4 is 9, the columns are 0 to 4"),
        (np.arange(9) % 3, "with logits, label is the number of a column, and each column has rows: give classes"),
        (np.array(["cat", "dog", "eel"] * 3), "which column is 'cat', 'dog', 'eel'? Give classes"),
    ],
)
def test_labels_that_are_no_columns_are_recognised(tmp_path, labels, said):
    path, _ = with_logits(tmp_path, label=labels)
    with pytest.raises(InputError) as caught:
        list_arrays(path).check_logits()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "labels", "said"),
    [
        (HEAD[:4], [0] * 9, "logits have 5 columns, classes names 4: name each, in their order"),
        ([*HEAD[:4], " dog"], [0] * 9, "classes names 'dog' twice"),
        (HEAD, [1, 2, 3, 4, 5, 1, 2, 3, 4], "labels run from 1 to 5 for 5 classes: subtract 1, they count from 0"),
        (HEAD, [0, 7, 0, 0, 0, 0, 0, 0, 0], "label of row 1 is 7, classes names 0 to 4"),
    ],
)
def test_names_of_a_head_that_do_not_fit_are_refused(tmp_path, classes, labels, said):
    path, _ = with_logits(tmp_path, label=np.array(labels))
    assert said in message(path, None, classes)
