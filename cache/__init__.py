"""A cache of features: sealed folders of HDF5 shards with a manifest, found again by fingerprint.

``CacheBuilder`` fills a cache and seals it; ``FeatureCache`` reads it; README.md shows the states of its folder. Knows
nothing of models or of images.
"""

from cache.builder import CacheBuilder, commit_shard
from cache.errors import (
    CacheBusyError,
    CacheDamagedError,
    CacheError,
    CacheInvalidError,
    CacheMismatchError,
    CacheNotFoundError,
    CacheUnreachableError,
)
from cache.fingerprint import arrays_sha256, canonical_json, file_sha256, fingerprint, sha256
from cache.folders import find_caches, next_cache_path
from cache.inputs import Failure, InputSet, InputTable
from cache.lock import Lock
from cache.manifest import Manifest, ShardInfo, resumed_with
from cache.plan import ShardPlan, plan_shards
from cache.remote import Place, RemotePath, is_remote, place, read_ranges
from cache.repair import restore_manifest, unseal
from cache.shard import list_datasets, read_dataset
from cache.spec import FeatureSpec
from cache.store import Damage, FeatureCache

__all__ = [
    "CacheBuilder",
    "CacheBusyError",
    "CacheDamagedError",
    "CacheError",
    "CacheInvalidError",
    "CacheMismatchError",
    "CacheNotFoundError",
    "CacheUnreachableError",
    "Damage",
    "Failure",
    "FeatureCache",
    "FeatureSpec",
    "InputSet",
    "InputTable",
    "Lock",
    "Manifest",
    "Place",
    "RemotePath",
    "ShardInfo",
    "ShardPlan",
    "arrays_sha256",
    "canonical_json",
    "commit_shard",
    "file_sha256",
    "find_caches",
    "fingerprint",
    "is_remote",
    "list_datasets",
    "next_cache_path",
    "place",
    "plan_shards",
    "read_dataset",
    "read_ranges",
    "restore_manifest",
    "resumed_with",
    "sha256",
    "unseal",
]
