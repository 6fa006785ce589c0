"""Intervals by simulation: how often they hold the truth, and that they do not collapse."""

import numpy as np
import pytest
from scipy.special import ndtr, ndtri
from scipy.stats import binom, false_discovery_control

from stages.metrics.bootstrap import bootstrap_metrics, resample_counts
from stages.metrics.intervals import (
    Difference,
    SetParts,
    auroc_interval,
    fpr95_interval,
    newcombe,
    quantile_ranks,
    verdicts,
    wilson,
)
from stages.metrics.ranking import auroc, fpr95, ood_metrics


def coverage(interval, truth: float, shift: float, n_id: int, n_ood: int, draws: int = 300) -> float:
    """How often the interval holds the truth, with ID scores from N(0, 1) and OOD scores from N(shift, 1)."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(draws):
        found = interval([SetParts.of(rng.normal(size=n_id), rng.normal(shift, size=n_ood))])
        held += found.lo <= truth <= found.hi
    return held / draws


@pytest.mark.parametrize(("n_id", "n_ood"), [(60, 30), (400, 50), (400, 400)])
@pytest.mark.parametrize("truth", [0.009, 0.2, 0.9])
def test_fpr95_is_held_as_often_as_said(truth, n_id, n_ood):
    shift = ndtri(0.95) - ndtri(truth)
    assert coverage(fpr95_interval, truth, shift, n_id, n_ood) >= 0.92  # 95 % less three deviations of 300 draws


@pytest.mark.parametrize(("n_id", "n_ood"), [(60, 30), (400, 50), (400, 400)])
@pytest.mark.parametrize("truth", [0.6, 0.95, 0.999])
def test_auroc_is_held_as_often_as_said(truth, n_id, n_ood):
    assert coverage(auroc_interval, truth, np.sqrt(2) * ndtri(truth), n_id, n_ood) >= 0.92


def test_the_percentile_bootstrap_is_not_used_for_it_is_far_too_short():
    """50 OOD images with a true FPR95 of 0.9 %: most sets show none that is admitted, and then no resample does."""
    rng, held = np.random.default_rng(0), 0
    counts = resample_counts(100, 100, 0), resample_counts(50, 100, 1)
    for _ in range(100):
        ids, oods = rng.normal(size=100), rng.normal(ndtri(0.95) - ndtri(0.009), size=50)
        lo, hi = np.quantile(bootstrap_metrics(ids, oods, *counts)["fpr95"], [0.025, 0.975])
        held += lo <= 0.009 <= hi
    assert held < 80


def test_perfect_separation_is_not_certainty():
    parts = [SetParts.of(np.arange(100), 200 + np.arange(50))]
    assert fpr95_interval(parts) == (0, pytest.approx(wilson(0, 50).hi))
    lo, hi = auroc_interval(parts)
    assert (lo, hi) == pytest.approx(newcombe(1.0, 100, 50))
    assert 0.9 < lo < 0.98 < hi == 1
    turned = [SetParts.of(200 + np.arange(100), np.arange(50))]
    assert auroc_interval(turned) == (0, pytest.approx(1 - lo))


def test_one_ood_image_says_little():
    found = auroc_interval([SetParts.of(np.arange(300), [280.5])])
    assert found.lo < 0.4
    assert found.hi > 0.99
    wide = fpr95_interval([SetParts.of(np.arange(300), [280.5])])
    assert wide.hi - wide.lo > 0.7


def test_more_rows_and_more_sets_say_more():
    rng = np.random.default_rng(1)
    widths = [
        np.diff(fpr95_interval([SetParts.of(rng.normal(size=n), rng.normal(2, size=n))])) for n in (60, 600, 6000)
    ]
    assert widths[0] > widths[1] > widths[2]
    ids, sets = rng.normal(size=2000), [rng.normal(2, size=200) for _ in range(6)]
    parts = [SetParts.of(ids, oods) for oods in sets]
    for interval in (fpr95_interval, auroc_interval):
        assert np.diff(interval(parts)) < np.mean([np.diff(interval([one])) for one in parts])


def test_parts_are_the_metrics():
    rng = np.random.default_rng(2)
    ids, oods = rng.normal(size=150).round(1), rng.normal(1, size=90).round(1)
    parts = SetParts.of(ids, oods)
    assert parts.auroc == pytest.approx(auroc(ids, oods))
    assert parts.fpr95 == fpr95(ids, oods)
    assert parts.id_wins.mean() == pytest.approx(parts.auroc)


@pytest.mark.parametrize("n", [2, 20, 59, 60, 100, 400])
def test_ranks_are_those_of_the_binomial(n):
    lo, hi = quantile_ranks(n, 0.95)

    def above(rank):  # probability, mid-p, that this order statistic lies above the quantile
        return binom.cdf(rank - 1, n, 0.95) - binom.pmf(rank - 1, n, 0.95) / 2

    def below(rank):
        return 1 - binom.cdf(rank, n, 0.95) + binom.pmf(rank, n, 0.95) / 2

    assert lo == max((rank for rank in range(1, n + 1) if above(rank) <= 0.025), default=0)
    assert hi == min((rank for rank in range(1, n + 1) if below(rank) <= 0.025), default=n + 1)


# ----------------------------------------------------------------------------------------------------- differences


def drawn(rng, shift: float, n_id: int = 200, n_ood: int = 200):
    ids, oods = rng.normal(size=n_id), rng.normal(shift, size=n_ood)
    return ids, oods, resample_counts(n_id, 200, 0), resample_counts(n_ood, 200, 1)


def side(ids, oods, id_counts, ood_counts, metric="fpr95"):
    replicates = bootstrap_metrics(ids, oods, id_counts, ood_counts)[metric]
    return [getattr(ood_metrics(ids, oods), metric)], [replicates]


def test_no_difference_is_found_as_rarely_as_said():
    rng, false = np.random.default_rng(3), 0
    for _ in range(80):
        ids, oods, *counts = drawn(rng, 1.5)
        noisy = [values + rng.normal(scale=0.5, size=len(values)) for values in (ids, oods)]
        other = [values + rng.normal(scale=0.5, size=len(values)) for values in (ids, oods)]  # as good as the first
        found = Difference.of(side(*noisy, *counts), side(*other, *counts), False, 200, 200)
        false += found.p < 0.05
        assert (found.p < 0.05) == (not found.lo <= 0 <= found.hi)
    assert 1 <= false <= 11  # 5 % of 80 is 4


def test_seeds_are_drawn_as_well():
    """Three seeds that disagree: what they share over images is certain, what the next one does is not."""
    values = [0.10, 0.20, 0.30]
    replicates = np.array(values)[:, None] + np.random.default_rng(0).normal(scale=1e-3, size=(3, 2000))
    none = ([0.15], np.full((1, 2000), 0.15))
    found = Difference.of((values, replicates), none, True, 400, 400)
    assert np.diff([found.lo, found.hi]) > 0.15  # of a mean of three with deviation 0.1: 2 · 1.96 · 0.1 / √3 = 0.23
    assert not found.one_seed
    alone = Difference.of((values[:1], replicates[:1]), none, True, 400, 400)
    assert alone.hi - alone.lo < 0.01
    assert alone.one_seed


def test_what_is_said_of_many_differences_at_once():
    def difference(mean, p, **changes):
        about = {"one_seed": False, "few": False} | changes
        lo, hi = sorted([mean - 0.1, mean + 0.1]) if p > 0.05 else (mean / 2, mean * 2)
        return Difference(mean, min(lo, hi), max(lo, hi), p, **about)

    many = [
        difference(-0.05, 0.001),
        difference(+0.05, 0.001, one_seed=True),
        difference(0.05, 0.001, few=True),
        *[difference(0.01, p) for p in (0.04, 0.3, 0.5, 0.7, 0.9)],
    ]
    said = verdicts(many, [False] * len(many))
    assert said[:3] == ["gain", "loss for this seed", "too few images"]
    assert said[3] == "no difference"  # by itself it would be one: 0.04 is not, among seven
    p = np.array([one.p for one in many if not one.few])
    assert [word != "no difference" for word in said if word != "too few images"] == (
        false_discovery_control(p) <= 0.05
    ).tolist()
    assert verdicts([], []) == []


def test_far_beyond_what_replicates_show_p_goes_on_falling():
    replicates = np.random.default_rng(0).normal(0.5, 0.05, size=(1, 1000))
    found = Difference.of(([0.5], replicates), ([0.0], np.zeros((1, 1000))), False, 400, 400)
    assert found.p == pytest.approx(2 * ndtr(-10), rel=2)
