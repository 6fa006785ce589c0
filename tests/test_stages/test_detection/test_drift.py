"""A stream of ID images is called drifting as rarely as promised, however few rows calibrate; one with OOD soon is."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import binom, kstest

from stages.detection.conformal import conformal_p_values
from stages.detection.drift import (
    N_BETS,
    DriftMonitor,
    Martingale,
    ScoreCells,
    StreamState,
    fair_bets,
    online_p_values,
    rows_to_notice,
)
from stages.errors import InputError
from tests.bench.bench_watch import ALPHA, alarms, delay
from tests.test_docs.pages import PAGES, table


@pytest.mark.parametrize("n", [1, 20, 700])
@pytest.mark.parametrize("ties", [False, True])
def test_online_p_values_are_those_of_all_rows_before_written_out(n, ties):
    """But for the place within a cell, which is drawn: the share of rows above the cell, and above or in it."""
    rng = np.random.default_rng(n)
    calibration, stream = (np.round(rng.normal(size=size) * 3 / (1 if ties else 1e-9)) for size in (n, 60))
    cells = ScoreCells.of(calibration)
    assert len(cells.landmarks) <= 256
    assert cells.rows.sum() == n
    rows = cells.rows.copy()
    for t, score in enumerate(stream):
        cell = int(cells.cell(score))
        before = np.concatenate([calibration, stream[:t]])
        below, at = divmod(cell, 2)
        inside = before == score
        if not at:
            low = cells.landmarks[below - 1] if below else -math.inf
            high = cells.landmarks[below] if below < len(cells.landmarks) else math.inf
            inside = (before > low) & (before < high)
            assert low < score < high
        above = np.sum(before[~inside] > score)
        for place in (0.25, 1.0):
            found = online_p_values(rows, cell, place)
            assert found == (above + place * (inside.sum() + 1)) / (n + t + 1)
        rows[cell] += 1


@pytest.mark.parametrize("n", [5, 600])
@pytest.mark.parametrize("ties", [False, True])
def test_of_a_stream_of_id_images_they_are_independent_and_uniform(n, ties):
    """Where those among the calibration rows alone are neither: of few rows they all lie too high, or all too low."""
    rng, runs, steps = np.random.default_rng(0), 200, 25
    online, among = np.empty((runs, steps)), np.empty((runs, steps))
    for run in range(runs):
        scores = rng.normal(size=n + steps)
        calibration, stream = np.split(np.round(scores) if ties else scores, [n])
        cells = ScoreCells.of(calibration)
        rows = cells.rows.copy()
        for t, cell in enumerate(cells.cell(stream)):
            online[run, t] = online_p_values(rows, int(cell), 1 - rng.random())
            rows[cell] += 1
        among[run] = conformal_p_values(stream, calibration)
    assert kstest(online.ravel(), "uniform").pvalue > 0.001
    means = online.mean(axis=1) - 0.5  # of independent ones their variance is 1 / (12 · steps)
    assert means.var() * 12 * steps == pytest.approx(1, abs=0.3)
    assert np.abs(np.corrcoef(online[:, :-1].ravel(), online[:, 1:].ravel())[0, 1]) < 0.03
    if n == 5:
        assert among.mean(axis=1).var() * 12 * steps > 3


def test_bets_are_fair():
    means = [quad(lambda p, bet=bet: fair_bets(p)[bet], 0, 1, epsabs=1e-6, limit=200)[0] for bet in range(N_BETS)]
    assert means == pytest.approx([1] * N_BETS, abs=1e-4)
    assert fair_bets(np.ones((2, 3))).shape == (2, 3, N_BETS)
    assert (fair_bets(np.linspace(1e-9, 1, 100)) > 0).all()


def test_money_is_kept_or_bet_and_never_made():
    """Whoever wins nothing and loses nothing has 1 for ever."""
    martingale = Martingale.begin((2,))
    middle = np.full(2, 0.5)
    for _ in range(50):
        after = martingale.after(middle)
        gained = ((after.staked / fair_bets(middle)).sum(axis=1) - martingale.staked.sum(axis=1)).tolist()
        lost = math.log(2) * (1 / math.log(martingale.step + 2) - 1 / math.log(martingale.step + 3))
        assert gained == pytest.approx([lost, lost])
        martingale = after


@pytest.mark.parametrize(("n", "ties"), [(20, False), (77, True)])
def test_a_stream_of_id_images_is_called_drifting_as_rarely_as_promised(n, ties):
    """The small version of ``make bench-watch``."""
    found = alarms(n, runs=300, steps=1500, ties=ties)
    assert np.isfinite(found).sum() <= binom(300, ALPHA).ppf(0.99)


def test_ood_is_noticed_the_sooner_the_more_there_is():
    delays = [np.median(alarms(400, 15, 1500, 200, share)) - 200 for share in (0.3, 0.1)]
    assert 0 < delays[0] < 60 < delays[1] < 800


def test_it_cannot_be_noticed_with_fewer_rows_than_it_needs():
    assert [rows_to_notice(share, 0.01) for share in (0.05, 0.1, 0.3)] == [90, 44, 13]
    assert np.isinf(alarms(20, 20, 1000, share=0.05)).mean() > 0.9


def test_the_table_of_delays_is_what_the_simulation_gives():
    """One cell of it."""
    cells = next(
        row
        for row in table(PAGES["tests/bench/README.md"].text.split("## Drift of a stream")[1])
        if row[:2] == ["2000", "0"]
    )
    assert delay(2000, 0, 0.3, runs=40) == cells[4]


def stream(n=300):
    rng = np.random.default_rng(3)
    return (rng.normal(size=n) + 3 * (np.arange(n) > 200)).tolist()


def test_a_watch_goes_on_from_its_state_with_the_same_values():
    calibration = np.random.default_rng(0).normal(size=77)
    whole = DriftMonitor(calibration)
    expected = [whole.update(score) for score in stream()]
    found, state = [], None
    for start in range(0, 300, 20):
        watch = DriftMonitor(calibration, state=state)
        found += [watch.update(score) for score in stream()[start : start + 20]]
        state = StreamState(**json.loads(json.dumps(asdict(watch.state))))
    assert found == expected
    assert state == whole.state
    assert expected[199].drift is False
    assert expected[-1].drift
    assert 201 < expected[-1].drift_at < 240
    other = DriftMonitor(calibration, seed=1)
    assert [other.update(score).log10_evidence for score in stream(5)] != [one.log10_evidence for one in expected[:5]]


def test_a_row_says_what_the_promises_say():
    calibration = np.random.default_rng(0).normal(size=77)
    watch = DriftMonitor(calibration)
    reports = [watch.update(score) for score in stream()]
    assert [each.p_value for each in reports] == conformal_p_values(stream(), calibration).tolist()
    assert [each.decision == "OOD" for each in reports] == [each.p_value <= 0.05 for each in reports]
    assert reports[-1].ood_share_lo < 0.33 < reports[-1].ood_share_hi
    assert reports[-1].ood_share == pytest.approx((np.mean([r.p_value <= 0.05 for r in reports]) - 3 / 78) / (75 / 78))
    few = DriftMonitor(calibration[:10]).update(9.0)
    assert (few.decision, few.ood_share, few.ood_share_hi) == ("unknown", None, None)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_the_interval_holds_the_share_of_ood(share):
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        watch = DriftMonitor(rng.normal(size=77))
        flagged = (rng.normal(size=150) + 9 * (rng.random(150) < share)) > watch.threshold.threshold
        watch.state = replace(watch.state, steps=150, flagged=int(flagged.sum()))
        _, lo, hi = watch.ood_share()
        held += lo <= share <= hi
    assert held >= 190


def test_what_is_no_stream_beside_these_rows_is_refused():
    with pytest.raises(InputError, match="other calibration rows"):
        DriftMonitor([1.0, 2.0], state=DriftMonitor([1.0]).state)
    with pytest.raises(InputError, match="alpha = 1 given"):
        DriftMonitor([1.0], alpha=1)
    watch = DriftMonitor([1.0, 2.0])
    with pytest.raises(InputError, match="NaN or inf"):
        watch.update(math.nan)
    assert watch.state.steps == 0


def test_strictly_a_stream_is_compared_with_itself_alone():
    """Whatever calibrates, as long as it makes the same cells: the evidence is that of the stream."""
    scores = np.random.default_rng(0).normal(size=50)
    few, many = np.arange(-2.0, 3), np.repeat(np.arange(-2.0, 3), 40)
    strict = [DriftMonitor(own, strict=True) for own in (few, many)]
    plain = [DriftMonitor(own) for own in (few, many)]
    found = [[own.update(each).log10_evidence for each in scores] for own in (*strict, *plain)]
    assert found[0] == found[1]
    assert found[2] != found[3]
    shifted = DriftMonitor(few, strict=True)
    for each in np.random.default_rng(1).normal(size=300) + 9 * (np.arange(300) >= 200):
        drift = shifted.update(each).drift_at
    assert drift > 200
