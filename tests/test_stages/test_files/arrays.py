"""Named arrays of the kinds that are stored, and whether two sets of them are the same."""

import numpy as np

TENSORS = {
    "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "expert": np.array([-1, 2], dtype=np.int64),
    "half": np.array([[0.5]], dtype=np.float16),
    "none": np.zeros((0, 5), dtype=np.float32),
    "bias": np.array([0.0, -np.inf], dtype=np.float32),
}


def same(ours, theirs) -> bool:
    """By names, types and values."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name]) for name in ours
    )
