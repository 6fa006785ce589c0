"""What this machine does with a study, measured in about a minute and in a folder that is thrown away.

Nothing is kept for the next time: the numbers are of the machine as it is now, with who else is at work on it, and of
settings that are about to be changed.
"""

import time
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cache import CacheError, FeatureSpec
from pipeline.planning.forecast import Calibration
from pipeline.planning.pieces import seconds_of_heads, seconds_of_method, seconds_of_search
from pipeline.planning.pilot import Material, Pilot
from pipeline.planning.pool import Pool, drawn, of_arrays, of_cache, of_images
from pipeline.planning.sample import PilotScale, PilotSet, between, pilot_sets, scales, smaller
from pipeline.planning.size import StudySize
from pipeline.record import peak_memory_bytes
from pipeline.workspace import Workspace
from stages.errors import InputError
from stages.inputs.images import SampleTable
from stages.networks.backbone import Backbone, build_architecture
from stages.scorers import AUTO

_EXTRACTING = 0.12  # of the time, for images
_TUNING = 0.2  # of the time, for the fine-tune
_REPORTING = 0.05  # of the time, for the page
_PROBING = 0.2  # of the time, for the larger pilot's probe
_STEPS = 4  # that people are told of: images, two pilots, scores
_LARGER = 1.5  # than the first, at least
_FAR = 100  # times the products of a pilot's heads: beyond, heads are timed with as many classes as the study has


class Calibrator:
    """Measures what a study does on this machine.

    Args:
        workspace: the study.
        size: of its sets.
        seconds: that it may take, about.
    """

    def __init__(self, workspace: Workspace, size: StudySize, seconds: float) -> None:
        self._workspace, self._config, self._size = workspace, workspace.config, size
        self._seconds = seconds
        self._ends = time.monotonic() + seconds
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
            verbs: stages that are not fresh: some of ``train``, ``finetune``, ``score``, ``report``.
            extracts: whether images are to be extracted.
        """
        began, progress = time.monotonic(), self._workspace.progress
        progress.start(_STEPS, "step", f"calibrate {self._config.name}")
        small, large = scales(self._config, self._size)
        tables = self._tables()
        sets = pilot_sets(self._config, self._size, tables, large)
        if not self._size.counted:
            tables = {name: drawn(own.ids) for name, own in sets.items()}
        pools = self._given(sets)
        arrays = {entry.name for entry in self._workspace.sets.with_features()}
        pictured = {name: own for name, own in sets.items() if name in tables and name not in arrays}
        left, image = {name: own for name, own in pictured.items() if name not in pools}, 0.0
        if left or extracts:
            assert self.network is not None
            time_for = self._seconds * _EXTRACTING
            found = of_images(left or pictured, tables, self.network, self.spec, time_for)
            sets, pools, image = sets | found.sets, found.pools | pools, found.seconds
        extracting = peak_memory_bytes()
        progress.advance()
        measured = Calibration(self._loading, image, extracting)
        if verbs:
            material = Material(self._config, self._size, tables, pools, self.spec, self.network)
            self._run_pilots(measured, material, sets, (small, large), verbs)
        progress.close()
        measured.seconds = self._loading + time.monotonic() - began
        return measured

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

    def _run_pilots(
        self,
        measured: Calibration,
        material: Material,
        sets: dict[str, PilotSet],
        both: tuple[PilotScale, PilotScale],
        verbs: set[str],
    ) -> None:
        """The small pilot, of the larger one what there is time for, and what is timed apart."""
        small, large = both
        with TemporaryDirectory(prefix="plan-") as scratch:

            def pilot(scale: PilotScale, name: str) -> Pilot:
                new = Pilot(material, smaller(sets, self._config, self._size, scale), Path(scratch, name))
                measured.pilots.append(new.timed)
                return new

            first = last = pilot(small, "small")
            first.train()
            if "score" in verbs:
                first.score()
            self._workspace.progress.advance()
            self._time_pieces(measured, "score" in verbs)
            if "report" in verbs:
                first.report(self._seconds * _REPORTING)
            self._workspace.progress.advance()
            if small != large:
                # Rows and classes of a head grow alike.
                times = max(_LARGER, sqrt(self._seconds * _PROBING / first.timed.probe))
                last = pilot(between(small, large, times), "large")
                self._run_larger(first, last, verbs)
            if "score" in verbs and AUTO in self._config.score.scores:
                for each in dict.fromkeys((first, last)):
                    each.fold()
            self._workspace.progress.advance()
            if "finetune" in verbs:
                last.finetune(self._seconds * _TUNING)

    def _run_larger(self, first: Pilot, last: Pilot, verbs: set[str]) -> None:
        """All of the larger pilot where there is time for it, or else the probe alone."""
        left = self._ends - time.monotonic() - self._seconds * _TUNING * ("finetune" in verbs)
        if first.timed.seconds * last.timed.n_train / first.timed.n_train > left:
            last.fit_probe()
            return
        last.train()
        if "score" in verbs:
            last.score()

    def _time_pieces(self, measured: Calibration, scores: bool) -> None:
        """What grows otherwise than the rows of a pilot can tell."""
        size, (pilot, *_) = self._size, measured.pilots
        if scores:
            measured.search = seconds_of_search(self.spec.cls_dim)
            measured.method = seconds_of_method(self._config, size.rows)
        if size.of_roles(self._config, "id-train") * size.n_classes > _FAR * pilot.n_train * pilot.n_classes:
            measured.head = seconds_of_heads(size.n_classes, self.spec.cls_dim)
