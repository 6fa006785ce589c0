"""Features of a pilot's rows: read from caches that are fresh, from given arrays, or extracted from some images."""

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache import FeatureCache, FeatureSpec, InputSet, InputTable, Place, commit_shard, plan_shards
from pipeline.planning.clock import Clock
from pipeline.planning.sample import PilotSet
from stages.errors import InputError
from stages.extract import ExtractOptions, extract_set
from stages.extraction.fill import begin_version, made_with
from stages.id_data.split import rows_by_class
from stages.inputs.arrays import ArrayTable
from stages.inputs.images import SampleTable
from stages.networks.backbone import Backbone

_WARM_UP = 32  # images that nothing is timed by: kernels are chosen, threads started
_FEWEST = 64  # images to time by
_JITTER = 0.1  # of a feature's deviation, where rows stand for others
_DRAWN = 256  # images that are drawn, where there are none; more would only be the same again
_WIDTH, _HEIGHT = 500, 375  # pixels of these, as ImageNet's have on average

Features = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Pool:
    """Features of the first rows that are wanted of a set; where more are asked for, they stand for others as well.

    Attributes:
        features: ``[m, …]`` each, as a cache stores them.
        digests: ``[m, 32]`` uint8.
        labels: ``[m]`` of these rows.
    """

    features: Features
    digests: NDArray[np.uint8]
    labels: NDArray[np.int32]

    def take(self, rows: PilotSet) -> "Pool":
        """Rows by their numbers among those wanted; those beyond the last are copies of their class."""
        m = len(self.digests)
        copies = np.flatnonzero(rows.wanted >= m)
        source, by_class = rows.wanted.copy(), dict(rows_by_class(self.labels))
        for place in copies:
            same = by_class.get(int(rows.labels[place]))
            source[place] = rows.labels[place] % m if same is None else same[rows.wanted[place] % len(same)]
        features, digests = {name: values[source] for name, values in self.features.items()}, self.digests[source]
        rng = np.random.default_rng(0)
        for name in {"cls", "tap_cls"} & features.keys():
            values = features[name][copies].astype(np.float32)
            noise = rng.standard_normal(values.shape, dtype=np.float32)
            features[name][copies] = values + noise * (_JITTER * float(self.features[name].astype(np.float32).std()))
        digests[copies] = rng.integers(0, 256, (len(copies), 32), dtype=np.uint8)
        return Pool(features, digests, rows.labels)


def of_cache(cache: FeatureCache, rows: NDArray[np.int64], labels: NDArray[np.int32]) -> Pool:
    """Rows of a cache that is there, and their labels in the pilot."""
    ordered = np.sort(rows)
    back = np.searchsorted(ordered, rows)
    features = {name: np.asarray(cache.read(name, ordered))[back] for name in cache.spec.datasets()}
    return Pool(features, np.asarray(cache.image_hashes)[rows], labels)


def of_arrays(arrays: ArrayTable, wanted: PilotSet, spec: FeatureSpec) -> Pool:
    """Rows of features that were given."""
    read = [arrays.read(row, row + 1, spec) for row in wanted.rows.tolist()]
    features = {name: np.concatenate([values[name] for values, _ in read]) for name in spec.datasets()}
    return Pool(features, np.concatenate([digests for _, digests in read]), wanted.labels)


def write_cache(root: Place, name: str, rows: PilotSet, pool: Pool, spec: FeatureSpec) -> FeatureCache:
    """A sealed cache of a pilot's rows, under a root of its own."""
    n = len(rows)
    taken = pool.take(rows)
    listing = InputTable.listing(rows.ids, rows.labels, np.zeros(n), np.zeros(n))
    plans = plan_shards(n, spec.row_bytes)
    with begin_version(root, InputSet(name, listing, rows.class_names), spec, plans, made_with()) as builder:
        for plan in plans:
            some = slice(plan.start, plan.stop)
            read = listing[some].with_results(taken.digests[some], np.zeros(len(plan), np.bool_))
            commit_shard(builder.path, plan, {key: values[some] for key, values in taken.features.items()}, read, [])
        return builder.seal({})


# --------------------------------------------------------------------------------------------------------- from images


@dataclass(frozen=True)
class Extracted:
    """Some images through the network, as stage one does it.

    Attributes:
        sets: rows that are wanted, without those whose image cannot be used.
        pools: features, by the names of the sets.
        seconds: of an image, over all sets in their shares.
    """

    sets: dict[str, PilotSet]
    pools: dict[str, Pool]
    seconds: float


def of_images(
    sets: Mapping[str, PilotSet],
    tables: Mapping[str, SampleTable],
    network: Backbone,
    spec: FeatureSpec,
    seconds: float,
) -> Extracted:
    """Extract images of all sets, as many as the time allows: really decoded, by the study's own network.

    Args:
        sets: rows that are wanted, of each set in the order in which they are wanted.
        tables: what the sets hold.
        network: that makes the features.
        spec: what these are.
        seconds: that it may take, about.

    Raises:
        InputError: of a set no image can be used.
    """
    wanted = {name: tables[name].take(own.rows) for name, own in sets.items()}
    total = sum(map(len, wanted.values()))
    with TemporaryDirectory(prefix="plan-") as scratch:
        root, ends = Path(scratch), time.monotonic() + seconds
        shares = _shares(wanted, _WARM_UP)
        cache, took = _timed(_together(wanted, shares), "warm", network, spec, root / "warm")
        for name, least in (("first", _FEWEST), ("all", total)):
            left = (ends - time.monotonic()) / took * cache.manifest.n_inputs  # images that there is time for
            more = _shares(wanted, int(min(least, left)))
            if left < _FEWEST or more == shares:
                break
            shares = more
            cache, took = _timed(_together(wanted, shares), name, network, spec, root / name)
        kept, pools = _split(cache, sets, shares)
        return Extracted(kept, pools, took / cache.manifest.n_inputs)


def _timed(
    samples: SampleTable, name: str, network: Backbone, spec: FeatureSpec, root: Path
) -> tuple[FeatureCache, float]:
    clock = Clock()
    options = ExtractOptions(max_failures=1.0, progress=clock)
    cache = extract_set(name, samples, spec, root, lambda: network, options=options)
    return cache, clock.taken("extract")["extract"].seconds


def _shares(wanted: Mapping[str, SampleTable], n: int) -> dict[str, int]:
    """How many images of each set, of n in all: as many of each as it is large, and one at least."""
    total = sum(map(len, wanted.values()))
    return {name: min(len(own), max(1, round(n * len(own) / total))) for name, own in wanted.items()}


def _together(wanted: Mapping[str, SampleTable], shares: Mapping[str, int]) -> SampleTable:
    """The first images of all sets as one."""
    parts = [own.part(0, shares[name]) for name, own in wanted.items()]
    n = sum(map(len, parts))
    return replace(
        parts[0],
        source="a sample of all sets",
        ids=tuple(f"{number:08d}" for number in range(n)),
        labels=np.full(n, -1, np.int32),
        class_names=(),
        sizes=np.concatenate([part.sizes for part in parts]),
        mtimes_ns=np.concatenate([part.mtimes_ns for part in parts]),
        contents=[content for part in parts for content in part.contents],
    )


def _split(
    cache: FeatureCache, sets: Mapping[str, PilotSet], shares: Mapping[str, int]
) -> tuple[dict[str, PilotSet], dict[str, Pool]]:
    """What was extracted, by the sets that it is of."""
    number = np.array([int(name) for name in cache.ids], np.int64)  # of those that can be used
    kept, pools, start = {}, {}, 0
    for name, n in shares.items():
        rows = np.flatnonzero((number >= start) & (number < start + n))
        if not len(rows):
            raise InputError(f"set {name!r}: none of {n} images can be used: run make extract, which says why")
        failed = np.setdiff1d(np.arange(n), number[rows] - start)
        own = sets[name].at(np.setdiff1d(np.arange(len(sets[name])), failed))
        kept[name] = replace(own, wanted=np.arange(len(own)))
        pools[name] = of_cache(cache, rows, own.labels[: len(rows)])
        start += n
    return kept, pools


def drawn(ids: Sequence[str]) -> SampleTable:
    """JPEG files of smooth noise, where a study has no images yet."""
    rng = np.random.default_rng(0)
    files = [_jpeg(rng) for _ in range(min(len(ids), _DRAWN))]
    n = len(ids)
    return SampleTable(
        source="drawn images",
        ids=tuple(ids),
        labels=np.full(n, -1, np.int32),
        class_names=(),
        sizes=np.full(n, -1, np.int64),
        mtimes_ns=np.zeros(n, np.int64),
        left_out={},
        contents=[files[number % len(files)] for number in range(n)],
    )


def _jpeg(rng: np.random.Generator) -> bytes:
    small = rng.integers(0, 256, (_HEIGHT // 12, _WIDTH // 12, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()
