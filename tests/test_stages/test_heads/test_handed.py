"""Heads whose rows others sum: to the bits of one process."""

from pathlib import Path

import numpy as np
import pytest

from cache.files import write_file
from stages.errors import StageError
from stages.heads import sums
from stages.heads.choose import HeadRows, choose_head, fit_head
from stages.heads.handed import Others
from tests.test_parity.clusters import InHere


def rows(n: int, dim: int = 6, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    labels = rng.integers(0, classes, n).astype(np.int32)
    return rng.normal(size=(n, dim)).astype(np.float32) + labels[:, None] * rng.random(dim, np.float32), labels


def same(found, expected):
    assert found.strength == expected.strength
    assert found.judged == expected.judged
    for name, values in expected.head.tensors().items():
        assert np.array_equal(found.head.tensors()[name], values), name


@pytest.fixture
def none_kept(monkeypatch):
    """No row is kept in memory, so that all are handed out."""
    monkeypatch.setattr(sums, "KEPT_BYTES", 0)


@pytest.mark.parametrize("classes", [2, 3])
def test_groups_are_summed_as_here(none_kept, classes, monkeypatch, tmp_path):
    monkeypatch.setattr(sums, "BLOCK", 50)
    monkeypatch.setattr(sums, "GROUP", 3)
    fit, judge = rows(700, classes=classes), rows(300, classes=classes)
    here = InHere()
    same(
        choose_head(HeadRows(*fit, *judge), classes, summing=Others(here, tmp_path)),
        choose_head(HeadRows(*fit, *judge), classes),
    )
    assert [*map(str, here.done[:2])] == ["group 0 of a linear head's rows", "group 1 of a linear head's rows"]
    assert {item.number for item in here.done} == set(range(5))
    assert list(tmp_path.iterdir()) == []


def test_rows_that_memory_keeps_stay_here(tmp_path):
    here = InHere()
    fit_head(*rows(700), 3, 1.0, summing=Others(here, tmp_path))
    assert here.done == []


def test_a_cluster_that_goes_away_leaves_nothing_behind(none_kept, tmp_path):
    with pytest.raises(StageError, match="gone"):
        fit_head(*rows(700), 3, 1.0, summing=Others(InHere(most=3), tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_damaged_sums_are_not_added(none_kept, tmp_path):
    class Damaging:
        def map(self, fn, items):
            for item in items:
                yield fn(item)
                write_file(Path(item.path), b"damaged")

    with pytest.raises(StageError, match="is damaged and was removed: run the same again"):
        fit_head(*rows(700), 3, 1.0, summing=Others(Damaging(), tmp_path))
