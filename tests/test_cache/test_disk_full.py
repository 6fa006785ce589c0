"""The disk fills up at every stage of a build: a clear error, nothing half-written counts, and the build goes on."""

import contextlib
import os
import resource
import subprocess

import pytest

from cache import CacheError, CacheNotFoundError, FeatureCache
from tests.test_cache.toy import begin, files, fill, fork, wait


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return files(fill(tmp_path_factory.mktemp("whole") / "pets").path)


def test_writes_that_fail_at_byte_n(tmp_path, whole):
    """No file may have more than n bytes: the limit grows until the largest file fits."""
    path, largest = tmp_path / "pets", max(map(len, whole.values()))
    reading, writing = os.pipe()

    def limited(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            fill(path)
        except CacheError as error:
            os.write(writing, str(error).encode())

    messages = set()
    for limit in (0, 1, *range(100, largest, 150)):
        done = files(path) if path.exists() else {}
        assert wait(fork(lambda limit=limit: limited(limit))) == 0
        message = os.read(reading, 1000).decode()
        assert "cannot be written: File too large; what was finished is kept" in message
        messages.add(message.split(": ")[0].rpartition("/")[2])
        with pytest.raises(CacheNotFoundError):
            FeatureCache.open(path)
        left = files(path)
        assert not [name for name in left if name.endswith(".tmp")]
        assert {name: left.get(name) for name in done} == done  # what was finished is kept
    assert {"plan.json", "shard-00000.h5"} <= messages
    assert wait(fork(lambda: limited(largest))) == 0
    assert files(path) == whole


@contextlib.contextmanager
def small_disk(path, size):
    path.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"no small disk can be mounted here: {mount.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_fills_up_and_is_made_larger(tmp_path, whole):
    pages = sum(-(-len(data) // 4096) for data in whole.values())
    messages = []
    for size in range(1, pages + 10):
        with small_disk(tmp_path / str(size), size << 12) as disk:
            path = disk / "pets"
            try:
                fill(path)
            except CacheError as error:
                messages.append(str(error))
                if path.exists():
                    assert not [name for name in files(path) if name.endswith(".tmp")]
                with contextlib.suppress(CacheNotFoundError):
                    assert FeatureCache.open(path).verify() == []  # only the tidying after the sealing had no room
            subprocess.run(["mount", "-o", f"remount,size={1 << 20}", disk], check=True)
            if not (path / "manifest.json").exists():
                with begin(path) as builder:
                    assert len(builder.pending()) == 6 - len(list(path.glob("shard-*.json")))
                fill(path)
            assert files(path) == whole
    assert all("No space left on device; what was finished is kept" in message for message in messages)
    full = {message.partition(": ")[0].rpartition("/")[2] for message in messages}
    assert {"plan.json", "shard-00000.h5", "shard-00005.json", "failures.jsonl", "manifest.json"} <= full
