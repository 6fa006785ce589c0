"""Which caches stand under a root already that an extraction would go on with, but for its batch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cache import FeatureSpec, find_caches


def as_begun(spec: FeatureSpec, root: Path, batches: Sequence[int]) -> FeatureSpec:
    """The spec with the batch that caches of these features have, begun or sealed, of whatever set.

    A GPU's memory, with more or less of it in use, may give another number of images a pass than the day before. Caches
    that are there decide: sets of a study are compared, so they must have one spec.

    Args:
        spec: as it would be chosen now.
        root: folder of all caches.
        batches: `Backbone.batches`: numbers that the choice may have had; the first is the spec's own.
    """
    for batch in batches:
        candidate = replace(spec, compute={**spec.compute, "batch": batch})
        if find_caches(root, None, candidate):
            return candidate
    return spec
