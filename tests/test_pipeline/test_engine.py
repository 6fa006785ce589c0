import operator
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from itertools import count, islice

import pytest
from distributed import LocalCluster

from pipeline.engine import DaskEngine, EngineError, ItemsFailedError, _sees, engine_for
from stages.errors import InputError
from stages.progress import NullProgress


@pytest.mark.dask
def test_every_item_once(workers):
    assert sorted(workers.map(operator.neg, range(20))) == list(range(-19, 1))
    assert list(workers.map(operator.neg, [])) == []


@pytest.mark.dask
def test_error_of_an_item_comes_as_itself(workers):
    with pytest.raises(ZeroDivisionError):
        list(workers.map((1).__truediv__, [1, 0, 2]))
    assert list(workers.map(operator.neg, [1])) == [-1]  # and the engine works on


@pytest.mark.dask
def test_items_are_taken_as_they_are_needed(workers):
    """Ten results of an endless list, and no more than a few items in flight."""
    taken = []
    endless = (taken.append(i) or i for i in count())
    assert len(list(islice(workers.map(operator.neg, endless), 10))) == 10
    assert len(taken) <= 10 + 2 * 2


@pytest.mark.dask
def test_work_is_done_elsewhere(workers):
    processes = set(workers.map(_process_after, [0.05] * 8))
    assert os.getpid() not in processes
    assert len(processes) == 2


def _process_after(pause_s: float) -> int:
    time.sleep(pause_s)
    return os.getpid()


@pytest.mark.dask
def test_what_kills_its_worker_is_listed_and_all_else_is_done(workers):
    """Neighbours of the poisoned item are blamed by Dask as well, as often as it dies; here they are done."""
    found, items = [], [Poison() if number == 3 else number for number in range(12)]
    with pytest.raises(ItemsFailedError, match=r"1 item failed, .*others are done.* poisoned: its worker died"):
        found.extend(workers.map(_die, items))
    assert sorted(found) == [*range(3), *range(4, 12)]


class Poison:
    def __str__(self) -> str:
        return "poisoned"


def _die(item: object) -> object:
    if isinstance(item, Poison):
        os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.dask
def test_worker_that_dies_once_is_replaced(workers, tmp_path):
    assert sorted(workers.map(_die_once, [(i, str(tmp_path / "died")) for i in range(4)])) == [0, 1, 2, 3]


def _die_once(item: tuple[int, str]) -> int:
    number, marker = item
    if number == 2 and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.dask
def test_what_fails_for_a_while_is_tried_again(workers, tmp_path):
    items = [str(tmp_path / str(number)) for number in range(3)]
    assert sorted(workers.map(_fail_twice, items)) == items


def _fail_twice(path: str) -> str:
    with open(path, "a+") as file:
        file.write("x")
        if file.tell() < 3:
            raise OSError(path)
    return path


@pytest.mark.dask
def test_several_that_fail_are_listed(workers):
    found = []
    with pytest.raises(ItemsFailedError, match=r"2 items failed") as caught:
        found.extend(workers.map(_only_even, range(6)))
    assert sorted(found) == [0, 2, 4, 5]
    assert {"1: ZeroDivisionError", "3: ZeroDivisionError"} <= set(
        re.findall(r"\d: ZeroDivisionError", str(caught.value))
    )
    with pytest.raises(EngineError, match=r"more than 16 items failed, the last, \d+, with ZeroDivisionError"):
        deque(workers.map(_only_even, range(1, 1000, 2)), maxlen=0)


def _only_even(number: int) -> int:
    return number // (number + 1 & 1) if number < 4 or number > 5 else number


@pytest.mark.dask
def test_what_is_wrong_for_all_stops_at_once(workers):
    taken = []
    with pytest.raises(InputError, match="wrong for all"):
        list(workers.map(_refuse, (taken.append(i) or i for i in range(100))))
    assert len(taken) <= 8


def _refuse(number: int) -> int:
    raise InputError("wrong for all")


@pytest.mark.dask
def test_cluster_of_somebody_else(tmp_path, monkeypatch):
    said = Said()
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0", silence_logs=50) as cluster:
        with pytest.raises(InputError, match=r"--scheduler tcp://.*workers"):
            DaskEngine(cluster.scheduler_address).start()
        cluster.scale(1)
        cluster.wait_for_workers(1)
        with engine_for(cluster.scheduler_address, 1, [tmp_path / "work"], said) as engine:
            assert sorted(engine.map(operator.neg, range(3))) == [-2, -1, 0]
        assert said.lines == [f"dask: 1 worker; dashboard {cluster.dashboard_link}"]
        assert list((tmp_path / "work").iterdir()) == []  # the probe is gone
        monkeypatch.setattr("pipeline.engine._sees", _sees_nothing)
        with pytest.raises(InputError, match=f"--scheduler tcp://.*: 1 of 1 workers do not see {tmp_path}/work, "):
            DaskEngine(cluster.scheduler_address, shared=[tmp_path / "work"]).start()


def _sees_nothing(path: str, content: str) -> bool:
    return _sees(f"{path}-elsewhere", content)  # another disk is mounted there


class Said(NullProgress):
    def __init__(self) -> None:
        self.lines = []

    def note(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.dask
def test_scheduler_that_goes_away():
    """One line, and soon; what was yielded stays."""
    command = [sys.executable, "-m", "tests.test_pipeline.scheduler"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
        DaskEngine(process.stdout.readline().strip(), answer_s=2) as engine,
    ):
        results = engine.map(operator.neg, range(10**6))
        next(results)
        process.kill()
        with pytest.raises(EngineError, match="the Dask scheduler went away; what is finished is kept"):
            deque(results, maxlen=0)


@pytest.mark.dask
def test_workers_that_do_not_come_again(monkeypatch):
    """As on a machine without memory: Dask gives up a worker that cannot be started."""
    monkeypatch.setattr("pipeline.engine._PATIENCE_S", 0.1)
    with DaskEngine(workers=1) as engine:
        results = engine.map(_process_after, [0.01] * 1000)
        next(results)
        engine._client.cluster.scale(0)
        with pytest.raises(EngineError, match="all local workers are gone"):
            deque(results, maxlen=0)


@pytest.mark.parametrize("address", ["127.0.0.1:no-port", "gopher://127.0.0.1:70", "127.0.0.1:9"])
def test_no_scheduler_there(address):
    with pytest.raises(InputError, match=f"--scheduler {address}"):
        DaskEngine(address, answer_s=1).start()


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.0 400 Bad Request\r\n\r\n"], ids=["silent", "http"])
def test_something_else_answers_there(greeting):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.sendall(greeting)
                connection.recv(1)
                time.sleep(1.2)

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(InputError, match=f"--scheduler {address}"):
            DaskEngine(address, answer_s=1).start()
        thread.join()


def test_dask_only_where_it_is_needed():
    assert engine_for(None, 1) is None
    assert isinstance(engine_for(None, 2), DaskEngine)
    assert isinstance(engine_for("tcp://host:8786", 1), DaskEngine)
