"""How many principal components to keep."""

import numpy as np

from stages.scorers.shared.moments import Matrix


def explaining(lengths: Matrix, share: float) -> int:
    """How many of the largest variances add up to a share of all, at least one.

    Args:
        lengths: [r] variances along the components, or a multiple of them; descending.
        share: of their sum, in (0, 1].

    >>> explaining(np.array([6.0, 3.0, 1.0]), 0.9)
    2
    """
    explained = np.cumsum(lengths)
    # Less a rounding, or a share of 1 might never be reached.
    return int(np.searchsorted(explained, share * explained[-1] * (1 - 1e-12))) + 1
