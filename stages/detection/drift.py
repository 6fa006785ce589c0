"""Drift of a stream of scores: an exchangeability martingale on conformal p-values that are exact for few rows as well.

While images are ID, calibration rows and stream are exchangeable. Then each new row is as likely to stand at any place
among *all* rows before it, calibration and stream, and its place there says nothing of the next one's. So the smoothed
p-values of the growing sequence are independent and uniform, whatever the distribution of scores and however few rows
calibrate (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005). P-values among the
calibration rows alone are not: they share those rows, and of a long ID stream they would be called drifting for sure.

A gambler bets on the p-values at fair odds, on small ones above all. His money is a martingale that starts at 1; that
it ever reaches 1 / α has probability α at most (Ville, 1939). So no window and no level is tuned, and a false alarm
*ever* has probability α at most. He keeps a reserve, log 2 / log(t + 2) at step t, and bets anew what it falls by: a
drift that begins at any time meets money that has not been lost yet.

How much can be noticed is bounded by the rows: of a share s of OOD from the first image on, a calibration set that
holds none tells no more than log(1 / (1 − s)) a row (`rows_to_notice`). ID images of the stream add to the rows.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv

from stages.detection.conformal import conformal_p_values, threshold_at
from stages.errors import InputError
from stages.metrics.ranking import checked_scores

_MOST_LANDMARKS = 256
# What the gambler reckons with: these shares of OOD, whose p-values have density κ p^(κ − 1); and that all scores rise
# or fall a little, as Vovk's "simple jumper" does.
_SHARES, _KAPPAS, _TILTS = np.array([0.02, 0.06, 0.2, 0.6]), (0.1, 0.3), np.array([-1.0, 1.0])
N_BETS = len(_SHARES) * len(_KAPPAS) + len(_TILTS)
_TAIL = 0.0125  # of an interval that is made of two, each of which may miss in 2.5 %
_MOST_MONEY = 1e100


@dataclass(frozen=True, eq=False)
class ScoreCells:
    """Calibration scores as landmarks, and cells: each landmark's value, and the open intervals between them.

    Rows of one cell are exchangeable, calibration rows and stream alike, so that a row's place among those of its cell
    may be drawn in place of being looked up. A stream is then remembered by its counts in at most 513 cells.

    Attributes:
        landmarks: ``[L]`` distinct calibration scores, ascending; of many rows the highest stand densest.
        rows: ``[2 L + 1]`` calibration rows in each cell, ascending: below the first landmark, at it, between it and
            the next, …
    """

    landmarks: NDArray[np.float64]
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, calibration: ArrayLike) -> Self:
        """Of calibration scores ``[n]``.

        Raises:
            InputError: no scores, NaN or inf.

        >>> ScoreCells.of([1.0, 2.0, 2.0]).rows.tolist()
        [0, 1, 0, 2, 0]
        """
        ordered = np.sort(checked_scores(calibration, "calibration"))
        n = len(ordered)
        from_top = np.unique(np.geomspace(1, n, min(n, _MOST_LANDMARKS)).round().astype(np.int64))
        if n <= _MOST_LANDMARKS:
            from_top = np.arange(1, n + 1)
        landmarks = np.unique(ordered[n - from_top])
        found = cls(landmarks, np.zeros(2 * len(landmarks) + 1, dtype=np.int64))
        np.add.at(found.rows, found.cell(ordered), 1)
        return found

    def cell(self, scores: ArrayLike) -> NDArray[np.int64]:
        """Cell of each score, of any shape."""
        values = np.asarray(scores, dtype=np.float64)
        place = np.searchsorted(self.landmarks, values, "left")
        at = self.landmarks[np.minimum(place, len(self.landmarks) - 1)] == values
        return np.asarray(2 * place + at)


def online_p_values(rows: NDArray[np.int64], cell: ArrayLike, place: ArrayLike) -> NDArray[np.float64]:
    """P-value of a new row among all before it, for one stream or for many at once.

    Args:
        rows: ``[…, cells]`` in each cell, calibration and stream before it.
        cell: ``[…]`` of the new row.
        place: ``[…]`` in (0, 1], drawn uniformly.

    Returns:
        ``[…]`` in (0, 1]; small = OOD.

    >>> float(online_p_values(np.array([0, 1, 0, 2, 0]), cell=3, place=0.5))
    0.375
    """
    cell = np.asarray(cell)[..., None]
    at_most = np.cumsum(rows, axis=-1)
    upto = np.take_along_axis(at_most, cell, axis=-1)[..., 0]
    own = np.take_along_axis(rows, cell, axis=-1)[..., 0]
    n = at_most[..., -1]
    return np.asarray((n - upto + np.asarray(place) * (own + 1)) / (n + 1))


def fair_bets(p_values: ArrayLike) -> NDArray[np.float64]:
    """What money becomes that is put on each bet: each has mean 1 over uniform p-values.

    Args:
        p_values: of any shape, in (0, 1].

    Returns:
        The same shape and ``[N_BETS]``.
    """
    p = np.asarray(p_values, dtype=np.float64)[..., None]
    on_ood = [1 + _SHARES * (kappa * p ** (kappa - 1) - 1) for kappa in _KAPPAS]
    return np.concatenate([*on_ood, 1 + _TILTS * (p - 0.5)], axis=-1)


@dataclass(frozen=True, eq=False)
class Martingale:
    """A gambler's money after a step, of one stream or of many at once.

    Attributes:
        step: how many there were.
        staked: ``[…, N_BETS]`` on each bet.
    """

    step: int
    staked: NDArray[np.float64]

    @classmethod
    def begin(cls, streams: tuple[int, ...] = ()) -> Self:
        """1, all of it in reserve."""
        return cls(0, np.zeros((*streams, N_BETS)))

    def after(self, p_values: ArrayLike) -> "Martingale":
        """After one more step, with the p-values ``[…]`` of its rows."""
        fresh = _reserve(self.step) - _reserve(self.step + 1)
        staked = (self.staked + fresh / N_BETS) * fair_bets(p_values)
        return Martingale(
            self.step + 1, np.minimum(staked, _MOST_MONEY)
        )  # or it would be infinite, long after the alarm

    @property
    def value(self) -> NDArray[np.float64]:
        """``[…]`` the martingale."""
        return np.asarray(_reserve(self.step) + self.staked.sum(axis=-1))


def _reserve(step: int) -> float:
    return math.log(2) / math.log(step + 2)


def rows_to_notice(share: float, alpha: float) -> int:
    """Fewest calibration rows with which a share of OOD from the first image on can be noticed at all.

    Of rows with that share of OOD on top of all ID so many hold none with probability α; however long the stream is,
    no test that calls an ID stream drifting with probability α tells more.

    >>> rows_to_notice(0.05, 0.01), rows_to_notice(0.3, 0.01)
    (90, 13)
    """
    return math.ceil(math.log(alpha) / math.log1p(-share))


@dataclass
class StreamState:
    """All that a stream leaves behind; numbers and lists, for JSON.

    Attributes:
        steps: rows seen.
        flagged: of these above the threshold.
        counts: rows seen in each cell.
        staked: money on each bet.
        alarm_at: step of the alarm; None before it.
    """

    steps: int
    flagged: int
    counts: list[int]
    staked: list[float]
    alarm_at: int | None = None


@dataclass(frozen=True)
class StreamReport:
    """What is known of a stream after a row.

    Attributes:
        step: of the row, from 1.
        score: the row's; higher = more OOD.
        p_value: the row's among the calibration rows.
        decision: ``"ID"``, ``"OOD"`` or ``"unknown"``.
        ood_share: of all rows so far, as far as OOD scores above the threshold: what it flags beyond the false alarms
            that are expected. None without a threshold.
        ood_share_lo: lower end of its 95 % interval, for these rows and these calibration rows.
        ood_share_hi: upper end.
        log10_evidence: logarithm of the martingale.
        drift: whether it ever reached 1 / α.
        drift_at: at which step; None where it did not.
    """

    step: int
    score: float
    p_value: float
    decision: str
    ood_share: float | None
    ood_share_lo: float | None
    ood_share_hi: float | None
    log10_evidence: float
    drift: bool
    drift_at: int | None


class DriftMonitor:
    """Watches a stream of scores, one after the other.

    Places within cells are drawn by seed and step alone: from the same state the same rows give the same values.

    Attributes:
        state: all that it remembers.
        threshold: a row above it is flagged.

    Args:
        calibration: ``[n]`` scores of the calibration rows, higher = more OOD.
        alpha: probability of a false alarm ever.
        seed: of the places.
        state: of a stream that goes on; None begins one.
        strict: whether the martingale compares the stream with itself alone, and the calibration rows only say where
            cells end. Rows of a stream are scored by one function, so that ``alpha`` is exact then even where the
            calibration rows were scored by another; what is there from the first row on is not noticed.

    Raises:
        InputError: no calibration scores, NaN or inf, ``alpha`` outside (0, 1), a state of other calibration rows.
    """

    def __init__(
        self,
        calibration: ArrayLike,
        alpha: float = 0.01,
        seed: int = 0,
        state: StreamState | None = None,
        strict: bool = False,
    ) -> None:
        if not 0 < alpha < 1:
            raise InputError(f"alpha = {alpha} given, must be a probability between 0 and 1")
        self._calibration = np.sort(checked_scores(calibration, "calibration"))
        self._cells = ScoreCells.of(self._calibration)
        self.threshold = threshold_at(self._calibration)
        self._alpha, self._seed = alpha, seed
        self.state = state or StreamState(0, 0, [0] * len(self._cells.rows), [0.0] * N_BETS)
        if len(self.state.counts) != len(self._cells.rows):
            raise InputError("the state is that of a stream beside other calibration rows")
        self._rows = np.array(self.state.counts, dtype=np.int64) + (0 if strict else self._cells.rows)

    def update(self, score: float) -> StreamReport:
        """One more row.

        Raises:
            InputError: NaN or inf.
        """
        (p_value,) = conformal_p_values([score], self._calibration).tolist()
        state, cell = self.state, int(self._cells.cell(score))
        place = 1 - np.random.Generator(np.random.Philox(key=self._seed, counter=state.steps)).random()
        martingale = Martingale(state.steps, np.array(state.staked)).after(online_p_values(self._rows, cell, place))
        self._rows[cell] += 1
        state.counts[cell] += 1
        state.steps, state.staked = martingale.step, martingale.staked.tolist()
        if state.alarm_at is None and self._evidence >= -math.log(self._alpha):
            state.alarm_at = state.steps
        decision = self.threshold.decide(score)
        state.flagged += decision == "OOD"
        share, lo, hi = self.ood_share()
        return StreamReport(
            step=state.steps,
            score=score,
            p_value=p_value,
            decision=decision,
            ood_share=share,
            ood_share_lo=lo,
            ood_share_hi=hi,
            log10_evidence=self.log10_evidence,
            drift=state.alarm_at is not None,
            drift_at=state.alarm_at,
        )

    @property
    def _evidence(self) -> float:
        return math.log(Martingale(self.state.steps, np.array(self.state.staked)).value)

    @property
    def log10_evidence(self) -> float:
        """Logarithm of the martingale so far."""
        return self._evidence / math.log(10)

    def ood_share(self) -> tuple[float, float, float] | tuple[None, None, None]:
        """Share of OOD so far with the ends of its interval; None without a threshold, and before the first row.

        Conservative: what is flagged and what is flagged by mistake are each taken at the ends of their intervals.
        """
        alarms = self.threshold.false_alarms
        if alarms is None or not self.state.steps:
            return None, None, None
        n, k = self.state.steps, self.state.flagged
        lo = float(betaincinv(k, n - k + 1, _TAIL)) if k else 0.0  # Clopper and Pearson, Biometrika 1934
        hi = float(betaincinv(k + 1, n - k, 1 - _TAIL)) if k < n else 1.0
        above = round(alarms.expected * (self.threshold.n + 1))
        false_lo, false_hi = betaincinv(above, self.threshold.n + 1 - above, [_TAIL, 1 - _TAIL]).tolist()
        return (
            _beyond(k / n, alarms.expected),
            _beyond(lo, false_hi),
            _beyond(hi, false_lo),
        )


def _beyond(flagged: float, false: float) -> float:
    """Share of OOD, all of it flagged, that makes false alarms so many."""
    return max(0.0, (flagged - false) / (1 - false))
