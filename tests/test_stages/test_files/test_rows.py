"""Files between stages: they come back as they were, arrive whole or not at all, and damage is no exception."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import CacheError
from stages.files.documents import (
    Column,
    described_rows,
    map_described,
    read_described,
    read_document,
    read_json,
    read_tensors,
    read_whole,
    write_described,
    write_document,
    write_json,
    write_tensors,
    write_text,
)

TENSORS = {
    "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "expert": np.array([-1, 2], dtype=np.int64),
    "half": np.array([[0.5]], dtype=np.float16),
    "none": np.zeros((0, 5), dtype=np.float32),
    "bias": np.array([0.0, -np.inf], dtype=np.float32),
}


def same(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name]) for name in ours
    )


@given(
    value=st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    )
)
def test_json_comes_back(value, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "it.json"
    write_json(path, value)
    assert read_json(path) == value


def test_json_is_made_to_be_read(tmp_path):
    write_json(tmp_path / "new" / "folder" / "it.json", {"class": "été 犬"})
    assert (tmp_path / "new" / "folder" / "it.json").read_text(encoding="utf-8") == '{\n  "class": "été 犬"\n}\n'


def test_tensors_come_back_with_their_types(tmp_path):
    path = tmp_path / "new" / "folder" / "it.safetensors"
    write_tensors(path, TENSORS)
    assert same(read_tensors(path), TENSORS)


def test_slices_and_transposes_are_written_as_they_look(tmp_path):
    weight = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = {"columns": weight[:, ::2], "transposed": weight.T, "fortran": np.asfortranarray(weight)}
    write_tensors(tmp_path / "it.safetensors", views)
    assert same(read_tensors(tmp_path / "it.safetensors"), views)


def test_same_tensors_same_bytes(tmp_path):
    write_tensors(tmp_path / "one.safetensors", TENSORS)
    write_tensors(tmp_path / "two.safetensors", dict(reversed(TENSORS.items())))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'"text"', b"null", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_no_json_object_does_not_count(tmp_path, content):
    (tmp_path / "it.json").write_bytes(content)
    assert read_json(tmp_path / "it.json") is None


def test_every_truncation_of_tensors_is_seen(tmp_path):
    path = tmp_path / "it.safetensors"
    write_tensors(path, TENSORS)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert read_tensors(path) is None
    path.write_bytes(content + b"\0")
    assert read_tensors(path) is None


@given(start=st.binary(max_size=40))
def test_arbitrary_bytes_are_no_tensors(start, tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "it.safetensors"
    path.write_bytes(start + b"\xff")
    assert read_tensors(path) is None


def test_hostile_header_is_refused(tmp_path):
    """A type that numpy lacks, data far beyond the file's end, a header larger than the file."""
    for header in (
        {"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    ):
        encoded = json.dumps(header).encode()
        (tmp_path / "it.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(4))
        assert read_tensors(tmp_path / "it.safetensors") is None
    (tmp_path / "it.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    assert read_tensors(tmp_path / "it.safetensors") is None


def test_no_file_and_a_folder_in_its_place(tmp_path):
    for name in ("it", "it.json"):
        assert read_json(tmp_path / name) is None
        assert read_tensors(tmp_path / name) is None
        (tmp_path / name).mkdir()
        assert read_json(tmp_path / name) is None
        assert read_tensors(tmp_path / name) is None


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    """Killed before the last step, the rename, a file is as it was."""
    write_json(tmp_path / "it.json", {"epoch": 1})
    write_tensors(tmp_path / "it.safetensors", TENSORS)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "it.json", {"epoch": 2})
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "it.safetensors", {"weight": np.zeros(1000)})
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "new.txt", "text")
    assert read_json(tmp_path / "it.json") == {"epoch": 1}
    assert same(read_tensors(tmp_path / "it.safetensors"), TENSORS)
    assert not (tmp_path / "new.txt").exists()


# ------------------------------------------------------------------------------------------- arrays, row by row

REAL, INDEX = np.dtype(np.float32), np.dtype(np.int64)
COLUMNS = {"wide": Column(REAL, (3, 2)), "number": Column(REAL), "expert": Column(INDEX), "none": Column(REAL, (0,))}


def rows_of(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (9 * rng.random((n, *column.shape))).astype(column.dtype) for name, column in COLUMNS.items()}


def write_in_blocks(path, arrays, block, about) -> None:
    n = len(arrays["number"])
    with described_rows(path, COLUMNS, n, about) as writer:
        for start in range(0, n, block):
            writer.append({name: array[start : start + block] for name, array in arrays.items()})


@given(n=st.integers(0, 40), block=st.integers(1, 50))
def test_rows_by_blocks_are_the_file_of_arrays_at_once(n, block, tmp_path_factory):
    folder, arrays = tmp_path_factory.mktemp("rows"), rows_of(n)
    write_described(folder / "whole" / "it.safetensors", arrays, {"of": "a"})
    write_in_blocks(folder / "rows" / "it.safetensors", arrays, block, {"of": "a"})
    for name in ("it.safetensors", "it.json"):
        assert (folder / "rows" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    mapped = map_described(folder / "rows" / "it.safetensors", {"of": "a"})
    assert same(mapped, arrays)
    assert not any(array.flags.writeable for array in mapped.values())


def test_rows_that_are_not_all_there_leave_the_old_pair(tmp_path, monkeypatch):
    path = tmp_path / "it.safetensors"
    write_in_blocks(path, rows_of(9), 4, {"of": "old"})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match="4 rows were written, not 9"), described_rows(path, COLUMNS, 9, {}) as writer:
        writer.append(rows_of(4))
    with pytest.raises(ValueError, match="number have shape"), described_rows(path, COLUMNS, 9, {}) as writer:
        writer.append(rows_of(9) | {"number": np.zeros((9, 2))})
    with pytest.raises(KeyboardInterrupt), described_rows(path, COLUMNS, 9, {}):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CacheError, match="No space left"):
        write_in_blocks(path, rows_of(9, seed=1), 4, {"of": "new"})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_killed_while_rows_are_written_the_old_pair_stands_and_nothing_is_left_in_the_end(tmp_path):
    path = tmp_path / "it.safetensors"
    write_in_blocks(path, rows_of(9), 4, {"of": "old"})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    command = [sys.executable, "-m", "tests.test_stages.test_files.test_artifacts", str(path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE) as child:
        child.stdout.readline()  # it has written some
        half = [file for file in tmp_path.iterdir() if file.name not in before]
        write_in_blocks(path, rows_of(9), 4, {"of": "old"})  # beside it: what it writes is its own
        assert [file for file in tmp_path.iterdir() if file.name not in before] == half
        child.send_signal(signal.SIGKILL)
    assert len(half) == 1
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file not in half} == before
    write_in_blocks(path, rows_of(9, seed=1), 4, {"of": "new"})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["it.json", "it.safetensors"]
    assert same(read_tensors(path), rows_of(9, seed=1))


def test_killed_between_the_arrays_and_what_they_are(tmp_path, monkeypatch):
    path = tmp_path / "it.safetensors"
    write_in_blocks(path, rows_of(9), 4, {"of": "old"})
    monkeypatch.setattr(json, "dumps", lambda value, **options: 1 / 0 if options.get("indent") else _dumps(value))
    with pytest.raises(ZeroDivisionError):
        write_in_blocks(path, rows_of(9, seed=1), 4, {"of": "new"})
    assert same(read_tensors(path), rows_of(9, seed=1))
    assert read_document(path.with_suffix(".json")) is None  # neither of them


_dumps = json.dumps


def test_what_cannot_be_mapped_does_not_count(tmp_path):
    path = tmp_path / "it.safetensors"
    assert map_described(path, {}) is None
    write_described(path, TENSORS, {})
    assert map_described(path, {}) is None  # it holds halves
    write_described(path, rows_of(3), {"of": "a"})
    assert map_described(path, {"of": "b"}) is None
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert map_described(path, {"of": "a"}) is None


# ---------------------------------------------------------------------------------------------- a byte that changed


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The bytes of arrays and of the document beside them."""
    path = tmp_path_factory.mktemp("pair") / "it.safetensors"
    write_described(path, rows_of(5), {"of": "été", "settings": {"lr": 0.001, "groups": {"b": 0, "a": 1}}})
    return path.read_bytes(), path.with_suffix(".json").read_bytes()


@given(which=st.integers(0, 1), at=st.integers(0, 10**6), mask=st.integers(1, 255))
def test_every_byte_of_a_pair_counts(which, at, mask, pair, tmp_path_factory):
    """With size and time put back, too: neither the arrays nor what is said of them are believed any more."""
    path = tmp_path_factory.mktemp("bytes") / "it.safetensors"
    for file, content in zip((path, path.with_suffix(".json")), pair, strict=True):
        file.write_bytes(content)
    assert read_document(path.with_suffix(".json"))["settings"]["groups"] == {"b": 0, "a": 1}
    assert read_described(path) is not None
    assert read_whole(path.with_suffix(".json")) is not None
    assert map_described(path, {"of": "été"}) is not None
    file = (path, path.with_suffix(".json"))[which]
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[at % len(content)] ^= mask
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read_described(path) is None
    assert read_whole(path.with_suffix(".json")) is None
    assert map_described(path, {"of": "été"}) is None


def test_rows_are_read_again_only_after_they_may_have_changed(tmp_path, monkeypatch):
    path = tmp_path / "it.safetensors"
    write_described(path, rows_of(5), {})
    later = time.time_ns() + 10**9
    os.utime(path.with_suffix(".json"), ns=(later, later))
    monkeypatch.setattr("stages.files.documents.file_sha256", lambda path: pytest.fail(f"{path} was read"))
    assert map_described(path, {}) is not None
    monkeypatch.undo()
    path.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(path)
    os.utime(path.with_suffix(".json"), ns=(10**9, 10**9))  # as of a copy
    assert map_described(path, {}) is not None
    assert path.with_suffix(".json").stat().st_mtime_ns > 10**9  # they were, and need not be the next time


def test_a_document_is_made_to_be_read(tmp_path):
    write_document(tmp_path / "new" / "it.json", {"class": "été 犬", "number": float("-inf")})
    digest, *rest = (tmp_path / "new" / "it.json").read_text(encoding="utf-8").splitlines()
    assert digest.startswith('{"digest": "')
    assert rest == ['  "class": "été 犬",', '  "number": -Infinity', "}"]
    assert read_document(tmp_path / "new" / "it.json") == {"class": "été 犬", "number": float("-inf")}
    write_json(tmp_path / "plain.json", {"class": "été 犬"})
    assert read_document(tmp_path / "plain.json") is None  # nothing says that it is whole


if __name__ == "__main__":
    with described_rows(Path(sys.argv[1]), COLUMNS, 9, {"of": "killed"}) as unfinished:
        unfinished.append(rows_of(4))
        print("some", flush=True)
        time.sleep(60)
