"""Errors of the cache.

CacheError                   the cache could not do its work
├── CacheNotFoundError       no sealed cache stands there
├── CacheMismatchError       it was made from something else; names the first field that differs
├── CacheDamagedError        bytes are not those that were sealed
├── CacheInvalidError        a value that no cache has: hostile, unreadable, or of another schema
├── CacheBusyError           another process is filling it
└── CacheUnreachableError    the store that it is in does not answer, or refuses; says nothing of the cache
"""


class CacheError(Exception):
    """The cache could not do its work; the message says what is wrong, where, and what to do."""


class CacheNotFoundError(CacheError):
    """No sealed cache stands at this path."""


class CacheMismatchError(CacheError):
    """The cache was made from something else than what is asked for."""


class CacheDamagedError(CacheError):
    """Bytes on disk are not those that were sealed."""


class CacheInvalidError(CacheError):
    """A description of a cache that cannot be true, cannot be read, or belongs to another schema."""


class CacheBusyError(CacheError):
    """Another process is filling the cache."""


class CacheUnreachableError(CacheError):
    """An object store does not answer, or refuses: no connection, bucket, credentials, permission or client."""
