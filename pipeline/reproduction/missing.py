"""What runs need and is not there: said before any work, a line each."""

import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from pipeline.config import RunConfig
from stages.config import BackboneConfig


def missing_things(configs: Mapping[str, RunConfig], data: Path) -> dict[str, list[str]]:
    """Files, folders and weights that are not there, in words, and the names of the runs that need each.

    Args:
        configs: the runs by name.
        data: where weights may be put that the hub does not give.
    """
    weights = cache(_unreachable)
    found: dict[str, dict[str, None]] = {}
    for run, config in configs.items():
        for what in _of_sets(config):
            found.setdefault(what, {})[run] = None
        if config.backbone is not None and (reason := weights(config.backbone, data)) is not None:
            found.setdefault(reason, {})[run] = None
    return {what: list(runs) for what, runs in found.items()}


def _of_sets(config: RunConfig) -> Iterator[str]:
    """Paths of sets; of a pattern nobody can say whether a file of it is missing."""
    for entry in config.sets:
        for path in (entry.images, entry.features, entry.root, entry.classes):
            if isinstance(path, str) and os.path.isabs(path) and not set(path) & set("*?[{"):
                yield from () if os.path.exists(path) else (path,)


def _unreachable(backbone: BackboneConfig, data: Path) -> str | None:
    from stages.networks.weights.loading import why_unreachable  # and torch, once the file has been read

    reason = why_unreachable(backbone)
    if reason is None:
        return None
    if backbone.weights == "hub":
        reason = f"the hub gives none ({reason}), and there is no {data / 'weights' / backbone.name}.safetensors"
    return f"weights of {backbone.name}: {reason}"
