"""SIGKILL at random moments and before every single change of the disk; then the same bytes come out."""

import itertools
import os
import signal
import time

import numpy as np
import pytest

from cache import CacheNotFoundError, FeatureCache, restore_manifest, unseal
from tests.test_cache.toy import begin, commit, files, fill, fork, make_inputs, make_spec, restore, wait

SHARDS = 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return files(fill(tmp_path_factory.mktemp("whole") / "pets").path)


def build(path, started):
    """Fill and seal; a byte into the pipe for every shard that is begun."""
    with begin(path) as builder:
        for plan in builder.pending():
            os.write(started, b".")
            commit(path, make_spec(), make_inputs(), plan)
        builder.seal()


def test_killed_at_random_moments_gives_the_same_bytes(tmp_path, whole, request):
    """Builds, killed again and again until they are done; a kill costs the work of one shard at most."""
    wanted, rng = request.config.getoption("kills", default=10), np.random.default_rng(0)
    reading, started = os.pipe()
    os.set_blocking(reading, False)
    begun = time.perf_counter()
    assert wait(fork(lambda: build(tmp_path / "timed", started))) == 0
    span = time.perf_counter() - begun
    os.read(reading, 1000)
    kills = 0
    for build_number in itertools.count():
        if kills >= wanted:
            break
        path, done, kills_before = tmp_path / f"pets-{build_number}", 0, kills
        while not (path / "manifest.json").exists():
            worker = fork(lambda path=path: build(path, started))
            time.sleep(rng.uniform(0, span))
            os.kill(worker, signal.SIGKILL)
            killed = wait(worker) == -signal.SIGKILL
            kills += killed
            before = done
            done = sum(name.startswith("shard-") for name in (files(path) if path.exists() else ()))
            if not killed:
                span *= 0.8  # the machine is faster than when we measured, or slower: the kills shall hit the work
            elif done == before:
                span *= 1.2
        assert FeatureCache.open(path).verify() == []
        assert files(path) == whole
        assert len(os.read(reading, 10_000)) <= SHARDS + kills - kills_before
    with begin(tmp_path / "other"):
        pass  # and no lock of a dead process stands in the way


def killed_before(step, work):
    """Whether the work was killed before its `step`-th change of the disk (a file arrives or is removed)."""

    def work_until() -> None:
        steps = itertools.count()
        for name in ("rename", "unlink"):
            real = getattr(os, name)
            setattr(os, name, lambda *a, real=real: os._exit(9) if next(steps) == step else real(*a))
        work()

    status = wait(fork(work_until))
    assert status in (0, 9)
    return status == 9


def test_killed_at_every_step_of_building_and_sealing(tmp_path, whole):
    for step in itertools.count():
        path = tmp_path / str(step)
        killed = killed_before(step, lambda path=path: fill(path))
        sealed = (path / "manifest.json").exists()
        cache = FeatureCache.open(path) if sealed else fill(path)
        assert cache.verify() == []
        assert files(cache.path) == whole
        if not killed:
            break
    assert step >= 2 * SHARDS + 5 + SHARDS  # plan, shards and records, three files, two manifests; tidying


def remake(path, damaged):
    with unseal(path, damaged) as builder:
        for plan in builder.pending():
            commit(path, make_spec(), make_inputs(), plan)
        builder.seal()


def test_killed_at_every_step_of_repair_it_is_sealed_or_unfinished(tmp_path, whole):
    damaged = "shard-00001.h5"
    broken = whole | {damaged: whole[damaged][:-1], "manifest.copy.json": b"{"}
    states = set()
    for step in itertools.count():
        path = restore(tmp_path / "pets", broken)
        killed = killed_before(step, lambda path=path: remake(path, [damaged]))
        try:
            found = FeatureCache.open(path).verify()  # opening tidies up
            states.add("sealed")
            # As it was before, or as it is to be.
            assert [damage.file for damage in found] in (["manifest.copy.json", damaged], [])
            if found:
                remake(path, [damaged])
            restore_manifest(path)  # tidies up, too
        except CacheNotFoundError:
            states.add("unfinished")
            with pytest.raises(CacheNotFoundError, match="not finished"):
                restore_manifest(path)  # a copy that still lies there is no cache
            with begin(path) as builder:
                assert {plan.index for plan in builder.pending()} <= {1}
            fill(path)
        assert files(path) == whole
        if not killed:
            break
    assert states == {"sealed", "unfinished"}


@pytest.mark.parametrize("lost", ["manifest.json", "manifest.copy.json"])
def test_killed_at_every_step_of_restoring_the_manifest(tmp_path, whole, lost):
    for step in itertools.count():
        path = restore(tmp_path / "pets", whole | {lost: b"{"})
        killed = killed_before(step, lambda path=path: restore_manifest(path))
        restore_manifest(path)
        assert files(path) == whole
        if not killed:
            break
    assert step >= 1


def test_killed_at_every_step_of_taking_over(tmp_path, whole):
    """What the other plan had finished is either still there, or made again; never mixed up."""
    inputs = make_inputs(24)
    expected = files(fill(tmp_path / "expected", inputs=inputs).path)
    with begin(tmp_path / "other") as builder:
        for plan in builder.pending():
            commit(tmp_path / "other", make_spec(), make_inputs(), plan)
    other = files(tmp_path / "other")
    for step in itertools.count():
        path = restore(tmp_path / "pets", other)
        killed = killed_before(step, lambda path=path: begin(path, inputs=inputs, adopt=True))
        with begin(path, inputs=inputs, adopt=True) as builder:
            assert [plan.index for plan in builder.pending()] == [5]
        assert files(fill(path, inputs=inputs).path) == expected
        # And where the old inputs came back in between:
        path = restore(tmp_path / "back", other)
        killed_before(step, lambda path=path: begin(path, inputs=inputs, adopt=True))
        begin(path, adopt=True).close()
        assert files(fill(path).path) == whole
        if not killed:
            break
    assert step >= 3
