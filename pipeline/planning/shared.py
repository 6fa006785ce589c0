"""Into how many pieces falls what ``--workers`` share after extraction: one where the process does it by itself."""

from math import ceil

from stages.heads.sums import KEPT_BYTES, n_groups
from stages.machine import default_device
from stages.mixture.refine import PART_ROWS
from stages.scorers.neighbours.cluster import BANK_ROWS, LEAST_PAIRS, QUERIES

_FLOAT32 = 4


def pieces_of_refining(n_rows: int) -> int:
    """Of rows through the experts."""
    return max(1, ceil(n_rows / PART_ROWS))


def pieces_of_heads(n_rows: int, dim: int) -> int:
    """Of the sums over the rows of a linear head."""
    kept = n_rows * dim * _FLOAT32 <= KEPT_BYTES
    return 1 if kept or _has_gpu() else n_groups(n_rows)


def pieces_of_search(n_queries: int, n_bank: int) -> int:
    """Of a search for nearest neighbours."""
    few = n_queries * n_bank < LEAST_PAIRS
    return 1 if few or _has_gpu() else ceil(n_queries / QUERIES) * ceil(n_bank / BANK_ROWS)


def _has_gpu() -> bool:
    """Where heads and searches are computed, and handed to nobody."""
    return default_device() != "cpu"
