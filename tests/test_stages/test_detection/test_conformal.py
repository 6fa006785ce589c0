"""What calibration scores promise: p-values, thresholds, batches; beside naive loops, scipy.stats and simulation.

The oracle is the formulas, written anew: ``nonconform`` has them as well, and asks for Python 3.12, later than ours.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, betabinom, binom

from stages.detection.conformal import BatchPromise, FalseAlarms, conformal_p_values, rows_to_flag, threshold_at
from stages.errors import InputError
from stages.metrics.discoveries import discoveries

scores = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=40)  # with many ties


@settings(deadline=None, max_examples=50)
@given(scores, scores)
def test_a_p_value_counts_the_rows_that_score_no_less(calibration, new):
    expected = [(1 + sum(own >= score for own in calibration)) / (len(calibration) + 1) for score in new]
    assert conformal_p_values(new, calibration).tolist() == expected


@settings(deadline=None, max_examples=50)
@given(scores, scores, st.sampled_from(["0.5", "0.9", "0.95", "0.99"]))
def test_the_threshold_flags_what_has_a_small_p(calibration, new, admit):
    """To the last bit, with ties: of ID images p ≤ 5 % is not another promise than 95 % admitted."""
    alpha = float(1 - Fraction(admit))
    flagged = [threshold_at(calibration, float(admit)).decide(score) == "OOD" for score in new]
    assert flagged == (conformal_p_values(new, calibration) <= alpha).tolist()


@pytest.mark.parametrize("admit", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [9, 19, 77, 99, 100, 1234])
def test_false_alarms_are_those_of_scipys_distributions(n, admit):
    rank = next(rank for rank in range(1, n + 2) if rank * 100 >= round(100 * admit) * (n + 1))
    found = FalseAlarms.of(n, admit)
    if rank > n:
        assert found is None
        return
    of_all, of_100 = beta(n + 1 - rank, rank), betabinom(100, n + 1 - rank, rank)
    assert found.expected == pytest.approx(of_all.mean())
    assert (found.lo, found.hi) == pytest.approx(of_all.interval(0.95))
    assert (found.of_100_lo, found.of_100_hi) == of_100.interval(0.95)
    assert found == threshold_at(np.arange(n), admit).false_alarms


def test_the_promise_in_words():
    assert FalseAlarms.of(77, 0.95).words(77) == (
        "of 100 ID images about 3.8 are flagged; with these 77 rows between 0.8 and 9.1 in the long run, "
        "and 0 to 11 of the next 100"
    )
    assert FalseAlarms.of(77, 0.99) is None


def test_threshold_admits_what_it_says_with_an_interval_that_holds():
    rng = np.random.default_rng(1)
    truth = 1.6448536  # 95 % quantile of a unit normal
    held = 0
    for _ in range(300):
        scores = rng.normal(size=150)
        estimate = threshold_at(scores)
        assert np.sum(scores <= estimate.threshold) == 144  # 0.95 of 151, rounded up
        assert estimate.lo <= estimate.threshold <= estimate.hi
        held += estimate.lo <= truth <= estimate.hi
    assert held / 300 >= 0.93  # 95 % promised; two standard errors are 2.5 %


@pytest.mark.parametrize(("admit", "rows"), [(0.95, 72), (0.99, 368)])
def test_too_few_rows_leave_the_interval_open(admit, rows):
    assert threshold_at(np.arange(rows), admit).hi == rows - 1
    assert threshold_at(np.arange(rows - 1), admit).hi is None
    assert threshold_at([1.0], 0.95).lo is None


def test_over_calibration_sets_no_more_is_flagged_than_promised():
    """1,000 of them: the mean is inside the 99 % band of exchangeable scores, what each gives inside its interval."""
    rng, n = np.random.default_rng(0), 77
    promised = FalseAlarms.of(n, 0.95)
    thresholds = np.array([threshold_at(rng.standard_t(3, size=n)).threshold for _ in range(1000)])
    fresh = rng.standard_t(3, size=(1000, 100))
    flagged = (fresh > thresholds[:, None]).sum(axis=1)
    of_100 = betabinom(100, 3, 75)
    deviation = of_100.std() / math.sqrt(1000)
    assert abs(flagged.mean() - 100 * promised.expected) < 2.576 * deviation
    held = np.mean((promised.of_100_lo <= flagged) & (flagged <= promised.of_100_hi))
    low, high = binom(1000, of_100.cdf(promised.of_100_hi) - of_100.cdf(promised.of_100_lo - 1)).interval(0.99)
    assert low <= 1000 * held <= high
    one = (rng.standard_t(3, size=1000) > thresholds).sum()  # independent trials: a band that is binomial
    low, high = binom(1000, promised.expected).interval(0.99)
    assert low <= one <= high


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_of_flagged_images_no_more_are_id_than_promised(share, ties):
    """1,000 batches of 40 with a calibration set each; at 0 % OOD the rate is that of flagging anything at all."""
    rng, fdr, n, images = np.random.default_rng(1), 0.1, 400, 40
    n_ood = round(share * images)
    false, found = [], 0
    for _ in range(1000):
        calibration, batch = rng.normal(size=n), rng.normal(size=images)
        batch[:n_ood] += 3.5
        if ties:
            calibration, batch = np.round(calibration), np.round(batch)
        flagged = discoveries(conformal_p_values(batch, calibration), fdr)
        false.append(flagged[n_ood:].sum() / max(flagged.sum(), 1))
        found += flagged[:n_ood].sum()
    assert np.mean(false) <= fdr * (1 - share) + 2.576 * np.std(false) / math.sqrt(1000)
    assert share == 0 or ties or found > 500 * n_ood  # it does find them


def test_a_batch_says_how_many_rows_it_needs():
    """As a naive search has it: whether k images whose p is the least there is are flagged among m."""
    for images in (1, 7, 60):
        for n in (5, 19, 40, 399):
            least = 1 / (n + 1)
            can = [k for k in range(1, images + 1) if discoveries([least] * k + [1.0] * (images - k), 0.05).sum() == k]
            promise = BatchPromise.of(n, images, 0.05)
            assert promise.fewest == (can[0] if can else None)
            assert bool(promise.too_few) == (can[:1] != [1])
            for k in range(1, images + 1):
                assert (n >= rows_to_flag(k, images, 0.05)) == (k in can)


def test_what_a_batch_needs_in_words():
    assert BatchPromise.of(77, 100, 0.05).too_few == (
        "a false discovery rate of 5% needs 1999 calibration rows to flag 1 of 100 images, with 77 it flags 26 or "
        "more or none"
    )
    assert BatchPromise.of(9, 100, 0.05).too_few == (
        "a false discovery rate of 5% needs 19 calibration rows, there are 9"
    )
    assert BatchPromise.of(1999, 100, 0.05).too_few == ""


def test_bad_scores_and_shares_are_refused():
    assert conformal_p_values([], [1.0]).shape == (0,)
    with pytest.raises(InputError, match="1 of 2 new scores are NaN or inf"):
        conformal_p_values([0.0, math.nan], [1.0])
    with pytest.raises(InputError, match="calibration scores have shape"):
        conformal_p_values([0.0], [])
    with pytest.raises(InputError, match=r"fdr = 1\.5 given"):
        BatchPromise.of(10, 10, 1.5)
    with pytest.raises(InputError, match="admit = 0 given"):
        threshold_at([1.0], 0)
