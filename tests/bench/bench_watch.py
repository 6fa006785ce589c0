"""How often `watch` calls a stream of ID images drifting, and how soon one with OOD.

``python -m tests.bench.bench_watch``. Scores of ID images are drawn from N(0, 1), of OOD from N(3, 1): AUROC 98.3 %.
A false alarm is an alarm at any of all steps of a stream of ID images. The delay is counted in images from the first
that may be OOD.
"""

import argparse
import math

import numpy as np
from numpy.typing import NDArray

from stages.detection.drift import Martingale, ScoreCells, online_p_values

ALPHA = 0.01
SHIFT = 3.0
SHARES = (0.05, 0.1, 0.3)
SIZES = (77, 400, 2000)  # calibration rows
BEGINNINGS = (0, 1000, 10_000)  # ID images before the drift
PATIENCE = 5000  # images after which a drift that was not noticed is given up
_BLOCK = 500  # steps that are drawn at once


def alarms(
    n: int, runs: int, steps: int, begins: int = 0, share: float = 0.0, seed: int = 0, ties: bool = False
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
    """
    rng = np.random.default_rng(seed)
    scores = np.round if ties else np.asarray
    # As many calibration rows for each stream give as many cells, unless they tie.
    cells = [ScoreCells.of(scores(rng.normal(size=n))) for _ in range(runs)]
    rows = np.zeros((runs, max(len(own.rows) for own in cells)), dtype=np.int64)
    for stream, own in enumerate(cells):
        rows[stream, : len(own.rows)] = own.rows
    martingale, found, each = Martingale.begin((runs,)), np.full(runs, math.inf), np.arange(runs)
    for start in range(0, steps, _BLOCK):
        some = np.arange(start, min(start + _BLOCK, steps))
        drawn = rng.normal(size=(runs, len(some)))
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
    for n in (20, 77):
        print(f"n = {n}: {np.isfinite(alarms(n, given.runs, given.steps)).sum()} of {given.runs}", flush=True)
    print("| calibration rows | ID images before | " + " | ".join(f"{share:.0%} OOD" for share in SHARES) + " |")
    print("|---:|---:|" + "---:|" * len(SHARES))
    for n in SIZES:
        for begins in BEGINNINGS:
            cells = (delay(n, begins, share, given.delay_runs) for share in SHARES)
            print(f"| {n} | {begins:,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
