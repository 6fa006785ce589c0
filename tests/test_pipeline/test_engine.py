import operator
import os
import signal
import socket
import threading
import time
from itertools import count, islice

import pytest
from distributed import LocalCluster

from pipeline.engine import DaskEngine, EngineError, engine_for
from stages.errors import InputError


@pytest.fixture(scope="module")
def workers():
    with DaskEngine(workers=2) as engine:
        yield engine


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
def test_worker_that_always_dies():
    with DaskEngine(workers=1) as engine, pytest.raises(EngineError, match="kept"):
        list(engine.map(signal.raise_signal, [signal.SIGKILL]))


@pytest.mark.dask
def test_worker_that_dies_once_is_replaced(tmp_path):
    with DaskEngine(workers=1) as engine:
        assert sorted(engine.map(_die_once, [(i, str(tmp_path / "died")) for i in range(4)])) == [0, 1, 2, 3]


def _die_once(item: tuple[int, str]) -> int:
    number, marker = item
    if number == 2 and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.dask
def test_cluster_of_somebody_else():
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0", silence_logs=50) as cluster:
        with pytest.raises(InputError, match=r"--scheduler tcp://.*workers"):
            DaskEngine(cluster.scheduler_address).__enter__()
        cluster.scale(1)
        cluster.wait_for_workers(1)
        with engine_for(cluster.scheduler_address, 1) as engine:
            assert sorted(engine.map(operator.neg, range(3))) == [-2, -1, 0]


@pytest.mark.parametrize("address", ["127.0.0.1:no-port", "gopher://127.0.0.1:70", "127.0.0.1:9"])
def test_no_scheduler_there(address):
    with pytest.raises(InputError, match=f"--scheduler {address}"):
        DaskEngine(address, answer_s=1).__enter__()


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
            DaskEngine(address, answer_s=1).__enter__()
        thread.join()


def test_dask_only_where_it_is_needed():
    with engine_for(None, 1) as engine:
        assert engine is None
    assert isinstance(engine_for(None, 2), DaskEngine)
    assert isinstance(engine_for("tcp://host:8786", 1), DaskEngine)
