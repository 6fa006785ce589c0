"""What fits cost at full size: a million rows of 1536 features, 1000 classes. Nothing here is a test.

``python -m tests.bench.bench_fits [SCORE ...]``; two to three minutes a score on one core.
"""

import resource
import sys
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from stages.heads.affine import LinearHead
from stages.scorers import get_scorer
from stages.scorers.inputs import ScoreInputs

ROWS, DIM, CLASSES = 1_000_000, 1536, 1000
SCORES = ("relative-mahalanobis", "gmm", "vim")
PARAMS: dict[str, dict[str, Any]] = {"gmm": {"covariance": "shared"}}


class Drawn:
    """Rows that are made when they are read, in place of 6 GB in a memory-mapped file."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._noise = rng.standard_normal((8192, DIM), dtype=np.float32)
        self._means = rng.standard_normal((CLASSES, DIM), dtype=np.float32)
        self.shape, self.dtype, self.ndim = (ROWS, DIM), np.dtype(np.float32), 2

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, rows: Any) -> Any:
        if rows == slice(None):
            return self
        numbers = np.arange(*rows.indices(ROWS))
        return self._noise[numbers % 8192] * (1 + numbers[:, None] / np.float32(ROWS)) + self._means[numbers % CLASSES]


def main() -> None:
    """Fit each score and print the table."""
    rng = np.random.default_rng(1)
    head = LinearHead(rng.standard_normal((CLASSES, DIM), dtype=np.float32) / 20, np.zeros(CLASSES, np.float32))
    train = ScoreInputs(features=Drawn(), labels=np.arange(ROWS) % CLASSES, head=head)  # type: ignore[arg-type]
    table = Table(
        "score", "fit, CPU seconds", "peak memory of the process, GiB", title=f"{ROWS:,} x {DIM}, C = {CLASSES}"
    )
    for name in sys.argv[1:] or SCORES:
        start = time.process_time()
        get_scorer(name, **PARAMS.get(name, {})).fit(train)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        table.add_row(name, f"{time.process_time() - start:.0f}", f"{peak:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
