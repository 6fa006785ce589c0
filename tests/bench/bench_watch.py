"""How often `watch` calls a stream of ID images drifting, and how soon one with OOD.

``python -m tests.bench.bench_watch``. Scores of ID images are drawn from N(0, 1), of OOD from N(3, 1): AUROC 98.3 %.
A false alarm is an alarm at any of all steps of a stream of ID images. The delay is counted in images from the first
that may be OOD.

Of a sum of two scores, the calibration rows are each on the scales of the rows that were not left out with it, and the
stream on those of all: what `watch` says of it holds nearly, and ``--strict`` makes it exact.
"""

import argparse
import itertools
import math

import numpy as np
from numpy.typing import NDArray

from stages.detection.detectors import Scales
from stages.detection.drift import Martingale, ScoreCells, online_p_values
from stages.id_data.split import N_PARTS

ALPHA = 0.01
SHIFT = 3.0
SHARES = (0.05, 0.1, 0.3)
SIZES = (77, 400, 2000)  # calibration rows
BEGINNINGS = (0, 1000, 10_000)  # ID images before the drift
PATIENCE = 5000  # images after which a drift that was not noticed is given up
_BLOCK = 500  # steps that are drawn at once


def alarms(
    n: int,
    runs: int,
    steps: int,
    begins: int = 0,
    share: float = 0.0,
    seed: int = 0,
    ties: bool = False,
    summed: bool = False,
) -> NDArray[np.float64]:
    """``[runs]`` step at which each stream is called drifting, from 1; inf where it is not.

    Args:
        n: calibration rows.
        runs: streams, each with calibration rows of its own.
        steps: of each stream.
        begins: steps before the first that may be OOD.
        share: of OOD from then on.
        seed: of all scores.
        ties: whether scores are whole numbers.
        summed: whether scores are sums of two, on scales that the calibration rows set.
    """
    rng = np.random.default_rng(seed)
    scores = np.round if ties else np.asarray
    known = [calibrated_sum(rng, n) if summed else (rng.normal(size=n), 0.0, 1.0) for _ in range(runs)]
    mean, deviation = (np.array(column)[:, None] for column in list(zip(*known, strict=True))[1:])
    # As many calibration rows for each stream give as many cells, unless they tie.
    cells = [ScoreCells.of(scores(own)) for own, _, _ in known]
    rows = np.zeros((runs, max(len(own.rows) for own in cells)), dtype=np.int64)
    for stream, own in enumerate(cells):
        rows[stream, : len(own.rows)] = own.rows
    martingale, found, each = Martingale.begin((runs,)), np.full(runs, math.inf), np.arange(runs)
    for start in range(0, steps, _BLOCK):
        some = np.arange(start, min(start + _BLOCK, steps))
        drawn = mean + deviation * rng.normal(size=(runs, len(some)))
        drawn += SHIFT * ((rng.random(drawn.shape) < share) & (some >= begins))
        cell = np.stack([own.cell(scores(mine)) for own, mine in zip(cells, drawn, strict=True)])
        places = 1 - rng.random(cell.shape)
        for step in range(len(some)):
            martingale = martingale.after(online_p_values(rows, cell[:, step], places[:, step]))
            rows[each, cell[:, step]] += 1
            found[(martingale.value >= 1 / ALPHA) & np.isinf(found)] = martingale.step
        if np.isfinite(found).all():
            break
    return found


def calibrated_sum(rng: np.random.Generator, n: int) -> tuple[NDArray[np.float32], float, float]:
    """Scores of n calibration rows by a sum of two independent scores N(0, 1); mean and deviation of new rows'."""
    raw, part, found = rng.normal(size=(2, n)), np.arange(n) % N_PARTS, np.empty(n, np.float32)
    for number in np.unique(part):
        out = part == number
        found[out] = Scales.fit(list(raw[:, ~out]), None, 0).apply(list(raw[:, out]), None)
    final = Scales.fit(list(raw), None, 0).standardisers
    mean = -sum(own.mean / own.std for own in final)
    return found, mean, math.sqrt(sum(own.std**-2 for own in final))


def delay(n: int, begins: int, share: float, runs: int) -> str:
    """Median delay and, in brackets, that of the slowest tenth; a dash where it is not noticed."""
    found = alarms(n, runs, begins + PATIENCE, begins, share)
    late = np.sort(found[found > begins] - begins)
    middle, slow = (late[math.ceil(part * len(late)) - 1] for part in (0.5, 0.9))
    return f"{_words(middle)} ({_words(slow)})"


def _words(images: float) -> str:
    return "–" if math.isinf(images) else f"{images:.0f}"


def main() -> None:
    """Print what README.md says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--delay-runs", type=int, default=40)
    given = parser.parse_args()
    print(f"alpha = {ALPHA:g}, {given.runs} streams of {given.steps:,} ID images; drifting by mistake:")
    for n, summed in itertools.product((20, 77), (False, True)):
        found = np.isfinite(alarms(n, given.runs, given.steps, summed=summed)).sum()
        print(f"n = {n}{', a sum' if summed else ''}: {found} of {given.runs}", flush=True)
    print("| calibration rows | ID images before | " + " | ".join(f"{share:.0%} OOD" for share in SHARES) + " |")
    print("|---:|---:|" + "---:|" * len(SHARES))
    for n in SIZES:
        for begins in BEGINNINGS:
            cells = (delay(n, begins, share, given.delay_runs) for share in SHARES)
            print(f"| {n} | {begins:,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
