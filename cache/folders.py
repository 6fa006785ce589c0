"""Where caches stand under their root: ``<set>-<fingerprint8>``, and ``-2``, ``-3``, … after the first version."""

import re
from collections.abc import Sequence

from cache.manifest import COPY, MANIFEST, check_dataset_name
from cache.remote import Place, RemotePath, place
from cache.spec import FeatureSpec
from cache.unfinished import PLAN, is_blank


def find_caches(root: str | Place, dataset: str | None, spec: FeatureSpec) -> list[Place]:
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


def next_cache_path(root: str | Place, dataset: str, spec: FeatureSpec) -> Place:
    """Where the next version of a cache goes: the name after all that are taken.

    Raises:
        CacheInvalidError: the set's name cannot be part of a folder's name.
    """
    taken = [version for version, path in _versions(root, dataset, spec) if not is_blank(path)]
    base = f"{dataset}-{spec.fingerprint:.8}"
    return place(root) / (f"{base}-{max(taken) + 1}" if taken else base)


def _versions(root: str | Place, dataset: str | None, spec: FeatureSpec) -> list[tuple[int, Place]]:
    if dataset is not None:
        check_dataset_name(dataset)
    name = ".+" if dataset is None else re.escape(dataset)
    pattern = re.compile(f"{name}-{spec.fingerprint:.8}" + r"(?:-([2-9]|[1-9][0-9]+))?")
    matches = ((pattern.fullmatch(path.name), path) for path in _folders_in(place(root)))
    found = [(int(match[1] or 1), path) for match, path in matches if match]
    return sorted(found, key=lambda version: (version[0], version[1].name))


def _folders_in(root: Place) -> Sequence[Place]:
    if isinstance(root, RemotePath):
        return root.folders()
    return [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
