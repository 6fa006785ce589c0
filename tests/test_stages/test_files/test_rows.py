"""Arrays written some rows at a time: the bytes of those at once, whole or not there, and every byte counts."""

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
from stages.files.documents import find_damages, read_document
from stages.files.rows import RowFormat, described_rows, map_described
from stages.files.tensors import read_described, read_tensors, write_described
from tests.test_stages.test_files.arrays import TENSORS, same

REAL, INDEX = np.dtype(np.float32), np.dtype(np.int64)
COLUMNS = {
    "wide": RowFormat(REAL, (3, 2)),
    "number": RowFormat(REAL),
    "expert": RowFormat(INDEX),
    "none": RowFormat(REAL, (0,)),
}


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

    with pytest.raises(ValueError, match=r"4 rows .* 9"), described_rows(path, COLUMNS, 9, {}) as writer:
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
    command = [sys.executable, "-m", "tests.test_stages.test_files.test_rows", str(path)]
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
    assert not list(find_damages([path.with_suffix(".json")]))
    assert map_described(path, {"of": "été"}) is not None
    file = (path, path.with_suffix(".json"))[which]
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[at % len(content)] ^= mask
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read_described(path) is None
    assert list(find_damages([path.with_suffix(".json")]))
    assert map_described(path, {"of": "été"}) is None


def test_rows_are_read_again_only_after_they_may_have_changed(tmp_path, monkeypatch):
    path = tmp_path / "it.safetensors"
    write_described(path, rows_of(5), {})
    later = time.time_ns() + 10**9
    os.utime(path.with_suffix(".json"), ns=(later, later))
    monkeypatch.setattr("stages.files.rows.file_sha256", lambda path: pytest.fail(f"{path} was read"))
    assert map_described(path, {}) is not None
    monkeypatch.undo()
    path.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(path)
    os.utime(path.with_suffix(".json"), ns=(10**9, 10**9))  # as of a copy
    assert map_described(path, {}) is not None
    assert path.with_suffix(".json").stat().st_mtime_ns > 10**9  # they were, and need not be the next time


if __name__ == "__main__":
    with described_rows(Path(sys.argv[1]), COLUMNS, 9, {"of": "killed"}) as unfinished:
        unfinished.append(rows_of(4))
        print("some", flush=True)
        time.sleep(60)
