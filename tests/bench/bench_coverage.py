"""What thresholds admit of new ID rows, by simulation: ``python -m tests.bench.bench_coverage``.

Per cent of new rows at or below the threshold for 95 %, the mean over studies with its standard error, for each score
and number of rows a class; and in how many cases the 95 % interval of the threshold held that of all new rows.
Exchangeable scores would admit what the first line says. With ``--mixture`` scores of a mixture trained on the features
(frozen experts, so that every score has one), with ``--adapter`` of one whose experts are trained too.
"""

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np

from stages.config import ScoreConfig, TrainConfig
from stages.detection.frozen import FrozenFeatures
from tests.test_stages.drawn_studies import OF_FEATURES, OF_MIXTURES, PARAMS, Judged, Key, World, make_study


def judged(per_class: int, seed: int, dim: int, mixture: str | None) -> dict[Key, Judged]:
    """All detectors of one study."""
    with tempfile.TemporaryDirectory() as folder:
        study = make_study(World(seed, dim=dim), per_class, Path(folder))
        config = ScoreConfig(scores=OF_FEATURES, k=3, params=PARAMS)
        if mixture is None:
            return study.judged(FrozenFeatures(study.source), config)
        train = TrainConfig.model_validate({"expert": mixture, "experts": 2})
        refined = study.refined(train, seed, Path(folder) / "mixture")
        return study.judged(refined, config.model_copy(update={"scores": OF_MIXTURES}))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=20)
    parser.add_argument("--per-class", type=int, nargs="+", default=[5, 10, 20, 100])
    parser.add_argument("--dim", type=int, default=8)
    parser.add_argument("--mixture", action="store_const", const="frozen")
    parser.add_argument("--adapter", action="store_const", const="adapter", dest="mixture")
    given = parser.parse_args()
    columns: dict[int, list[dict[Key, Judged]]] = {
        n: [judged(n, seed, given.dim, given.mixture) for seed in range(given.studies)] for n in given.per_class
    }
    print("| score | head | calibrated |", " | ".join(f"{n} rows a class" for n in columns), "|")
    print("|---|---|---|" + "---:|" * len(columns))
    calibrated = {n: next(iter(found[0].values())).estimate.n for n, found in columns.items()}
    exact = [f"{100 * math.ceil(0.95 * (n + 1)) / (n + 1):.1f} of n = {n}" for n in calibrated.values()]
    print("| exchangeable | | |", " | ".join(exact), "|")
    for key in next(iter(columns.values()))[0]:
        cells = []
        for found in columns.values():
            shares = [100 * study[key].admitted for study in found]
            held = np.mean([study[key].interval_holds for study in found])
            error = np.std(shares, ddof=1) / math.sqrt(len(shares)) if len(shares) > 1 else math.nan
            cells.append(f"{np.mean(shares):.1f} ± {error:.1f} ({100 * held:.0f})")
        print(f"| {key[0]} | {key[1]} | {'yes' if key[2] else ''} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
