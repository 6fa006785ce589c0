"""What runs need and is not there: said before any work, a line each."""

import os
from collections.abc import Iterator, Mapping
from functools import cache

from pipeline.config import RunConfig
from stages.config import BackboneConfig


def missing_things(configs: Mapping[str, RunConfig]) -> dict[str, list[str]]:
    """Files, folders and weights that are not there, in words, and the names of the runs that need each.

    Args:
        configs: the runs by name.
    """
    weights = cache(_unreachable)
    found: dict[str, list[str]] = {}
    for run, config in configs.items():
        for what in _of_sets(config):
            found.setdefault(what, []).append(run)
        if config.backbone is not None and (reason := weights(config.backbone)) is not None:
            found.setdefault(reason, []).append(run)
    return found


def _of_sets(config: RunConfig) -> Iterator[str]:
    """Paths of sets; of a pattern nobody can say whether a file of it is missing."""
    for entry in config.sets:
        for key in ("images", "features", "root", "classes"):
            path = getattr(entry, key)
            if (
                isinstance(path, str)
                and os.path.isabs(path)
                and not set(path) & set("*?[{")
                and not os.path.exists(path)
            ):
                yield f"{path} ({key} of set {entry.name})"


def _unreachable(backbone: BackboneConfig) -> str | None:
    from stages.networks.weights.loading import why_unreachable  # and torch, once the file has been read

    reason = why_unreachable(backbone)
    return None if reason is None else f"weights of {backbone.name}: {reason}"
