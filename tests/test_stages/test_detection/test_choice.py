"""The rule of ``auto`` on made arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.detection.choice import (
    FoldScores,
    choose,
    clearly_better,
    displaces,
    of_frozen,
    size_of,
    standings,
    sums_of,
)
from stages.metrics.ranking import fpr95

KINDS = 2


def losses(*rows):
    """Losses ``[candidates, folds, kinds]`` that are alike for all kinds."""
    return np.repeat(np.array(rows, dtype=float)[:, :, None], KINDS, axis=2)


def test_the_best_is_chosen_where_it_is_clearly_so():
    assert choose(losses([0.3, 0.4, 0.3], [0.1, 0.2, 0.1], [0.2, 0.3, 0.2]), [1, 3, 1]) == 1


def test_within_one_standard_error_fewer_parts_win_and_among_them_the_lower_loss():
    best, near, nearer, far = [0.10, 0.20, 0.10], [0.08, 0.26, 0.12], [0.08, 0.25, 0.12], [0.5, 0.6, 0.5]
    found = losses(best, near, nearer, far)
    gap = np.array(nearer) - best
    assert standings(found)[2].gaps == pytest.approx([gap.mean()] * KINDS)
    assert standings(found)[2].errors == pytest.approx([gap.std(ddof=1) / np.sqrt(3)] * KINDS)
    assert gap.mean() <= gap.std(ddof=1) / np.sqrt(3)
    assert choose(found, [2, 1, 1, 1]) == 2
    assert choose(found, [1, 1, 1, 1]) == 0  # as simple, and best
    assert choose(found, [3, 2, 2, 1]) == 2  # the simplest of those that are as good, not of all


def test_the_error_is_of_the_difference_and_not_of_the_loss():
    """Folds that are hard for all are no reason to take the worse."""
    assert choose(losses([0.1, 0.9, 0.3], [0.2, 1.0, 0.4]), [2, 1]) == 0


def test_a_loss_of_one_kind_is_not_made_good_by_another():
    best, simple = [[0.1, 0.3], [0.2, 0.4], [0.1, 0.3]], [[0.3, 0.11], [0.4, 0.21], [0.3, 0.11]]
    assert choose(np.array([best, simple]), [2, 1]) == 0


def test_of_one_fold_the_best():
    assert choose(losses([0.2], [0.1]), [1, 2]) == 1


@settings(max_examples=30)
@given(st.integers(2, 40), st.integers(2, 5), st.integers(0, 999))
def test_what_is_chosen_is_within_an_error_and_nothing_as_good_is_simpler(n, folds, seed):
    rng = np.random.default_rng(seed)
    found, sizes = rng.uniform(size=(n, folds, 3)), rng.integers(1, 4, n)
    chosen, each = choose(found, sizes.tolist()), standings(found)
    assert each[chosen].as_good
    as_good = [other for other in range(n) if each[other].as_good]
    assert int(np.argmin(found.mean(axis=(1, 2)))) in as_good
    assert sizes[chosen] == min(sizes[as_good])
    assert all(sizes[other] > sizes[chosen] or each[other].loss >= each[chosen].loss for other in as_good)


def test_what_is_recommended_stands_unless_another_is_clearly_better():
    recommended = np.array([[0.5, 0.2], [0.6, 0.3], [0.5, 0.2], [0.7, 0.1]])
    assert clearly_better(recommended - 0.1, recommended, repeats=1)
    gains = np.array([0.1, 0.01, 0.09, 0.02])[:, None]
    error = gains.std(ddof=1) / 2
    assert 2 * error < gains.mean() < 2 * error * np.sqrt(2)
    assert clearly_better(recommended - gains, recommended, repeats=1)
    assert not clearly_better(recommended - gains, recommended, repeats=2)  # the same classes once more
    assert not clearly_better(recommended, recommended, repeats=1)


def test_experts_have_to_be_better_of_every_kind():
    frozen = np.array([[0.5, 0.2], [0.6, 0.3], [0.5, 0.2]])
    assert displaces(frozen - 0.1, frozen)
    assert not displaces(frozen - [0.3, 0.0], frozen)  # of left-out classes alone, which they were trained on
    assert not displaces(frozen - [[0.1, 0.3], [0.1, -0.1], [0.1, -0.1]], frozen)  # by chance
    assert not displaces(frozen, frozen)


@settings(max_examples=30)
@given(st.integers(10, 60), st.integers(10, 60), st.integers(0, 999), st.booleans())
def test_losses_are_the_fpr95_of_standardised_sums(n, m, seed, ties):
    rng = np.random.default_rng(seed)
    own = {name: rng.normal(scale, scale, n) for name, scale in (("a", 1), ("b", 20))}
    ood = {name: rng.normal(2 * scale, scale, m) for name, scale in (("a", 1), ("b", 20))}
    if ties:
        own, ood = ({name: values.round() for name, values in side.items()} for side in (own, ood))
    fold = FoldScores(own, {"far": ood}).standardised()
    z = {name: [(side[name] - own[name].mean()) / own[name].std() for side in (own, ood)] for name in own}
    expected = [fpr95(*z["a"]), fpr95(z["a"][0] + z["b"][0], z["a"][1] + z["b"][1])]
    assert fold.losses(["a", "a+b"])[:, 0].tolist() == expected


def test_a_constant_score_adds_nothing_to_a_sum():
    fold = FoldScores({"a": np.arange(20.0), "b": np.ones(20)}, {"far": {"a": np.arange(10.0), "b": np.ones(10)}})
    alone, both = fold.standardised().losses(["a", "a+b"])
    assert alone == both


def test_sums_have_a_part_of_a_family():
    assert sums_of([["knn"], ["energy", "msp"], ["vim"]]) == [
        "knn+energy", "knn+msp", "knn+vim", "energy+vim", "msp+vim",
    ]  # fmt: skip
    assert sums_of([["knn", "ncm"]]) == []
    assert [size_of(score) for score in ("knn", "frozen:knn+energy")] == [1, 2]
    assert [of_frozen(score) for score in ("frozen:knn+energy", "frozen:knn+frozen:energy")] == [False, True]
