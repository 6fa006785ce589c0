"""Checkpoints: how often a training is stored."""

import pytest
import torch

from stages.training import checkpoint as checkpoint_module
from stages.training.checkpoint import Checkpoints, load_checkpoint


class Clock:
    """A clock that moves when it is told to, and by two seconds while a checkpoint is written."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def write(self, path, content) -> None:
        path.write_bytes(content)
        self.now += 2


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(checkpoint_module, "time", clock)
    monkeypatch.setattr(checkpoint_module, "write_file", clock.write)
    return clock


@pytest.mark.parametrize(
    ("seconds", "due", "overdue"), [(0, False, False), (59, False, False), (60, True, True), (600, True, True)]
)
def test_storing_takes_at_most_a_thirtieth_of_the_time(clock, tmp_path, seconds, due, overdue):
    store = Checkpoints(tmp_path / "mine.checkpoint")
    assert store.due  # the end of the first epoch is stored, however soon it comes
    assert not store.overdue
    store.save({"weights": torch.arange(3)})
    assert torch.equal(load_checkpoint(store.path)["weights"], torch.arange(3))
    clock.now += seconds
    assert (store.due, store.overdue) == (due, overdue)


def test_what_is_prepared_is_stored_later_as_it_was(clock, tmp_path):
    store, weights = Checkpoints(tmp_path / "folder" / "mine.checkpoint"), torch.zeros(2)
    store.commit()
    store.prepare({"weights": weights})
    weights += 1
    assert load_checkpoint(store.path) is None
    store.commit()
    weights += 1
    store.commit()
    assert load_checkpoint(store.path)["weights"].tolist() == [0, 0]


def test_a_damaged_checkpoint_counts_as_none_and_is_said(tmp_path):
    """Every byte of it: those of tensors torch itself does not look at."""
    store, said = Checkpoints(tmp_path / "mine.checkpoint"), []
    store.save({"weights": torch.arange(64.0), "epoch": 3})
    whole = store.path.read_bytes()
    damages = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    for content in [*damages, whole[:-1], whole[:9], b"", whole + b"\0"]:
        store.path.write_bytes(content)
        assert load_checkpoint(store.path, say=said.append) is None
    assert len(said) == len(damages) + 4
    assert set(said) == {f"{store.path} is damaged and counts as none: this training starts anew"}
    store.path.write_bytes(whole)
    assert load_checkpoint(store.path)["epoch"] == 3


def test_the_end_of_an_epoch_is_not_waited_for_once_a_minute_would_be_lost(clock, tmp_path):
    store = Checkpoints(tmp_path / "mine.checkpoint")
    clock.now = 59
    assert not store.overdue
    clock.now = 60
    assert store.overdue
