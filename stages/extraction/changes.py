"""What is new, gone or changed between the images of now and those that a cache was sealed with."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from cache import (
    CacheDamagedError,
    CacheError,
    CacheInvalidError,
    CacheNotFoundError,
    FeatureCache,
    FeatureSpec,
    InputTable,
    Place,
    find_caches,
    sha256,
)
from stages.inputs.images import ImageError, SampleTable, is_overcome
from stages.progress import MOMENT, NullProgress, Progress

_READERS = 8  # threads that read files to compare their bytes: a network disk answers slowly


@dataclass(frozen=True, eq=False)
class Changes:
    """How the images of now differ from those that a cache was sealed with.

    Attributes:
        cache: the sealed version.
        rows: [n] int64, the row in `cache` of each image of now; -1 where it has none that is still true.
        new, changed, gone, relabelled: how many images, by what happened to them.
        decodable: how many failed for want of a library that is installed now.
        same_classes: whether the classes are numbered as they were.
    """

    cache: FeatureCache
    rows: NDArray[np.int64]
    new: int
    changed: int
    gone: int
    relabelled: int
    decodable: int
    same_classes: bool

    @property
    def fresh(self) -> bool:
        """Whether the cache is what an extraction would make."""
        return self.same_classes and not (self.new or self.changed or self.gone or self.relabelled or self.decodable)

    @property
    def to_extract(self) -> int:
        """How many images an extraction would compute."""
        return int((self.rows < 0).sum())

    def __str__(self) -> str:
        parts = {
            "new": self.new,
            "changed": self.changed,
            "gone": self.gone,
            "relabelled": self.relabelled,
            "decodable now": self.decodable,
        }
        counts = ", ".join(f"{n} {name}" for name, n in parts.items() if n) or "other classes"
        return f"{counts} since {self.cache.path}"


def listing_of(samples: SampleTable) -> InputTable:
    """The images as a cache lists them, nothing read yet."""
    return InputTable.listing(samples.ids, samples.labels, np.maximum(samples.sizes, 0), samples.mtimes_ns)


def compare_versions(
    name: str,
    samples: SampleTable,
    spec: FeatureSpec,
    root: Place,
    *,
    rehash: bool = False,
    progress: Progress | None = None,
) -> Changes | None:
    """Compare the images with the sealed versions of a set's cache, and with caches of the same images by other names.

    Images of equal size and time count as equal; of others, and of all where `rehash` is set, the bytes are compared.

    Returns:
        A cache that is fresh; or else how the newest version differs; None where nothing is sealed.
    """
    images = ImagesOfNow(samples, rehash, progress or NullProgress())
    newest = None
    own = find_caches(root, name, spec)
    for path in reversed(own):
        try:
            changes = images.changes_since(FeatureCache.open(path, spec))
        except CacheNotFoundError:  # not finished
            continue
        if changes.fresh:
            return changes
        newest = newest or changes
    for path in find_caches(root, None, spec):
        if path not in own and (found := _same_elsewhere(path, images, spec)):
            return found
    return newest


def _same_elsewhere(path: Place, images: "ImagesOfNow", spec: FeatureSpec) -> Changes | None:
    """What a cache of another set's name holds, where it is sealed and holds these very images; else None."""
    samples = images.samples
    with suppress(CacheError):  # unfinished or damaged: it is not this set's, so nothing is to be said of it
        cache = FeatureCache.open(path, spec)
        if cache.manifest.n_inputs == len(samples) and cache.inputs().ids == samples.ids:
            changes = images.changes_since(cache)
            return changes if changes.fresh else None
    return None


class ImagesOfNow:
    """The images of a set, to compare with caches; the bytes of each are read once, however many caches there are.

    Args:
        samples: the images.
        rehash: compare all bytes, not only those of images whose size or time differs.
        progress: counts the images that are read.
    """

    def __init__(self, samples: SampleTable, rehash: bool, progress: Progress) -> None:
        self.samples = samples
        self._rehash = rehash
        self._progress = progress
        self._digests: dict[int, bytes] = {}

    def changes_since(self, cache: FeatureCache) -> Changes:
        """How they differ from the inputs of a cache.

        Raises:
            CacheDamagedError: the cache's listing is.
        """
        sealed, samples, listing = cache.inputs(), self.samples, listing_of(self.samples)
        places = _places(sealed, listing)
        known = places >= 0
        changed = self._changed(sealed, listing, places)
        # Row of each input; what failed fails again.
        numbers = np.where(sealed.failed, -1, np.cumsum(~sealed.failed) - 1)
        same, at = known & ~changed, places[known]
        rows = np.full(len(listing), -1, np.int64)
        rows[same] = numbers[places[same]]
        before, now = (np.array([*names, ""]) for names in (cache.class_names, samples.class_names))  # [-1]: unknown
        return Changes(
            cache,
            rows,
            new=int((~known).sum()),
            changed=int(changed.sum()),
            gone=len(sealed) - int(known.sum()),
            decodable=int((~changed[known] & _decodable(cache, sealed)[at]).sum()),
            relabelled=int((before[sealed.labels[at]] != now[listing.labels[known]]).sum()),
            same_classes=cache.class_names == samples.class_names,
        )

    def _changed(self, sealed: InputTable, listing: InputTable, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which images [n] have other bytes than the inputs at these places of a cache."""
        known = places >= 0
        suspect = known & (self._rehash | (self.samples.sizes < 0))
        at = places[known]
        suspect[known] |= (
            (sealed.sizes[at] != listing.sizes[known])
            | (sealed.mtimes_ns[at] != listing.mtimes_ns[known])
            | ~sealed.sha256[at].any(axis=1)  # what could not be opened may be readable now, without being touched
        )
        self._read_digests(np.flatnonzero(suspect))
        changed = np.zeros(len(listing), np.bool_)
        for index in np.flatnonzero(suspect).tolist():
            changed[index] = self._digests[index] != sealed.sha256[places[index]].tobytes()
        return changed

    def _read_digests(self, rows: NDArray[np.intp]) -> None:
        unread = [index for index in rows.tolist() if index not in self._digests]
        if not unread:
            return
        reader, todo = self.samples.reader(), iter(unread)

        def digest(index: int) -> tuple[int, bytes]:
            try:
                return index, bytes.fromhex(sha256(reader.read(index)))
            except ImageError:
                return index, bytes(32)

        self._progress.start(len(unread), "input", f"compare the bytes of {self.samples.source}", MOMENT)
        with ThreadPoolExecutor(_READERS) as pool:
            while batch := list(islice(todo, 64 * _READERS)):
                self._digests |= dict(pool.map(digest, batch))
                self._progress.advance(len(batch))
        self._progress.close()


def _places(sealed: InputTable, listing: InputTable) -> NDArray[np.int64]:
    """[n] where each listed input stands among those of a cache; -1 where it does not."""
    if sealed.ids == listing.ids:
        return np.arange(len(listing))
    place_of = {id_: place for place, id_ in enumerate(sealed.ids)}
    return np.array([place_of.get(id_, -1) for id_ in listing.ids], np.int64)


def _decodable(cache: FeatureCache, sealed: InputTable) -> NDArray[np.bool_]:
    """Which inputs [n] of a cache failed for want of a library that is installed now."""
    overcome = set[str]()
    if sealed.failed.any():
        with suppress(CacheDamagedError, CacheInvalidError):  # of the list of failures: it costs no row
            overcome = {failure.id for failure in cache.failures() if is_overcome(failure.reason)}
    return np.fromiter((id_ in overcome for id_ in sealed.ids), np.bool_, len(sealed))


def without_damage(changes: Changes, progress: Progress) -> Changes:
    """The same changes, but with what a damaged shard holds to be computed: no flipped bit is ever sealed as sound."""
    if not (changes.rows >= 0).any():
        return changes
    cache, rows = changes.cache, changes.rows.copy()
    progress.start(len(cache.manifest.shards), "shard", f"verify {cache.path.name}")
    damaged = {damage.file for damage in cache.verify(lambda n_bytes: progress.advance())}
    progress.close()
    for shard in cache.manifest.shards:
        if shard.name in damaged:
            progress.note(f"{cache.path / shard.name} is damaged: nothing is taken over from it")
            rows[(rows >= shard.start) & (rows < shard.start + shard.rows)] = -1
    return replace(changes, rows=rows)
