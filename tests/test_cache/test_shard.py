"""One shard: what any HDF5 tool sees, the same bytes every time, and nothing that is not a number."""

import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import CacheDamagedError, CacheError, CacheInvalidError, file_sha256
from cache.shard import ShardReader, shard_layout, write_shard
from tests.test_cache.toy import make_spec

ROOT = Path(__file__).parents[2]
SPECS = st.builds(
    lambda patches, taps, **fields: make_spec(patches=patches[0], grid=patches[1], **taps, **fields),
    patches=st.sampled_from([("none", (0, 0)), ("full", (1, 1)), ("full", (3, 2)), ("pool:2", (2, 2))]),
    taps=st.sampled_from([{}, *({"taps": (2, 5), "tap_widths": (4, 3), "tap_tokens": n} for n in (1, 2))]),
    dtype=st.sampled_from(["float16", "float32"]),
    cls_dim=st.integers(1, 9),
    tap_dim=st.integers(1, 9),
    n_registers=st.integers(0, 3),
)


def shard_arguments(spec, n, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal((n, *shape), np.float32) for name, (shape, _) in spec.datasets().items()}
    hashes = rng.integers(0, 256, (n, 32)).astype(np.uint8)
    return arrays, np.arange(n, dtype=np.int32) - 1, [f"類/{'x' * (i % 5)}{i}.png" for i in range(n)], hashes


@settings(max_examples=40, deadline=None)
@given(spec=SPECS, n=st.integers(0, 7))
def test_what_is_written_is_what_h5py_and_the_memory_map_read(tmp_path_factory, spec, n):
    path = tmp_path_factory.mktemp("shard") / "shard-00000.h5"
    arrays, labels, ids, hashes = shard_arguments(spec, n)
    written = write_shard(path, spec, arrays, labels, ids, hashes)
    assert (written.rows, written.nbytes, written.sha256) == (n, path.stat().st_size, file_sha256(path))
    expected = {name: array.astype(spec.dtype) for name, array in arrays.items()}
    expected |= {"label": labels, "image_hash": hashes}
    reader = ShardReader(path)
    with h5py.File(path) as file:
        assert set(file) == {*expected, "id"}
        assert file["id"].asstr()[:].tolist() == ids
        for name, array in expected.items():
            assert file[name].chunks is None
            assert file[name].compression is None
            for read in (file[name][:], reader.array(name)):
                assert read.dtype == array.dtype
                np.testing.assert_array_equal(read, array)


def test_reader_gives_read_only_memory_maps_at_cache_line_offsets(tmp_path):
    path = tmp_path / "shard.h5"
    write_shard(path, make_spec(), *shard_arguments(make_spec(), 5))
    array = ShardReader(path).array("patches")
    assert "shard.h5" in Path("/proc/self/maps").read_text()
    assert not array.flags.writeable
    assert array.ctypes.data % 64 == 0


def test_reader_can_be_pickled_after_use(tmp_path):
    path = tmp_path / "shard.h5"
    arguments = shard_arguments(make_spec(), 5)
    write_shard(path, make_spec(), *arguments)
    reader = ShardReader(path)
    reader.array("cls")
    again = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(again.array("cls"), arguments[0]["cls"].astype(np.float16))


def test_bytes_depend_on_the_arguments_alone(tmp_path):
    """Another process, later, with its fresh memory full of rubbish, writes the same file."""
    write = (
        "import sys; from pathlib import Path; from tests.test_cache.test_shard import *\n"
        "write_shard(Path(sys.argv[1]), make_spec(), *shard_arguments(make_spec(), 7))"
    )
    written = []
    for name, rubbish in (("a", "0"), ("b", "165")):
        environment = {**os.environ, "MALLOC_PERTURB_": rubbish}
        subprocess.run([sys.executable, "-c", write, str(tmp_path / name)], env=environment, cwd=ROOT, check=True)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("patches", np.nan, r"patches of '類/xx2.png': nan is not a feature"),
        ("cls", -np.inf, r"cls of '類/xx2.png': -inf is not a feature"),
        ("registers", 7e4, r'registers of \'類/xx2.png\': 70000 does not fit float16; set cache.dtype = "float32"'),
    ],
)
def test_what_is_no_finite_number_is_refused_by_name(tmp_path, name, value, message):
    arguments = shard_arguments(make_spec(), 5)
    arguments[0][name][2, ..., 1] = value
    with pytest.raises(CacheError, match=message):
        write_shard(tmp_path / "shard.h5", make_spec(), *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_value_is_looked_at_also_where_it_comes_in_the_stored_dtype(tmp_path, dtype, value):
    spec = make_spec(cls_dim=1000, dtype=dtype)
    arrays, *rest = shard_arguments(spec, 1500)  # more than one block
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    for row, column in ((0, 0), (777, 3), (1499, 999)):
        stored = arrays["cls"].copy()
        stored[row, column] = value
        message = rf"cls of '類/{'x' * (row % 5)}{row}.png': {value}"
        message += {
            "float16": ': too large for float16, or no finite number: set cache.dtype = "float32"; if it stays, look',
            "float32": " is not a feature; look at the weights and at this image",
        }[dtype]
        with pytest.raises(CacheError, match=message):
            write_shard(tmp_path / "shard.h5", spec, arrays | {"cls": stored}, *rest)
    for edge in (np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal, 0):
        arrays["cls"][5, 5], arrays["cls"][6, 6] = edge, -edge
        write_shard(tmp_path / "shard.h5", spec, arrays, *rest)


def test_bytes_do_not_depend_on_the_dtype_and_memory_order_given(tmp_path):
    arrays, *rest = shard_arguments(make_spec(), 50)
    half = {name: array.astype(np.float16) for name, array in arrays.items()}
    given = {
        "float32": arrays,
        "float16": half,
        "float64": {name: array.astype(np.float64) for name, array in half.items()},
        "other end first": {name: array.astype(">f2") for name, array in half.items()},
        "columns first": {name: np.asfortranarray(array) for name, array in half.items()},
        "every second": {name: np.repeat(array, 2, axis=0)[::2] for name, array in half.items()},
    }
    assert len({write_shard(tmp_path / "s.h5", make_spec(), some, *rest).sha256 for some in given.values()}) == 1


@pytest.mark.parametrize("given", ["float16", "float32"])
def test_writing_takes_no_second_copy_of_the_arrays(tmp_path, given):
    spec = make_spec(tap_dim=512, grid=(16, 16))
    arrays, *rest = shard_arguments(spec, 64)  # 16 MiB as stored
    arrays = {name: array.astype(given) for name, array in arrays.items()}
    tracemalloc.start()
    try:
        write_shard(tmp_path / "shard.h5", spec, arrays, *rest)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 << 20


def test_the_layout_is_read_from_the_first_page(tmp_path):
    """A reader that opens thousands of shards on a shared disk reads a page of each."""
    path = tmp_path / "shard.h5"
    write_shard(path, make_spec(), *shard_arguments(make_spec(), 500))
    whole, reader = path.read_bytes(), ShardReader(path)
    path.write_bytes(whole[:4096] + bytes(len(whole) - 4096))
    assert reader.array("image_hash").shape == (500, 32)


def test_large_values_fit_float32(tmp_path):
    spec = make_spec(dtype="float32")
    arguments = shard_arguments(spec, 5)
    arguments[0]["cls"][2, 1] = 7e4
    write_shard(tmp_path / "shard.h5", spec, *arguments)
    assert ShardReader(tmp_path / "shard.h5").array("cls")[2, 1] == 7e4


def test_arrays_that_do_not_fit_the_spec_are_refused(tmp_path):
    arrays, *rest = shard_arguments(make_spec(), 5)
    with pytest.raises(CacheInvalidError, match=r"s\.h5: has \['cls'\]"):
        write_shard(tmp_path / "s.h5", make_spec(), {"cls": arrays["cls"]}, *rest)
    with pytest.raises(CacheInvalidError, match=r"cls is \(5, 5\), must be \(5, 6\)"):
        write_shard(tmp_path / "s.h5", make_spec(), arrays | {"cls": arrays["cls"][:, :5]}, *rest)


def test_disk_full_is_a_clear_error_and_leaves_nothing(tmp_path):
    """The file-size limit of the process plays the full disk: real writes fail after some bytes."""
    script = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pathlib import Path; from tests.test_cache.test_shard import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        f"write_shard(Path({str(tmp_path)!r}) / 's.h5', make_spec(), *shard_arguments(make_spec(), 50))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "CacheError" in run.stderr
    assert "s.h5: cannot be written: File too large; what was finished is kept" in run.stderr
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_shards_are_damage(tmp_path):
    text, chunked, addresses = tmp_path / "text.h5", tmp_path / "chunked.h5", tmp_path / "addresses.h5"
    text.write_text("not HDF5")
    with h5py.File(chunked, "w") as file:
        file.create_dataset("cls", data=np.zeros((4, 4)), chunks=(1, 4))
    with h5py.File(addresses, "w") as file:
        file.create_dataset("cls", data=["a", "b"], dtype=h5py.string_dtype())
    for path in (text, chunked, addresses, tmp_path / "missing.h5"):
        with pytest.raises(CacheDamagedError, match="run verify"):
            ShardReader(path).array("cls")


def test_a_truncated_shard_is_damage_and_not_a_crash(tmp_path):
    path = tmp_path / "shard.h5"
    write_shard(path, make_spec(), *shard_arguments(make_spec(), 50))
    reader = ShardReader(path)
    reader._layout = shard_layout(path)  # known from before the file was cut
    os.truncate(path, 4096)
    with pytest.raises(CacheDamagedError, match="'patches'"):
        reader.array("patches")
