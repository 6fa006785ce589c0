"""Dynamic-β Mixup: a hard class is mixed more, and nothing else changes. Who is mixed with whom: see test_train.py."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from stages.mixture.mixup import class_alpha, class_difficulty, draw_mixing, interpolate, running_accuracy
from stages.networks.tokens import Tokens

accuracies = st.lists(st.floats(0, 1), min_size=1, max_size=20).map(np.array)


def batch(n: int, classes: int = 3) -> tuple[Tokens, torch.Tensor, torch.Tensor]:
    """Tokens, labels and their targets."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, 6), (n, 5), (n, 2, 5), (n, 4, 5))
    labels = torch.arange(n) % classes
    return Tokens(*(torch.randn(s, generator=generator) for s in shapes)), labels, F.one_hot(labels, classes).float()


class Mixed(NamedTuple):
    """A batch mixed with itself, and how."""

    tokens: Tokens
    targets: torch.Tensor
    lam: torch.Tensor
    partner: torch.Tensor


def mix_features(tokens, targets, alpha, rng) -> Mixed:
    """What a training does to the rows of one expert."""
    lam, partner = map(torch.from_numpy, draw_mixing(alpha, rng))
    mixed = tokens.map(lambda x: interpolate(x, x[partner], lam))
    return Mixed(mixed, interpolate(targets, targets[partner], lam), lam, partner)


def strength(lam: torch.Tensor) -> float:
    """Mean distance of λ from the ends: 0 leaves rows alone, ½ is the strongest mixing."""
    return torch.minimum(lam, 1 - lam).mean().item()


# ------------------------------------------------------------------------------------------------------- the knob


def test_the_knob_turns():
    """One class becomes hard: its α rises and its λ moves towards ½; the others' do not."""
    tokens, labels, targets = batch(3000)
    easy, hard = (class_alpha(np.array(accuracy), 0.1, 0.8) for accuracy in ([0.9, 0.9, 0.9], [0.9, 0.9, 0.4]))
    assert easy.tolist() == [0.1, 0.1, 0.1]
    assert hard.tolist() == [0.1, 0.1, pytest.approx(0.8)]
    before, after = (
        mix_features(tokens, targets, alpha[labels], np.random.default_rng(0)).lam for alpha in (easy, hard)
    )
    was, now = ([strength(lam[labels == c]) for c in range(3)] for lam in (before, after))
    assert now[2] > 2 * was[2]
    assert now[:2] == pytest.approx(was[:2], abs=0.02)


def test_interpolation_weight_is_beta_distributed():
    """Mean ½ and variance 1 / (4 (2α + 1)), so that the variance alone tells α."""
    tokens, _, targets = batch(20_000)
    for alpha in (0.1, 0.8, 5.0):
        lam = mix_features(tokens, targets, np.full(20_000, alpha), np.random.default_rng(0)).lam
        assert lam.mean().item() == pytest.approx(0.5, abs=0.01)
        assert lam.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_difficulty_and_alpha_written_out():
    accuracy = np.array([0.2, 0.5, 0.8])
    assert class_difficulty(accuracy) == pytest.approx([1, 0.5, 0])
    assert class_alpha(accuracy, 0.1, 0.5, power=2) == pytest.approx([0.5, 0.1 + 0.25 * 0.4, 0.1])
    assert class_alpha(np.array([0.7, 0.7]), 0.1, 0.5).tolist() == [0.1, 0.1]  # all equal: nothing is hard


@given(accuracies, st.floats(0, 1), st.floats(0, 5), st.floats(0.25, 4))
def test_alpha_stays_between_its_bounds_and_falls_with_accuracy(accuracy, low, span, power):
    alpha = class_alpha(accuracy, low, low + span, power)
    assert alpha.shape == accuracy.shape
    assert (alpha >= low).all()
    assert (alpha <= (low + span) * (1 + 1e-12)).all()
    assert (np.diff(alpha[np.argsort(accuracy)]) <= 1e-12).all()
    if np.ptp(accuracy) > 0:
        assert alpha[accuracy.argmin()] == pytest.approx(low + span)
        assert alpha[accuracy.argmax()] == low


@given(accuracies, st.floats(0, 2))
def test_equal_bounds_are_static_mixup(accuracy, alpha):
    assert (class_alpha(accuracy, alpha, alpha) == alpha).all()


def test_running_accuracy_is_smoothed_and_remembers():
    correct, count = np.array([0, 3, 8]), np.array([0, 3, 8])
    first = running_accuracy(None, correct, count)
    assert first.tolist() == [1 / 2, 4 / 5, 9 / 10]  # a class without rows: nothing is known
    second = running_accuracy(first, np.array([0, 0, 8]), count, momentum=0.7)
    assert second == pytest.approx(0.7 * first + 0.3 * np.array([1 / 2, 1 / 5, 9 / 10]))


# ------------------------------------------------------------------------------------------------------ the mixing


def test_tokens_and_targets_are_interpolated_alike():
    tokens, _, targets = batch(12)
    alpha = np.linspace(0.1, 2, 12)
    mixed = mix_features(tokens, targets, alpha, np.random.default_rng(1))
    assert sorted(mixed.partner.tolist()) == list(range(12))
    for row in range(12):
        lam, other = mixed.lam[row], mixed.partner[row]
        for name in ("cls", "tap_cls", "registers", "patches"):
            before, after = getattr(tokens, name), getattr(mixed.tokens, name)
            assert torch.allclose(after[row], lam * before[row] + (1 - lam) * before[other])
        assert torch.allclose(mixed.targets[row], lam * targets[row] + (1 - lam) * targets[other])


def test_a_pair_takes_its_first_rows_alpha():
    tokens, _, targets = batch(200)
    alpha = np.repeat([0.0, 100.0], 100)  # none at all; always near one half
    mixed = mix_features(tokens, targets, alpha, np.random.default_rng(0))
    assert (mixed.lam[:100] == 1).all()
    assert ((mixed.lam[100:] - 0.5).abs() < 0.2).all()
    assert (mixed.partner[:100] >= 100).any()  # whoever the partner is


def test_alpha_zero_leaves_rows_alone():
    tokens, _, targets = batch(20)
    mixed = mix_features(tokens, targets, np.zeros(20), np.random.default_rng(0))
    assert torch.equal(mixed.targets, targets)
    assert all(torch.equal(getattr(mixed.tokens, name), value) for name, value in vars(tokens).items())


def test_one_row_is_mixed_with_itself():
    tokens, _, targets = batch(1)
    mixed = mix_features(tokens, targets, np.array([0.8]), np.random.default_rng(0))
    assert torch.allclose(mixed.tokens.patches, tokens.patches)
    assert torch.allclose(mixed.targets, targets)


def test_what_a_cache_does_not_hold_stays_absent():
    tokens, _, targets = batch(4)
    tokens = Tokens(tokens.cls, tokens.tap_cls, tokens.registers[:, :0], tokens.patches[:, :0])
    mixed = mix_features(tokens, targets, np.full(4, 0.5), np.random.default_rng(0))
    assert mixed.tokens.patches.shape == (4, 0, 5)


def test_same_seed_same_mixing():
    tokens, _, targets = batch(30)
    first, again, other = (
        mix_features(tokens, targets, np.full(30, 0.4), np.random.default_rng(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first.tokens.patches, again.tokens.patches)
    assert not torch.equal(first.tokens.patches, other.tokens.patches)


@given(
    alpha=st.lists(st.floats(0, 50) | st.sampled_from([0.0, 1e-300, 1e-9, 1e-3]), min_size=1, max_size=12),
    smoothing=st.floats(0, 0.5),
    seed=st.integers(0, 100),
)
def test_soft_targets_sum_to_one(alpha, smoothing, seed):
    n = len(alpha)
    tokens, _, targets = batch(n)
    soft = targets * (1 - smoothing) + smoothing / 3
    mixed = mix_features(tokens, soft, np.array(alpha), np.random.default_rng(seed))
    assert torch.allclose(mixed.targets.sum(1), torch.ones(n))
    assert (mixed.targets >= 0).all()
    assert ((mixed.lam >= 0) & (mixed.lam <= 1)).all()
    assert torch.isfinite(mixed.tokens.patches).all()
