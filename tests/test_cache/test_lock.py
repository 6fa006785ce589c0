"""Locks: what a living holder, a dead one and a file system without locks each mean to the next process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cache import CacheBusyError, FeatureCache
from cache.lock import Holder, Lock
from tests.test_cache.toy import begin, files, fill, fork, wait

# A C library whose flock answers what a file system without locks does: real processes, real errno.
SHIM = """
#include <errno.h>
#include <stdlib.h>
int flock(int descriptor, int operation) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
"""
NO_LOCKS = {"ENOLCK": 37, "ENOSYS": 38, "EOPNOTSUPP": 95}


@pytest.fixture(scope="session")
def without_locks(tmp_path_factory):
    """Environment of a process whose every flock fails with an errno."""
    if (compiler := shutil.which("cc") or shutil.which("gcc")) is None:
        pytest.skip("needs a C compiler to make a library without flock")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c"], check=True)
    return lambda number: os.environ | {"LD_PRELOAD": str(folder / "shim.so"), "FLOCK_ERRNO": str(number)}


def run(code: str, env: dict[str, str], *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, text=True, capture_output=True, cwd=Path.cwd(), timeout=60)


FILL = """
import sys
from pathlib import Path
from tests.test_cache.toy import begin, fill
path = Path(sys.argv[1])
with begin(path) as builder:
    print(builder.lock_notice)
    assert Path(f"{path}.lock.held").exists()
with begin(path) as builder:  # the lock was given back, and nothing is said a second time
    print(builder.lock_notice)
print(fill(path).verify())
"""


@pytest.mark.parametrize("name", NO_LOCKS)
def test_a_cache_is_filled_where_there_are_no_locks_and_that_is_said_once(tmp_path, without_locks, name):
    done = run(FILL, without_locks(NO_LOCKS[name]), tmp_path / "pets")
    assert done.returncode == 0, done.stderr
    notice, again, damages = done.stdout.splitlines()
    assert "this file system has no locks" in notice
    assert (again, damages) == ("None", "[]")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pets"]
    assert files(tmp_path / "pets") == files(fill(tmp_path / "usual").path)


def test_without_locks_one_process_at_a_time_and_a_killed_one_is_taken_over_at_once(tmp_path, without_locks):
    env = without_locks(NO_LOCKS["ENOLCK"])
    hold = "import sys, time; from pathlib import Path; from cache import Lock; lock = Lock(Path(sys.argv[1])); "
    command = [sys.executable, "-c", hold + "print('held', flush=True); time.sleep(60)", tmp_path / "pets"]
    with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "held\n"
        refused = run(hold, env, tmp_path / "pets")
        assert f"is being filled by process {holder.pid} on {socket.gethostname()} since 20" in refused.stderr
        holder.kill()
    assert (tmp_path / "pets.lock.held").exists()
    assert run(hold + "print('mine'); lock.release()", env, tmp_path / "pets").stdout == "mine\n"
    assert not list(tmp_path.iterdir())


def test_of_many_that_take_over_at_once_one_gets_it(tmp_path, without_locks):
    (tmp_path / "pets.lock.held").write_bytes(_dead().to_bytes())
    take = (
        "import sys, time; from pathlib import Path; from cache import CacheBusyError, Lock\n"
        "try: lock = Lock(Path(sys.argv[1])); print('mine', flush=True); sys.stdin.read()\n"
        "except CacheBusyError: print('busy', flush=True)"
    )
    command, env = [sys.executable, "-c", take, tmp_path / "pets"], without_locks(NO_LOCKS["ENOLCK"])
    racers = [
        subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(6)
    ]
    said = [racer.stdout.readline() for racer in racers]
    for racer in racers:
        racer.communicate()
    assert sorted(said) == ["busy\n"] * 5 + ["mine\n"]


@pytest.mark.parametrize(("untouched_s", "taken"), [(60, False), (3600, True)])
def test_a_holder_elsewhere_is_gone_when_it_stopped_touching_its_file(tmp_path, without_locks, untouched_s, taken):
    held = tmp_path / "pets.lock.held"
    held.write_bytes(Holder("elsewhere", 1, "2026-01-01T00:00:00+00:00", "pid:[1]", "0").to_bytes())
    os.utime(held, (time.time() - untouched_s,) * 2)
    code = "import sys; from pathlib import Path; from cache import Lock; Lock(Path(sys.argv[1])); print('mine')"
    done = run(code, without_locks(NO_LOCKS["ENOLCK"]), tmp_path / "pets")
    assert (done.stdout == "mine\n") == taken
    assert taken or "is being filled by process 1 on elsewhere since 2026-01-01" in done.stderr


SUSPENDED = """
import sys
from pathlib import Path
from cache.lock import Holder
from tests.test_cache.toy import begin, commit, make_inputs, make_spec
path = Path(sys.argv[1])
with begin(path) as builder:
    for plan in builder.pending():
        commit(path, make_spec(), make_inputs(), plan)
    held = Path(f"{path}.lock.held")  # as it is after a night of sleep, once another machine has taken the cache over
    held.write_bytes(Holder("elsewhere", 1, "2026-01-01T00:00:00+00:00", "pid:[1]", "0").to_bytes())
    try:
        builder.seal()
    finally:
        builder.close()
        assert held.exists()
"""


def test_who_lost_its_lock_seals_nothing_and_leaves_the_others(tmp_path, without_locks):
    done = run(SUSPENDED, without_locks(NO_LOCKS["ENOLCK"]), tmp_path / "pets")
    assert "CacheBusyError: " in done.stderr
    assert "process 1 on elsewhere" in done.stderr
    assert not (tmp_path / "pets" / "manifest.json").exists()


def test_eagain_without_a_living_holder_is_not_told_as_one(tmp_path, without_locks):
    """Some network file systems keep the lock of a dead machine's process, or answer EAGAIN when they are busy."""
    lock = tmp_path / "pets.lock"
    lock.write_bytes(_dead().to_bytes())
    code = "import sys; from pathlib import Path; from cache import Lock; Lock(Path(sys.argv[1]))"
    said = run(code, without_locks(11), tmp_path / "pets").stderr
    assert "which has ended" in said
    assert "is being filled" not in said
    lock.write_bytes(b"")
    assert "a process that has not signed it" in run(code, without_locks(11), tmp_path / "pets").stderr


def test_a_child_that_outlives_its_parent_keeps_the_lock_and_the_message_says_so(tmp_path):
    """A lock belongs to an open file: a forked child has it as well."""

    def parent() -> None:
        Lock(tmp_path / "pets")
        if os.fork() == 0:
            (tmp_path / "child").write_text(str(os.getpid()))
            time.sleep(60)
            os._exit(0)
        while not (tmp_path / "child").exists():
            time.sleep(0.01)
        os._exit(0)  # not by way of release

    wait(fork(parent))
    with pytest.raises(CacheBusyError, match="ended"):
        begin(tmp_path / "pets")
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    begin(tmp_path / "pets").close()


def test_a_holder_says_who_since_when_and_a_reused_number_is_not_it():
    me = Holder.here()
    assert Holder.parse(me.to_bytes()) == me
    assert me.is_dead is False
    assert Holder(me.host, me.process, "2000-01-01T00:00:00+00:00", me.namespace, "0").is_dead is True
    assert Holder("elsewhere", me.process, me.since, me.namespace, "0").is_dead is None
    for odd in (b"", b"process 1 on host", b"[]", b"{}", json.dumps({"host": 1}).encode(), b"\xff"):
        assert Holder.parse(odd) is None


def test_a_sealed_cache_opens_where_there_are_no_locks(tmp_path, without_locks):
    fill(tmp_path / "pets")
    code = "import sys; from cache import FeatureCache; print(FeatureCache.open(sys.argv[1]).read('cls').shape)"
    done = run(code, without_locks(NO_LOCKS["ENOLCK"]), tmp_path / "pets")
    assert done.stdout == f"{FeatureCache.open(tmp_path / 'pets').read('cls').shape}\n", done.stderr


def _dead() -> Holder:
    pid = fork(lambda: None)
    wait(pid)
    return replace(Holder.here(), process=pid, since="2026-01-01T00:00:00+00:00")
