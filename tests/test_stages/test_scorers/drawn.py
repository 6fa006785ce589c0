"""Rows of a few classes with everything that any score reads."""

import numpy as np

from stages.heads.affine import LinearHead
from stages.id_data.taps import TapRows
from stages.scorers.inputs import ScoreInputs


def inputs(n=60, dim=8, classes=5, experts=None, seed=0, noise=0.2):
    """Rows of ``classes`` directions with noise; an expert owns the classes that are equal modulo ``experts``."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    features = np.eye(classes, dim)[labels] + rng.normal(scale=noise, size=(n, dim))
    expert = labels % experts if experts else None
    logits, others = rng.normal(size=(n, classes)), rng.uniform(size=(n, 2))
    head = LinearHead(np.eye(classes, dim) + np.linspace(0, 0.1, dim), np.linspace(-1, 1, classes))
    other = logits.mean(axis=1)
    patches = np.stack([features, features[:, ::-1]], axis=1)
    taps = TapRows.of(np.stack([features + 0.1, features * np.linspace(1, 0, dim), features], axis=1), (1, 2, 3))
    return ScoreInputs(features, logits, labels, expert, others, other, patches, head, taps)
