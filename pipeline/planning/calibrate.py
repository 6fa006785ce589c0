"""What this machine does with a study, measured in less than a minute and in a folder that is thrown away.

Nothing is kept for the next time: the numbers are of the machine as it is now, with who else is at work on it, and of
settings that are about to be changed.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cache import CacheError, FeatureSpec
from pipeline.planning.forecast import Calibration
from pipeline.planning.pilot import Material, Timed, run_pilot
from pipeline.planning.pool import Pool, drawn, of_arrays, of_cache, of_images
from pipeline.planning.sample import PilotScale, PilotSet, between, pilot_sets, scales, smaller
from pipeline.planning.size import StudySize
from pipeline.record import peak_memory_bytes
from pipeline.workspace import Workspace
from stages.errors import InputError
from stages.inputs.images import SampleTable
from stages.networks.backbone import Backbone, build_architecture
from stages.scorers.neighbours.bank import FeatureBank

_EXTRACTING = 0.25  # of the time, for images
_LARGER = 1.5  # a pilot, than the first, or it tells nothing
_IN_BOTH = {"train", "score", "report"}  # what grows otherwise than the number of rows
_BANK, _QUERIES = 1 << 14, 1 << 11  # rows of a search that is timed


class Calibrator:
    """Measures what a study does on this machine.

    Args:
        workspace: the study.
        size: of its sets.
        seconds: that it may take, about.
    """

    def __init__(self, workspace: Workspace, size: StudySize, seconds: float) -> None:
        self._workspace, self._config, self._size = workspace, workspace.config, size
        self._ends = time.monotonic() + seconds
        self._seconds = seconds
        began = time.perf_counter()
        self.network = self._network()
        self._loading = time.perf_counter() - began
        self.spec = self._spec()

    def _network(self) -> Backbone | None:
        """The backbone; of images that are not there yet its shape is enough."""
        backbone = self._workspace.pretrained
        if self._config.backbone is None:
            return None
        if self._size.counted:
            return backbone.loaded
        return build_architecture(self._config.backbone, self._config.cache.expert_blocks)

    def _spec(self) -> FeatureSpec:
        workspace, cache = self._workspace, self._config.cache
        if self._config.has_features:
            return workspace.sets.spec_of_arrays(workspace.pretrained)
        assert self.network is not None
        known = workspace.pretrained.known_spec() if self._size.counted else None
        return known or self.network.feature_spec(cache.dtype, cache.patches, cache.taps)

    def measure(self, verbs: set[str], extracts: bool) -> Calibration:
        """All of it.

        Args:
            verbs: stages that are not fresh.
            extracts: whether images are to be extracted.
        """
        small, large = scales(self._config, self._size)
        tables = self._tables()
        sets = pilot_sets(self._config, self._size, tables, large)
        if not self._size.counted:
            tables = {name: drawn(own.ids) for name, own in sets.items()}
        pools = self._given(sets)
        pictured = {name: own for name, own in sets.items() if name in tables and name not in self._arrays()}
        left, image = {name: own for name, own in pictured.items() if name not in pools}, 0.0
        if left or extracts:
            assert self.network is not None
            time_for = self._seconds * _EXTRACTING
            found = of_images(left or pictured, tables, self.network, self.spec, time_for)
            sets, pools, image = sets | found.sets, found.pools | pools, found.seconds
        extracting = peak_memory_bytes()
        if not verbs:
            return Calibration(self._loading, image, 0.0, extracting, [])
        material = Material(self._config, self._size, tables, pools, self.spec, self.network)
        pilots = self._pilots(material, sets, (small, large), verbs)
        return Calibration(self._loading, image, self._search(), extracting, pilots)

    def _arrays(self) -> set[str]:
        return {entry.name for entry in self._config.sets if entry.features is not None}

    def _tables(self) -> dict[str, SampleTable]:
        if not self._size.counted:
            return {}
        return {entry.name: self._workspace.sets.table(entry) for entry in self._config.sets}

    def _given(self, sets: dict[str, PilotSet]) -> dict[str, Pool]:
        """Features that are there already: arrays, and caches that hold the rows."""
        pools, backbone = {}, self._workspace.pretrained
        for entry in self._config.sets if self._size.counted else ():
            rows = sets[entry.name]
            if entry.features is not None:
                pools[entry.name] = of_arrays(self._workspace.sets.arrays(entry), rows, self.spec)
                continue
            try:
                cache = backbone.cache(entry)
            except (InputError, CacheError):
                continue
            places = {name: place for place, name in enumerate(cache.ids)}
            if all(name in places for name in rows.ids):  # else images have changed, and are extracted
                own = np.array([places[name] for name in rows.ids], np.int64)
                pools[entry.name] = of_cache(cache, own, rows.labels)
        return pools

    def _pilots(
        self, material: Material, sets: dict[str, PilotSet], both: tuple[PilotScale, PilotScale], verbs: set[str]
    ) -> list[Timed]:
        """The small pilot, in which libraries are loaded too, and a larger one, as large as there is time for."""

        def run(scale: PilotScale, name: str, verbs: set[str]) -> Timed:
            some = smaller(sets, self._config, self._size, scale)
            return run_pilot(material, some, Path(scratch, name), verbs)

        small, large = both
        with TemporaryDirectory(prefix="plan-") as scratch:
            first = run(small, "small", verbs & _IN_BOTH)
            times = max(_LARGER, (self._ends - time.monotonic()) / first.seconds)
            return [first, run(between(small, large, times), "large", verbs)]

    def _search(self) -> float:
        """Seconds of a query times a row of the bank."""
        rng = np.random.default_rng(0)
        bank, queries = (rng.standard_normal((n, self.spec.cls_dim), dtype=np.float32) for n in (_BANK, _QUERIES))
        found = FeatureBank(bank)
        found.search(queries[:64], 10)
        began = time.perf_counter()
        found.search(queries, 10)
        return (time.perf_counter() - began) / (_BANK * _QUERIES)
