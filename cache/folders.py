"""Where caches stand under their root: ``<set>-<fingerprint8>``, and ``-2``, ``-3``, … after the first version."""

import re
from pathlib import Path

from cache.manifest import COPY, MANIFEST, check_dataset_name
from cache.spec import FeatureSpec
from cache.unfinished import PLAN, is_blank


def find_caches(root: str | Path, dataset: str | None, spec: FeatureSpec) -> list[Path]:
    """Caches of a set under a root, sealed or not, for one spec: ``<set>-<fingerprint8>[-<version>]``, newest last.

    Args:
        root: folder of all caches.
        dataset: name of the set; None finds those of every name.
        spec: what their features are.

    Raises:
        CacheInvalidError: the set's name cannot be part of a folder's name.
    """
    folders = (path for _, path in _versions(root, dataset, spec))
    return [path for path in folders if any((path / name).exists() for name in (MANIFEST, COPY, PLAN))]


def next_cache_path(root: str | Path, dataset: str, spec: FeatureSpec) -> Path:
    """Where the next version of a cache goes: the name after all that are taken.

    Raises:
        CacheInvalidError: the set's name cannot be part of a folder's name.
    """
    taken = [version for version, path in _versions(root, dataset, spec) if not is_blank(path)]
    base = f"{dataset}-{spec.fingerprint:.8}"
    return Path(root) / (f"{base}-{max(taken) + 1}" if taken else base)


def _versions(root: str | Path, dataset: str | None, spec: FeatureSpec) -> list[tuple[int, Path]]:
    if dataset is not None:
        check_dataset_name(dataset)
    name = ".+" if dataset is None else re.escape(dataset)
    pattern = re.compile(f"{name}-{spec.fingerprint:.8}" + r"(?:-([2-9]|[1-9][0-9]+))?")
    folders = [path for path in Path(root).iterdir() if path.is_dir()] if Path(root).is_dir() else []
    matches = ((pattern.fullmatch(path.name), path) for path in folders)
    return sorted((int(match[1] or 1), path) for match, path in matches if match)
