"""Features from files: whatever the file, the same rows come out; what cannot be used is said in one line."""

import os
import tracemalloc
import warnings
import zipfile

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from stages.errors import InputError
from stages.extract import import_set
from stages.inputs import arrays as module
from stages.inputs.arrays import ARRAY_SUFFIXES, KEYS, ArrayTable, list_arrays

N, D = 23, 6


@pytest.fixture(scope="module")
def rows():
    """An array for each key, as somebody else's network may have given them."""
    rng = np.random.default_rng(0)
    shapes = {"cls": (D,), "tap_cls": (4,), "registers": (2, 4), "patches": (2, 3, 4), "logits": (3,)}
    arrays = {name: rng.standard_normal((N, *shape), np.float32) for name, shape in shapes.items()}
    return arrays | {"label": np.arange(N) % 3, "id": np.array([f"bild {i:02d} é" for i in range(N)])}


def as_npz(path, rows, compressed=False):
    (np.savez_compressed if compressed else np.savez)(path, **rows)
    return path


def as_npy(path, rows, order="C"):
    for name, array in rows.items():
        np.save(path if name == "cls" else path.with_suffix(f".{name}.npy"), np.asarray(array, order=order))
    return path


def as_parquet(path, rows, fixed=True):
    def column(array):
        if array.ndim == 1:
            return pa.array(array.tolist())
        flat = pa.array(array.ravel())
        for size in reversed(array.shape[1:]):
            offsets = pa.array(np.arange(0, len(flat) + 1, size), pa.int32())
            flat = pa.FixedSizeListArray.from_arrays(flat, size) if fixed else pa.ListArray.from_arrays(offsets, flat)
        return flat

    pq.write_table(pa.table({name: column(array) for name, array in rows.items()}), path, row_group_size=7)
    return path


def as_hdf5(path, rows, **options):
    with h5py.File(path, "w") as file:
        for name, array in rows.items():
            texts = {"dtype": h5py.string_dtype()} if array.dtype.kind == "U" else {}
            file.create_dataset(name, data=array.tolist() if texts else array, **texts, **options)
    return path


def as_torch(path, rows, **options):
    def stored(array):
        return array.tolist() if array.dtype.kind == "U" else torch.from_numpy(array)

    torch.save({name: stored(array) for name, array in rows.items()}, path, **options)
    return path


FORMATS = {
    "npz": ("f.npz", as_npz, {}),
    "compressed": ("f.npz", as_npz, {"compressed": True}),
    "npy": ("f.npy", as_npy, {}),
    "by columns": ("f.npy", as_npy, {"order": "F"}),
    "parquet": ("f.parquet", as_parquet, {}),
    "parquet, lists": ("f.parquet", as_parquet, {"fixed": False}),
    "hdf5": ("f.h5", as_hdf5, {}),
    "hdf5, in chunks": ("f.hdf5", as_hdf5, {"chunks": True, "compression": "gzip"}),
    "torch": ("f.pt", as_torch, {}),
    "torch, before 1.6": ("f.pth", as_torch, {"_use_new_zipfile_serialization": False}),
}


@pytest.fixture(scope="module", params=FORMATS)
def table(request, rows, tmp_path_factory):
    name, write, options = FORMATS[request.param]
    return list_arrays(str(write(tmp_path_factory.mktemp("file") / name, rows, **options)))


def imported(table, root, dtype="float32"):
    return import_set("mine", table, table.spec("net@224", dtype), root)


def test_every_kind_of_file_becomes_the_same_sealed_cache(table, rows, tmp_path):
    cache = imported(table, tmp_path)
    for name in ("cls", "tap_cls", "registers", "logits"):
        np.testing.assert_array_equal(cache.read(name), rows[name])
    np.testing.assert_array_equal(cache.read("patches"), rows["patches"].reshape(N, 6, 4))
    assert cache.ids.tolist() == rows["id"].tolist()
    assert [cache.class_names[label] for label in cache.labels] == [str(label) for label in rows["label"]]
    assert cache.verify() == []
    assert cache.spec.grid == (2, 3)
    assert (cache.spec.origin, cache.spec.n_logits, cache.spec.backbone) == ("net@224", 3, "")
    assert len({row.tobytes() for row in cache.image_hashes}) == N


def test_safetensors_are_read_in_place(rows, tmp_path):
    arrays = {name: array for name, array in rows.items() if name != "id"}
    save_file(arrays, tmp_path / "f.safetensors", {"made": "by hand"})
    cache = imported(list_arrays(str(tmp_path / "f.safetensors")), tmp_path)
    for name in ("cls", "tap_cls", "registers", "logits"):
        np.testing.assert_array_equal(cache.read(name), rows[name])


def test_the_kind_of_file_is_not_part_of_the_identity(rows, tmp_path):
    identities = set()
    for number, (name, write, options) in enumerate(FORMATS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        identities.add(imported(list_arrays(str(write(folder / name, rows, **options))), folder).identity)
    assert len(identities) == 1


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, N), st.integers(0, N)).map(sorted), min_size=1, max_size=6))
def test_rows_may_be_read_in_any_order(table, rows, slices):
    for start, stop in slices:
        for name, column in table.columns.items():
            np.testing.assert_array_equal(column.read(start, stop), rows[name][start:stop])


def test_rows_are_found_again_by_their_bytes(table, rows):
    reader, first = table.samples.reader(), table.samples.reader(5, 9)
    assert [reader.read(index) for index in (7, 5, 22, 0)] == [
        b"".join(rows[name][index].tobytes() for name in ("cls", "tap_cls", "registers", "patches", "logits"))
        for index in (7, 5, 22, 0)
    ]
    assert first.read(2) == reader.read(7)
    assert len(first) == 4


def test_only_cls_is_needed(tmp_path):
    path = tmp_path / "f.npz"
    np.savez(path, cls=np.ones((3, 2), ">f8"))
    table = list_arrays(str(path))
    cache = imported(table, tmp_path)
    assert cache.read("cls").tolist() == [[1, 1]] * 3
    assert (cache.ids.tolist(), cache.labels.tolist(), cache.class_names) == (["0", "1", "2"], [-1, -1, -1], ())
    assert list(cache.spec.datasets()) == ["cls"]
    assert table.dtype == "float32"


@pytest.mark.parametrize(("shape", "tokens"), [((6, 3, 4), 1), ((6, 3, 2, 4), 2)])
def test_taps_are_counted_from_one(shape, tokens, tmp_path):
    rng = np.random.default_rng(0)
    taps = rng.normal(size=shape).astype(np.float32)
    np.savez(tmp_path / "mine.npz", cls=rng.normal(size=(6, 5)), taps=taps)
    spec = list_arrays(str(tmp_path / "mine.npz")).spec("mine", "float32")
    assert (spec.taps, spec.tap_widths, spec.tap_tokens) == ((1, 2, 3), (4, 4, 4), tokens)
    np.testing.assert_array_equal(
        imported(list_arrays(str(tmp_path / "mine.npz")), tmp_path / "root").read("taps"), taps
    )
    np.savez(tmp_path / "wrong.npz", cls=rng.normal(size=(6, 5)), taps=np.ones((6, 3, 3, 4)))
    with pytest.raises(InputError, match=r"taps has shape \(6, 3, 3, 4\), must be \[n, L, D\] or"):
        list_arrays(str(tmp_path / "wrong.npz"))


def test_half_precision_stays_what_it_is(rows, tmp_path):
    half = {name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in rows.items()}
    table = list_arrays(str(as_npz(tmp_path / "f.npz", half)))
    cache = imported(table, tmp_path, table.dtype)
    assert (table.dtype, cache.read("cls").dtype, cache.read("logits").dtype) == ("float16", np.float16, np.float32)
    np.testing.assert_array_equal(cache.read("patches"), half["patches"].reshape(N, 6, 4))


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (np.array([10, 9, -1]), ("9", "10"), [1, 0, -1]),
        (np.array(["dog", "", "cat"]), ("cat", "dog"), [1, -1, 0]),
        (np.array([b"dog", b"-1", b"cat"]), ("cat", "dog"), [1, -1, 0]),
    ],
)
def test_labels_are_numbers_or_names(labels, names, numbers, tmp_path):
    path = tmp_path / "f.npz"
    np.savez(path, cls=np.eye(3, dtype=np.float32), label=labels)
    samples = list_arrays(str(path)).samples
    assert (samples.class_names, samples.labels.tolist()) == (names, numbers)


def test_a_file_that_was_changed_becomes_the_next_version(rows, tmp_path):
    path = as_npz(tmp_path / "f.npz", rows)
    first = imported(list_arrays(str(path)), tmp_path)
    path.touch()
    assert imported(list_arrays(str(path)), tmp_path).path == first.path
    as_npz(path, rows | {"cls": rows["cls"] + np.eye(N, D, dtype=np.float32)})
    second = imported(list_arrays(str(path)), tmp_path)
    assert second.path.name == f"{first.path.name}-2"
    np.testing.assert_array_equal(second.read("cls") - rows["cls"] > 0.5, np.eye(N, D) > 0)
    as_npz(path, rows)
    assert imported(list_arrays(str(path)), tmp_path).path == first.path


def test_other_labels_are_another_version(rows, tmp_path):
    path = as_npz(tmp_path / "f.npz", rows)
    first = imported(list_arrays(str(path)), tmp_path)
    as_npz(path, rows | {"label": (rows["label"] + 1) % 3})
    assert imported(list_arrays(str(path)), tmp_path).path != first.path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls": None}, "'cls' is missing: the features of n rows, [n, D] (it has tap_cls, "),
        ({"cls": np.ones(N)}, f"cls has shape ({N},), must have 2 axes, none of length 0"),
        ({"cls": np.ones((N, 0))}, f"cls has shape ({N}, 0), must have 2 axes, none of length 0"),
        ({"cls": np.ones((N, D), int)}, "cls is int64, must be float16, float32 or float64"),
        ({"patches": np.ones((N, 2))}, f"patches has shape ({N}, 2), must have 3 or 4 axes"),
        ({"logits": np.ones((N - 1, 3))}, f"logits has {N - 1} rows, cls has {N}"),
        ({"label": np.arange(N - 1)}, f"label has shape ({N - 1},), must be ({N},) as cls has {N} rows"),
        ({"label": np.linspace(0, 1, N)}, "label of row 1 is 0.045"),
        ({"label": np.arange(N) > 2}, "label is bool, must be whole numbers or text"),
        ({"label": np.arange(N) - 5}, "label of row 0 is -5, must be a name, a class number from 0, or -1: unknown"),
        ({"label": np.array([b"\xff"] * N)}, "label of row 0 is not text in UTF-8"),
        ({"id": np.array(["a", "b", "a", *"x" * (N - 3)])}, "id 'a' stands in rows 0 and 2: name every row once"),
        ({"id": np.array(["a", "", *"x" * (N - 2)])}, "id of row 1 is empty"),
        ({"id": np.ones(N)}, "id is float64, must be text"),
        ({"tap_cls": None}, "has registers, but no tap_cls: give the class token that stands before them"),
        ({"tap_cls": np.ones((N, 5))}, f"tokens of one network have one length: tap_cls ({N}, 5), registers "),
        (
            {"label": None, "labels": np.arange(N)},
            "'labels' is not a known key; did you mean 'label'? Say so by columns ",
        ),
        ({"label": np.arange(N).astype("V2")}, "label is |V2, must be whole numbers or text"),
        ({"cls": np.ones((N, D), "V2")}, "cls is |V2, must be float16, float32 or float64: numpy knows no bfloat16"),
    ],
)
@pytest.mark.parametrize("kind", ["npz", "compressed"])
def test_refused(change, message, kind, rows, tmp_path):
    name, write, options = FORMATS[kind]
    path = write(tmp_path / name, {k: v for k, v in (rows | change).items() if v is not None}, **options)
    with pytest.raises(InputError) as error:
        list_arrays(str(path))
    assert str(error.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_what_is_no_number_is_refused_and_named(value, tmp_path):
    path, cls = tmp_path / "f.npz", np.ones((9, 4))
    cls[5, 2] = value
    np.savez(path, cls=cls, id=np.array(list("abcdefghi")))
    with pytest.raises(InputError, match=rf"f\.npz: cls of row 5 \('f'\) holds {value:g}".replace("+", r"\+")):
        imported(list_arrays(str(path)), tmp_path)


def test_pickled_objects_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("code of the file was run",)

    array = np.array([Bomb(), Bomb()])
    np.savez(tmp_path / "f.npz", cls=array)
    np.save(tmp_path / "f.npy", array, allow_pickle=True)
    torch.save({"cls": torch.ones(2, 2), "more": Bomb()}, tmp_path / "f.pt")
    torch.save({"cls": np.ones((2, 2))}, tmp_path / "g.pt")
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match="pickled"):
            list_arrays(str(path))


def test_files_that_are_none(rows, tmp_path):
    for name in ("f.npz", "f.npy", "f.parquet", "f.h5", "f.pt", "f.safetensors"):
        (tmp_path / name).write_bytes(b"PK\3\4 no archive" * 9)
        with pytest.raises(InputError, match=rf"{name}: (cannot be read: |holds pickled)"):
            list_arrays(str(tmp_path / name))
    with pytest.raises(InputError, match=r"no\.npz'"):
        list_arrays(str(tmp_path / "no.npz"))
    (tmp_path / "f.txt").touch()
    with pytest.raises(InputError, match=r"f\.txt: .* \.npz, \.npy, "):
        list_arrays(str(tmp_path / "f.txt"))


@pytest.mark.parametrize("kind", ["npy", "compressed"])
def test_a_file_that_was_cut_short(kind, rows, tmp_path):
    name, write, options = FORMATS[kind]
    path = write(tmp_path / name, {"cls": np.random.default_rng(0).random((N, 5000))}, **options)
    table = list_arrays(str(path))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"cannot be read: "):
        imported(table, tmp_path)


def test_lists_of_different_lengths_in_parquet(tmp_path):
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"cls": pa.array([[1.0, 2.0], [3.0, 4.0], [5.0]])}), path)
    with pytest.raises(InputError, match=r"f\.parquet: cls of row 2 .* 2 values"):
        imported(list_arrays(str(path)), tmp_path)
    pq.write_table(pa.table({"cls": pa.array([[1.0, 2.0], None])}), path)
    with pytest.raises(InputError, match=r"f\.parquet: cls of row 1 .* 2 values"):
        imported(list_arrays(str(path)), tmp_path)
    pq.write_table(pa.table({"cls": pa.array([[1.0, 2.0], [1.0, None]])}), path)
    with pytest.raises(InputError, match=r"f\.parquet: cls .* rows 0 to 1"):
        imported(list_arrays(str(path)), tmp_path)
    pq.write_table(pa.table({"cls": pa.array([["a"]])}), path)
    with pytest.raises(InputError, match=r"f\.parquet: cls is string, .* float16, float32 or float64"):
        list_arrays(str(path))


def test_labels_of_a_parquet_file_may_be_coded_or_missing(tmp_path):
    path = tmp_path / "f.parquet"
    labels = pa.array(["b", None, "a"]).dictionary_encode()
    pq.write_table(pa.table({"cls": pa.array([[1.0]] * 3), "label": labels, "id": pa.array([5, 6, 7])}), path)
    samples = list_arrays(str(path)).samples
    assert (samples.class_names, samples.labels.tolist(), samples.ids) == (("a", "b"), [1, -1, 0], ("5", "6", "7"))


def test_a_zip_with_a_key_twice(tmp_path, rows):
    path = as_npz(tmp_path / "f.npz", {"cls": rows["cls"]})
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("cls.npy", b"x")
    with pytest.raises(InputError, match=r"f\.npz: a key stands in it twice"):
        list_arrays(str(path))


@pytest.mark.parametrize("kind", ["npz", "compressed", "parquet", "hdf5, in chunks"])
def test_memory_does_not_grow_with_the_rows(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.inputs.arrays.columns.BLOCK_BYTES", 1 << 17)
    name, write, options = FORMATS[kind]
    peaks = []
    for n in (150, 1_500):
        folder = tmp_path / str(n)
        folder.mkdir()
        cls = np.random.default_rng(0).random((n, 768), np.float32)
        path = str(write(folder / name, {"cls": cls}, **options))
        del cls
        pool = pa.default_memory_pool()
        before = pool.bytes_allocated()
        tracemalloc.start()
        list(list_arrays(path).columns["cls"].read(start, start + 50)[0, 0] for start in range(0, n, 50))
        peaks.append(tracemalloc.get_traced_memory()[1] + pool.bytes_allocated() - before)
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**20, peaks  # the file is 4 MiB larger


def test_all_keys_are_documented():
    assert all(f"``{key}``" in module.__doc__ for key in KEYS)


def test_what_was_begun_goes_on(tmp_path, monkeypatch):
    path, read = tmp_path / "f.npz", ArrayTable.read
    cls = np.random.default_rng(0).random((9_000, 2), np.float32)  # three shards
    np.savez(path, cls=cls)
    asked = []

    def stopped(self, start, stop, spec):
        asked.append(start)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return read(self, start, stop, spec)

    monkeypatch.setattr(ArrayTable, "read", stopped)
    with pytest.raises(KeyboardInterrupt):
        imported(list_arrays(str(path)), tmp_path)
    cache = imported(list_arrays(str(path)), tmp_path)
    assert asked == [0, 4096, 4096, 8192]
    np.testing.assert_array_equal(cache.read("cls"), cls)
    assert cache.verify() == []


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, suffix):
    os.mkfifo(tmp_path / f"rows{suffix}")
    with pytest.raises(InputError, match=f"rows{suffix}: cannot be read: .*not a regular file"):
        list_arrays(str(tmp_path / f"rows{suffix}"))
