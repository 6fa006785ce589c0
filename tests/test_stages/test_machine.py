"""How threads wait for each other."""

import os

import pytest

from stages.machine import wait_briefly


@pytest.fixture
def silent(monkeypatch):
    """An environment that says nothing of how threads wait."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is given back
    monkeypatch.delenv("GOMP_SPINCOUNT")


def test_threads_sleep_soon(silent):
    wait_briefly()
    assert int(os.environ["GOMP_SPINCOUNT"]) < 300_000  # the runtime's own


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_says_of_waiting_stands(name, silent, monkeypatch):
    monkeypatch.setenv(name, "7")
    before = os.environ.copy()
    wait_briefly()
    assert os.environ == before
