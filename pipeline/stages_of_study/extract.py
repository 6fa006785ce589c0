"""Stage one: the sealed caches of a backbone's features, one a set.

What runs networks is imported where there is something to extract.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import ClassVar

from cache import FeatureCache, FeatureSpec
from pipeline.checks import check_before_extraction
from pipeline.config import SetConfig
from pipeline.pseudo_ood import PseudoOOD
from pipeline.sets import about_set, unit_of
from pipeline.stage import BackboneStage, Done
from pipeline.terminal import Lines, show
from pipeline.workspace import Workspace
from stages.context import Context
from stages.errors import InputError
from stages.extraction.changes import Changes, compare_versions
from stages.files.documents import write_text
from stages.inputs.images import describe_left_out
from stages.progress import Progress


class Extract(BackboneStage):
    """Fill the caches of all sets with the features of one backbone."""

    alone: ClassVar = False  # each cache has a lock of its own
    looks_again: ClassVar = True

    @classmethod
    def before(cls, workspace: Workspace, planning: bool) -> None:
        """Refuse a study of which any stage is bound to refuse something: this one takes hours."""
        check_before_extraction(workspace, (lambda: workspace.pretrained.architecture) if planning else None)

    @property
    def name(self) -> str:
        """``extract`` and the backbone."""
        return f"extract {self.backbone.name}"

    def identity(self) -> str:
        """Fingerprint of the features; their inputs are compared set by set."""
        return self._spec.fingerprint

    def is_fresh(self) -> bool:
        """Whether every set has a cache of these features of the images of now."""
        fresh = all(changes and changes.fresh for changes in self._changes.values())
        return fresh and not (self._pseudo.needed and self._pseudo.cache(self._spec) is None)

    def check(self) -> None:
        """Refuse features that did not come from where they say."""
        self.workspace.sets.check_origins(self._spec)

    @cached_property
    def _spec(self) -> FeatureSpec:
        config, sets = self.workspace.config, self.workspace.sets
        if config.has_features:
            return sets.spec_of_arrays(self.backbone)
        return self.backbone.spec(sum(len(sets.table(entry)) for entry in config.sets))

    @cached_property
    def _changes(self) -> dict[str, Changes | None]:
        return {entry.name: self._compare(entry, self._spec) for entry in self.workspace.config.sets}

    def _compare(self, entry: SetConfig, spec: FeatureSpec) -> Changes | None:
        return compare_versions(
            entry.name,
            self.workspace.sets.table(entry),
            spec,
            self.workspace.config.cache.root,
            rehash=self.workspace.options.rehash,
            progress=self.workspace.progress,
        )

    # ------------------------------------------------------------------------------------------------------ --dry-run

    def plan(self) -> Lines:
        """A line a set: how many images, and bytes to write."""
        workspace, backbone = self.workspace, self.backbone
        known = backbone.known_spec() if workspace.is_finetuned(backbone) else None
        spec = workspace.sets.spec_of_arrays(backbone) if workspace.config.has_features else known
        if spec is not None:
            workspace.sets.check_origins(spec)
        row_bytes = self._row_bytes() if spec is None else spec.row_bytes
        decode = "pil" if workspace.config.backbone is None else workspace.config.backbone.decode
        how = [] if decode == "pil" else [f"{self.name}: JPEG files are decoded by {decode!r} (backbone.decode)"]
        sets = [line for entry in workspace.config.sets for line in self._plan_set(entry, spec, row_bytes)]
        return [*how, *sets, *self._plan_pseudo(row_bytes)]

    def _row_bytes(self) -> int:
        """Of features that were never extracted; the network's shape says it."""
        from stages.networks.tokens import stored_grid

        shape, cache = self.backbone.architecture, self.workspace.config.cache
        height, width = stored_grid(shape.grid, cache.patches)
        item, taps = 2 if cache.dtype == "float16" else 4, shape.tap_layout(cache.taps)
        of_taps = len(taps.taps) * taps.tap_tokens * max(taps.tap_widths, default=0)
        return item * (shape.dim + shape.tap_dim * (1 + shape.n_registers + height * width) + of_taps)

    def _plan_set(self, entry: SetConfig, spec: FeatureSpec | None, row_bytes: int) -> Lines:
        table = self.workspace.sets.table(entry)
        changes = spec and self._compare(entry, spec)
        state = f"would write {len(table) * row_bytes / 2**20:.1f} MiB"
        if changes and changes.fresh:
            state = f"fresh, {changes.cache.path}"
        elif changes:
            state = f"{changes}: would extract {changes.to_extract}, take over the others, and {state[6:]}"
        if table.left_out:
            state += f"; {describe_left_out(table.left_out)}"
        return [f"{self.name} {entry.name}: {len(table)} {unit_of(entry)}, {state}", *table.notes]

    def _plan_pseudo(self, row_bytes: int) -> Lines:
        """What plays OOD for ``auto``; how many ID images select is known once they are extracted."""
        pseudo = self._pseudo
        if not pseudo.needed:
            return []
        spec = self.backbone.known_spec()
        cache = None if spec is None or not self.backbone.exists else pseudo.found(spec)
        size = f"at most {pseudo.at_most} images, would write at most {pseudo.at_most * row_bytes / 2**20:.1f} MiB"
        state = size if cache is None else f"{cache.n_rows} images, fresh, {cache.path}"
        return [f"{self.name} {pseudo.name}: {state}"]

    # ------------------------------------------------------------------------------------------------------- the work

    def run(self, context: Context) -> Done:
        """Make the caches that are missing, and remember which caches the sets are in."""
        config, backbone, found = self.workspace.config, self.backbone, self._changes
        if backbone.seed is None:  # the images of the other backbones are the same
            self._say_what_is_listed(context.progress)
        caches = {name: changes.cache for name, changes in found.items() if changes and changes.fresh}
        missing = [entry for entry in config.sets if entry.name not in caches]
        self._check_device(missing)
        for entry, cache in self._fill(missing, context):
            caches[entry.name] = cache
            self._look_at(cache, entry, context.progress)
        files = {entry.name: self.workspace.sets.arrays(entry).files for entry in self.workspace.sets.with_features()}
        backbone.link(self._spec, caches, files)
        made = self._make_pseudo(context)
        rows = sum(cache.n_rows for cache in caches.values())
        failures = sum(cache.manifest.n_failures for cache in caches.values())
        done = f"{len(missing)} of {len(caches)} sets extracted" if missing else "fresh"
        told = f"{self.name}: {done}; {rows} rows + {failures} failures in {config.cache.root}"
        return Done([told, *made], not (missing or made))

    def _look_at(self, cache: FeatureCache, entry: SetConfig, progress: Progress) -> None:
        """Say what looks wrong about features that were just made."""
        from stages.sanity import check_features

        for note in check_features(cache, by_class=entry.role == "id-train"):
            progress.note(note)
        if self.backbone.seed is None:
            self._list_same_bytes(cache, progress)

    @cached_property
    def _pseudo(self) -> PseudoOOD:
        return PseudoOOD(self.workspace, self.backbone)

    def _make_pseudo(self, context: Context) -> Lines:
        """The images that play OOD for ``auto``, where they are wanted and not there; a line about new ones.

        The study does without them: `auto` is then chosen by features alone.
        """
        pseudo, spec, cluster = self._pseudo, self._spec, context.cluster
        if not pseudo.needed or pseudo.cache(spec) is not None:
            return []
        from stages.extract import ExtractOptions, extract_set

        device = self.backbone.other_device(spec)
        try:
            if device:
                raise InputError(f"the features of this study are of device {device!r}, this is another")
            loaded = self.backbone.loaded
            how = ExtractOptions(1.0, mapper=None if cluster is None else cluster.map, progress=context.progress)
            samples, root = pseudo.samples(), self.workspace.config.cache.root
            cache = extract_set(pseudo.name, samples, spec, root, lambda: loaded, options=how)
        except InputError as error:
            context.progress.note(f"{self.name}: no images play OOD, auto is chosen by features alone: {error}")
            return []
        pseudo.keep(cache)
        return [f"{self.name} {pseudo.name}: {cache.n_rows} images that play OOD, made of ID images, in {cache.path}"]

    def _say_what_is_listed(self, progress: Progress) -> None:
        for entry in self.workspace.config.sets:
            table = self.workspace.sets.table(entry)
            if left_out := describe_left_out(table.left_out):
                show([f"{entry.name}: {left_out}"])
            for note in table.notes:
                progress.note(note)

    def _check_device(self, missing: Sequence[SetConfig]) -> None:
        """Refuse features of images that are to stand beside those that another kind of device made."""
        images = [entry.name for entry in missing if entry.images is not None]
        if images and (device := self.backbone.other_device(self._spec)):
            raise InputError(
                f"set {images[0]!r} is not extracted yet, or of other images, and the features of this study are "
                f'of device "{device}", where this machine has "{self.backbone.device}": extract on one that has it, '
                f"or delete {self.backbone.link_path} to extract all sets anew on this one"
            )

    def _list_same_bytes(self, cache: FeatureCache, progress: Progress) -> None:
        """Say which rows of a set are copies, and list them all beside what the set was extracted to."""
        from stages.sanity import find_same_bytes, same_bytes_notes

        path = self.workspace.config.work / "extract" / f"{cache.manifest.dataset}-same-bytes.jsonl"
        same = find_same_bytes(cache)
        for note in same_bytes_notes(cache, same, str(path)):
            progress.note(note)
        if same:
            write_text(path, "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in same))
        else:
            path.unlink(missing_ok=True)

    def _fill(self, missing: Sequence[SetConfig], context: Context) -> Iterator[tuple[SetConfig, FeatureCache]]:
        """Make the caches of some sets, one after the other; those of arrays first, which are quickly refused."""
        yield from self._fill_from_arrays([entry for entry in missing if entry.features is not None], context)
        yield from self._fill_from_images([entry for entry in missing if entry.features is None], context)

    def _fill_from_arrays(
        self, given: Sequence[SetConfig], context: Context
    ) -> Iterator[tuple[SetConfig, FeatureCache]]:
        if not given:
            return
        from stages.extract import ExtractOptions, import_set
        from stages.networks.end_check import check_end

        spec, sets, root = self._spec, self.workspace.sets, self.workspace.config.cache.root
        if spec.expert_blocks and spec.patches == "full":
            for entry in given:
                with about_set(entry):
                    check_end(sets.arrays(entry), self.backbone.loaded)
        for entry in given:
            with about_set(entry):
                changes = self._changes[entry.name]
                options = ExtractOptions(progress=context.progress)
                cache = import_set(entry.name, sets.arrays(entry), spec, root, changes=changes, options=options)
            yield entry, cache

    def _fill_from_images(
        self, pictured: Sequence[SetConfig], context: Context
    ) -> Iterator[tuple[SetConfig, FeatureCache]]:
        if not pictured:
            return
        from stages.extract import ExtractOptions, extract_set

        backbone, cluster = self.backbone, context.cluster
        for note in backbone.loaded.notes():
            context.progress.note(note)
        how = ExtractOptions(
            self.workspace.options.max_failures,
            mapper=None if cluster is None else cluster.map,
            progress=context.progress,
        )
        for entry in pictured:
            cache = extract_set(
                entry.name,
                self.workspace.sets.table(entry),
                self._spec,
                self.workspace.config.cache.root,
                lambda: backbone.loaded,
                changes=self._changes[entry.name],
                options=how,
            )
            yield entry, cache
