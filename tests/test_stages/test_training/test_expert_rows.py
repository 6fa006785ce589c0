"""What is drawn for a batch is the same in every process, shared out without a rest, and arrives as it was drawn."""

import numpy as np
import pytest

from stages.training.expert_rows import draw_rows

LABELS = np.array([3, 0, 2, 2, 1, 0, 4, 3, 3, 0, 4], np.int32)
GROUP = np.array([0, 0, 1, 1, 2])


def drawn(share=slice(0, None, 1), others=True, labels=LABELS, seed=0):
    return draw_rows(labels, GROUP, np.full(5, 0.5), share, others, np.random.default_rng(seed))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_what_one_alone_computes(world):
    alone, parts = drawn(), [drawn(slice(rank, None, world)) for rank in range(world)]
    for number, whole in enumerate(alone.parts):
        mine = [part.parts[number] for part in parts]
        for name in ("own", "partners", "other", "lam"):
            found = np.concatenate([getattr(rows, name) for rows in mine])
            assert sorted(found.tolist()) == sorted(getattr(whole, name).tolist())
        assert all(np.array_equal(rows.inside, whole.inside) for rows in mine)
    assert all(part.state == alone.state for part in parts)
    assert np.array_equal(np.unique(np.concatenate([part.needed for part in parts])), np.arange(len(LABELS)))


def test_an_expert_learns_its_group_mixed_within_it_and_as_many_others():
    for rows in drawn().parts:
        assert (GROUP[LABELS[rows.own]] == rows.expert).all()
        assert (GROUP[LABELS[rows.partners]] == rows.expert).all()
        assert (GROUP[LABELS[rows.other]] != rows.expert).all()
        assert len(rows.other) == min(len(rows.own), len(LABELS) - len(rows.own))
    assert all(len(rows.other) == 0 for rows in drawn(others=False).parts)
    assert [rows.expert for rows in drawn(labels=LABELS[LABELS < 4]).parts] == [0, 1]  # the third has no row


@pytest.mark.parametrize("share", [slice(0, None, 1), slice(1, None, 2), slice(7, None, 8)])
def test_what_is_sent_says_what_was_drawn(share):
    draw = drawn(share)
    sent = draw.columns(LABELS)
    placed = draw.placed(sent, n_experts=3)
    np.testing.assert_array_equal(sent["truth"], LABELS[draw.needed])
    assert placed.counts == [len(rows.own) + len(rows.other) for rows in draw.parts]
    whole = {
        name: getattr(placed, name).split(placed.counts) for name in ("own", "partners", "lam", "expert", "is_other")
    }
    for number, rows in enumerate(draw.parts):
        one = {name: values[number].numpy() for name, values in whole.items()}
        n_own, n_other = len(rows.own), len(rows.other)
        np.testing.assert_array_equal(one["expert"], np.full(n_own + n_other, rows.expert))
        np.testing.assert_array_equal(one["is_other"], [False] * n_own + [True] * n_other)
        np.testing.assert_array_equal(draw.needed[one["own"]], [*rows.own, *rows.other])
        np.testing.assert_array_equal(draw.needed[one["partners"]], [*rows.partners, *rows.other])
        np.testing.assert_array_equal(one["lam"], [*rows.lam, *np.ones(n_other)])
    own = np.concatenate([rows.own for rows in draw.parts])
    np.testing.assert_array_equal(draw.needed[placed.routed], np.sort(own))


def test_an_expert_without_rows_is_counted():
    draw = drawn(labels=LABELS[LABELS < 4])
    counts = draw.placed(draw.columns(LABELS[LABELS < 4]), n_experts=3).counts
    assert counts[2] == 0
    assert min(counts[:2]) > 0
