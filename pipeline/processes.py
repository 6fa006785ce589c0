"""Several processes for one command: started by ``torchrun``, or by ``--processes N`` of the command itself.

    torchrun --nproc-per-node 2 -m pipeline train EXPERIMENT.toml
    python -m pipeline train EXPERIMENT.toml --processes 2         # this process is rank 0 and starts the others

All run the same command. Rank 0 alone writes and speaks; where they fail, the first to fail says why in its one line,
and the others end without a word.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from stages.context import Ranks
from stages.errors import InputError, PeerLostError, StageError
from stages.machine import usable_cores

_GRACE_S = 10.0  # in which a process finds out by itself that another has ended


class SaidElsewhereError(Exception):
    """This process ends because of what another has said already.

    Attributes:
        status: with which exit status.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


def started() -> int:
    """How many processes were started to run this command; 1 where it runs alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return started() == 1 or os.environ.get("RANK") == "0"


def ranks() -> Ranks:
    """This process among those that have joined (`together`); one of one where it runs alone."""
    if started() == 1:
        return Ranks()
    from stages.training.distributed import current  # and torch

    return current()


@contextmanager
def together(command: Sequence[str], processes: int | None, status: Callable[[Exception], int]) -> Iterator[None]:
    """Join the other processes for what follows, and start them first where that was asked for.

    Args:
        command: what the others run, the arguments after ``python -m pipeline``.
        processes: how many in all, this one among them; None: as torchrun started them, or this one alone.
        status: exit status of an error.

    Raises:
        InputError: torchrun has started another number.
        SaidElsewhereError: this process fails, and another says why.
    """
    if started() > 1:
        if processes not in (None, started()):
            raise InputError(f"--processes {processes} given, but torchrun has started {started()}: leave it out")
        with _joined(status):
            yield
    elif processes in (None, 1):
        yield
    else:
        with _others(command, processes), _joined(status):
            yield


@contextmanager
def _joined(status: Callable[[Exception], int]) -> Iterator[None]:
    from stages.training.distributed import first_to_fail, init_from_environment, leave

    init_from_environment()
    try:
        yield
    except PeerLostError:
        raise
    except Exception as error:
        if first_to_fail():
            raise
        raise SaidElsewhereError(status(error)) from error
    finally:
        leave()


@contextmanager
def _others(command: Sequence[str], processes: int) -> Iterator[None]:
    """Run the other processes of this command while this one is rank 0; none outlives it.

    Raises:
        StageError: one of them was killed.
        SaidElsewhereError: one of them failed, and has said why.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, usable_cores() // processes)
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    ended = threading.Event()
    with _environment(shared | {"RANK": "0", "LOCAL_RANK": "0"}):
        others = [
            subprocess.Popen(
                [sys.executable, "-m", "pipeline", *command],
                env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            for rank in range(1, processes)
        ]
        threading.Thread(target=_watch, args=(others, ended), daemon=True).start()
        patience = 0.0
        try:
            yield
            patience = _GRACE_S
        except PeerLostError as error:
            raise _lost(others) from error
        except SaidElsewhereError:
            patience = _GRACE_S  # another still says what it was
            raise
        finally:
            ended.set()
            _end(others, patience)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = os.environ.copy()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _lost(others: Sequence[subprocess.Popen[bytes]]) -> Exception:
    """How another process ended, as the error of this one."""
    until = time.monotonic() + _GRACE_S
    while time.monotonic() < until and not any(other.poll() for other in others):
        time.sleep(0.05)
    codes = [other.poll() or 0 for other in others]
    killed = [(rank, -code) for rank, code in enumerate(codes, 1) if code < 0]
    if killed:
        rank, number = killed[0]
        return StageError(
            f"process {rank} of {len(others) + 1} was killed by {signal.Signals(number).name}: what is finished is "
            "kept, the same command goes on"
        )
    return SaidElsewhereError(max([*codes, 1]))


def _watch(others: Sequence[subprocess.Popen[bytes]], ended: threading.Event) -> None:
    """End this process where another has ended and this one waits for it for ever, as NCCL does."""
    while not ended.wait(0.5):
        if any(other.poll() for other in others) and not ended.wait(_GRACE_S):
            error = _lost(others)
            if isinstance(error, StageError):
                print(f"error: {error}", file=sys.stderr, flush=True)
            _end(others, 0)
            os._exit(error.status if isinstance(error, SaidElsewhereError) else 1)


def _end(others: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    """Wait for processes that are done, so many seconds, and kill those that are not."""
    for other in others:
        try:
            other.wait(patience)
        except subprocess.TimeoutExpired:
            other.kill()
            other.wait()
