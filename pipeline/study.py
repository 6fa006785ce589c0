"""A study: its stages in order, which of them are fresh, and what each says when it is done."""

import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from cache import (
    CacheDamagedError,
    CacheError,
    CacheInvalidError,
    FeatureCache,
    FeatureSpec,
    Lock,
    fingerprint,
    restore_manifest,
)
from cache.files import TEMPORARY, is_stray
from pipeline.backbones import Leg, legs
from pipeline.checks import check_mixtures, check_patches, check_scalars, check_study, check_tuning
from pipeline.config import JOINT, RunConfig, RunOptions, SetConfig
from pipeline.engine import SerialEngine, engine_for
from pipeline.predictions import Format, predict_sources
from pipeline.progress import TqdmProgress
from pipeline.record import RunRecord
from stages.detection.subjects import BackboneSource, MixtureFolder, TestSet
from stages.errors import InputError, StageError
from stages.extract import Changes, Mapper, compare_versions, extract_set, import_set, repair_import, repair_set
from stages.files.documents import (
    CONTENTS,
    digest_of,
    find_damages,
    has_contents,
    read_document,
    write_contents,
    write_text,
)
from stages.finetune import finetune, finetune_identity, finetune_is_fresh, read_finetuned_head
from stages.id_data.rows import IdData
from stages.inputs.arrays import ARRAY_SUFFIXES, ArrayTable, is_pattern, list_arrays
from stages.inputs.images import Columns, SampleTable, describe_left_out, list_images, only_classes
from stages.inputs.images.names import match_classes, unlike
from stages.networks.backbone import Backbone, build_architecture
from stages.networks.end_check import check_end
from stages.networks.tokens import stored_grid
from stages.predict import Predictor
from stages.progress import NullProgress, Progress
from stages.results.table import compact, read_summary
from stages.sanity import check_features, find_same_bytes, same_bytes_notes
from stages.score import SCORE_SEMANTICS, score
from stages.train import (
    finish_joint,
    joint_identity,
    mixture_identity,
    mixture_is_fresh,
    resolve_settings,
    train_mofe,
    train_probe,
)
from stages.training.distributed import current
from stages.training.objectives import MixturePlan

if TYPE_CHECKING:
    from pipeline.report.study import Evidence

Lines = list[Any]  # what a verb says: text, or tables of rich

_SECONDS_TO_READ = 1 << 30  # bytes: what is less is read before anybody wonders
_GROUP_OF_ROLE = {"id-test": "id", "near-ood": "near", "far-ood": "far"}


class Study:
    """The verbs of one experiment file.

    Args:
        config: the study.
        options: how to run it.
        on_trained: told the variant and the seconds of every mixture that was trained on pre-trained features.

    Raises:
        InputError: a file stands where a folder is to be.
    """

    def __init__(
        self, config: RunConfig, options: RunOptions, on_trained: Callable[[str, float], None] | None = None
    ) -> None:
        for key, folder in (("work", config.work), ("cache.root", config.cache.root)):
            if folder.exists() and not folder.is_dir():
                raise InputError(f"{key}: {folder} is a file, a folder is needed")
        self.config = config
        self.options = options
        self._on_trained = on_trained
        self._speaks = current().first
        self.progress: Progress = TqdmProgress() if self._speaks else NullProgress()
        self.record = RunRecord(config.work / "record.json", config, writes=self._speaks)
        self._legs = legs(config)
        self._samples: dict[str, SampleTable] = {}
        self._arrays: dict[str, ArrayTable] = {}

    # ------------------------------------------------------------------------------------------------ stage one

    def extract(self, backbone: str = "all") -> Lines:
        """Fill the caches of all sets; says what was done."""
        self._check()
        return [line for leg in self._existing(backbone) for line in self._extract(leg)]

    def _extract(self, leg: Leg) -> Lines:
        spec = self._given_spec(leg) if self.config.has_features else leg.spec()
        self._check_origins(spec)
        with self.record.running(f"extract {leg.name}", spec.fingerprint) as stage:
            found = {
                entry.name: compare_versions(
                    entry.name,
                    self._table(entry),
                    spec,
                    self.config.cache.root,
                    rehash=self.options.rehash,
                    progress=self.progress,
                )
                for entry in self.config.sets
            }
            if leg.seed is None:
                for entry in self.config.sets:
                    if left_out := describe_left_out(self._table(entry).left_out):
                        self._say([f"{entry.name}: {left_out}"])
                    for note in self._table(entry).notes:
                        self.progress.note(note)
            caches = {name: changes.cache for name, changes in found.items() if changes and changes.fresh}
            missing = [entry for entry in self.config.sets if entry.name not in caches]
            stage.fresh = not missing
            if (device := leg.other_device(spec)) and (images := [e.name for e in missing if e.images is not None]):
                raise InputError(
                    f"set {images[0]!r} is not extracted yet, or of other images, and the features of this study are "
                    f'of device "{device}", where this machine has "{leg.device}": extract on one that has it, or '
                    f"delete {leg.link_path} to extract all sets anew on this one"
                )
            for entry, cache in self._fill(leg, spec, missing, found):
                caches[entry.name] = cache
                for note in check_features(cache, by_class=entry.role == "id-train"):
                    self.progress.note(note)
                if leg.seed is None:  # the images of the other legs are the same
                    self._list_same_bytes(cache)
            leg.link(spec, caches, {entry.name: self._given(entry).files for entry in self._entries_with_features()})
        rows = sum(cache.n_rows for cache in caches.values())
        failures = sum(cache.manifest.n_failures for cache in caches.values())
        done = f"{len(missing)} of {len(caches)} sets extracted" if missing else "fresh"
        return [f"extract {leg.name}: {done}; {rows} rows + {failures} failures in {self.config.cache.root}"]

    def _list_same_bytes(self, cache: FeatureCache) -> None:
        """Say which rows of a set are copies, and list them all beside what the set was extracted to."""
        path = self.config.work / "extract" / f"{cache.manifest.dataset}-same-bytes.jsonl"
        same = find_same_bytes(cache)
        for note in same_bytes_notes(cache, same, str(path)):
            self.progress.note(note)
        if same:
            write_text(path, "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in same))
        else:
            path.unlink(missing_ok=True)

    def _entries_with_features(self) -> list[SetConfig]:
        return [entry for entry in self.config.sets if entry.features is not None]

    def _fill(
        self, leg: Leg, spec: FeatureSpec, missing: Sequence[SetConfig], found: Mapping[str, Changes | None]
    ) -> Iterator[tuple[SetConfig, FeatureCache]]:
        """Make the caches of some sets, one after the other; those of arrays first, which are quickly refused."""
        root = self.config.cache.root
        given = [entry for entry in missing if entry.features is not None]
        if spec.expert_blocks and spec.patches == "full":
            for entry in given:
                with _about(entry):
                    check_end(self._given(entry), leg.loaded)
        for entry in given:
            with _about(entry):
                changes = found[entry.name]
                cache = import_set(entry.name, self._given(entry), spec, root, changes=changes, progress=self.progress)
            yield entry, cache
        pictured = [entry for entry in missing if entry.features is None]
        if not pictured:
            return
        for note in leg.loaded.notes():
            self.progress.note(note)
        with engine_for(self.options.scheduler, self.options.workers) as engine:
            mapper: Mapper | None = None if isinstance(engine, SerialEngine) else engine.map
            for entry in pictured:
                yield (
                    entry,
                    extract_set(
                        entry.name,
                        self._table(entry),
                        spec,
                        root,
                        lambda: leg.loaded,
                        max_failures=self.options.max_failures,
                        changes=found[entry.name],
                        mapper=mapper,
                        progress=self.progress,
                    ),
                )

    # ------------------------------------------------------------------------------------------------ stage two

    def train(self, backbone: str = "all") -> Lines:
        """Fit probe and mixtures on cached features."""
        with self._alone():
            return [line for leg in self._existing(backbone) for line in self._train(leg)]

    def _train(self, leg: Leg) -> Lines:
        data = leg.id_data()
        self._check_train(leg, data)
        self._check_caches(leg, "id-train", "id-val")
        lines: Lines = []
        with self.record.running(f"train {leg.name}", fingerprint(data.identity)) as stage:
            stage.fresh = True
            probe = train_probe(data, leg.probe_folder)
            lines.append(f"train {leg.name}: probe with strength {probe.strength:g} ({data.split.rule})")
            lines += [f"train {leg.name}: {note}" for note in probe.notes("probe")]
            for variant, seed in self._mixtures(leg):
                folder, started = leg.mixture_folder(variant, seed), time.monotonic()
                done = self._train_mixture(leg, data, variant, seed)
                stage.fresh &= not done
                if not self._speaks:  # nor are the files there yet: rank 0 still fits the heads
                    continue
                about = read_document(folder / "mofe.json") or {}
                lines.append(
                    f"train {leg.name} {variant} seed {seed}: {'done' if done else 'fresh'}, "
                    f"{about['settings']['experts']} experts, epoch {about['best_epoch']} kept, {folder}"
                )
                if done and leg.seed is None and self._on_trained is not None:
                    self._on_trained(variant, time.monotonic() - started)
        return lines

    def _train_mixture(self, leg: Leg, data: IdData, variant: str, seed: int) -> bool:
        """Train and finish one mixture, or only finish that which was trained together with the leg's backbone."""
        folder = leg.mixture_folder(variant, seed)
        if variant == JOINT:
            return finish_joint(data, leg.finetune_folder, lambda: leg.architecture.end(), folder, self.progress)
        config = self.config.variant_configs()[variant]
        return train_mofe(data, config, lambda: leg.loaded.end(), seed, folder, self.progress, leg.device)

    def finetune(self) -> Lines:
        """Fine-tune the whole backbone on images, once a seed; with ``finetune.joint``, together with experts."""
        with self._alone():
            return self._finetune()

    def _finetune(self) -> Lines:
        assert self.config.finetune is not None
        pretrained = self._legs[0]
        data = pretrained.id_data()
        if not all(map(self._is_finetuned, self._legs[1:])):
            check_tuning(self.config, self._table, lambda: pretrained.architecture)
        self._check_caches(pretrained, "id-train", "id-val")
        plan = self._joint_plan(data)
        (train,), val = self.config.sets_of("id-train"), self.config.sets_of("id-val")
        lines: Lines = []
        for leg in self._legs[1:]:
            assert leg.seed is not None
            with self.record.running(f"finetune seed {leg.seed}", fingerprint(data.identity)) as stage:
                done = finetune(
                    pretrained.start,
                    data,
                    self._table(train),
                    self._table(val[0] if val else train),
                    self.config.finetune,
                    leg.seed,
                    leg.finetune_folder,
                    leg.device,
                    self.progress,
                    plan,
                )
                stage.fresh = not done
            about = read_document(leg.finetune_folder / "finetune.json") or {}
            lines.append(
                f"finetune seed {leg.seed}: {'done' if done else 'fresh'}, epoch {about['best_epoch']} kept, "
                f"held-out ID accuracy {100 * about['select_accuracy']:.1f} %, {leg.finetune_folder}"
            )
        return lines

    def _joint_plan(self, data: IdData) -> MixturePlan | None:
        """The experts of ``[train]`` as a fine-tune trains them together with the backbone, if that is asked for."""
        if self.config.finetune is None or not self.config.finetune.joint:
            return None
        settings = resolve_settings(self.config.train, data.n_classes, data.train.spec)
        return MixturePlan(**{field.name: getattr(settings, field.name) for field in fields(MixturePlan)})

    # ---------------------------------------------------------------------------------------------- stage three

    def score(self, backbone: str = "all") -> Lines:
        """Score every set with every detector; ends in the table."""
        with self._alone():
            return self._score(backbone)

    def _score(self, backbone: str) -> Lines:
        sources = self._sources(backbone)
        folder, identity = self.config.work / "scores", self._score_identity(sources)
        lines: Lines = []
        if not self._is_scored(identity):
            with self.record.running("score", identity):
                result = score(sources, self.config.score, folder, self.progress, identity)
            lines += result.notes
        return [*lines, *table_lines(folder)]

    def _sources(self, backbone: str) -> list[BackboneSource]:
        sources = [self._source(leg) for leg in self._existing(backbone)]
        if sources[0].name != "pretrained":
            # The frozen kNN of the pre-trained backbone is the baseline of every table.
            sources.insert(0, self._source(self._legs[0]))
        return sources

    def _is_scored(self, identity: str) -> bool:
        return self.record.is_fresh("score", identity) and has_contents(self.config.work / "scores", identity)

    def _check_caches(self, leg: Leg, *roles: str) -> None:
        """Refuse caches that were written to since they were sealed; say which files of features are others by now."""
        for entry in self.config.sets_of(*roles):
            cache = leg.cache(entry)
            suspects = cache.suspects()
            if sum(shard.nbytes for shard in suspects) > _SECONDS_TO_READ:
                self.progress.start(len(suspects), "shard", f"compare the bytes of {cache.path.name}")
            cache.check(lambda n_bytes: self.progress.advance(1))
            self.progress.close()
            for path in leg.changed_files(entry):
                self.progress.note(
                    f"sets.{entry.name}.features: {path} has changed since it was extracted (size or time): its rows "
                    "are used as they were; run make extract"
                )

    def _source(self, leg: Leg) -> BackboneSource:
        """All that stage three needs of a leg."""
        tests = [
            TestSet(entry.name, _GROUP_OF_ROLE[entry.role], leg.cache(entry))
            for entry in self.config.sets_of(*_GROUP_OF_ROLE)
        ]
        return self._source_of(leg, list(self._mixtures(leg)), tests)

    def _detector_source(self, leg: Leg) -> BackboneSource:
        """What `predict` needs of it: ID features and the first mixture; no other need be trained, no set be scored."""
        return self._source_of(leg, list(self._mixtures(leg))[:1], [])

    def _source_of(self, leg: Leg, mixtures: Sequence[tuple[str, int]], tests: Sequence[TestSet]) -> BackboneSource:
        self._check_caches(leg, "id-train", "id-val", *(_GROUP_OF_ROLE if tests else ()))
        data = leg.id_data()
        folders = [MixtureFolder(variant, seed, self._trained(leg, data, variant, seed)) for variant, seed in mixtures]
        probe = train_probe(data, leg.probe_folder)
        documents = [leg.probe_folder / "probe.json", *(folder.path / "mofe.json" for folder in folders)]
        documents += [] if leg.seed is None else [leg.finetune_folder / "finetune.json"]
        return BackboneSource(
            name=leg.backbone,
            seed=leg.seed,
            data=data,
            probe=probe,
            finetuned_head=None if leg.seed is None else read_finetuned_head(leg.finetune_folder),
            mixtures=tuple(folders),
            tests=tuple(tests),
            architecture=lambda: leg.architecture,
            network=None if self.config.backbone is None else lambda: leg.loaded,
            models={str(path.relative_to(self.config.work)): digest_of(path) for path in documents},
        )

    def _trained(self, leg: Leg, data: IdData, variant: str, seed: int) -> Path:
        """Folder of a mixture that was trained with the settings of now."""
        folder = leg.mixture_folder(variant, seed)
        about = read_document(folder / "mofe.json")
        if about is None:
            raise InputError(f"{folder} holds no trained mixture: run make train")
        if not mixture_is_fresh(folder, self._mixture_identity(leg, data, variant, seed), data):
            raise InputError(
                f"{folder}: trained with other settings or features than this run's, or not whole: run make train"
            )
        return folder

    def _mixture_identity(self, leg: Leg, data: IdData, variant: str, seed: int) -> str:
        if variant == JOINT:
            return joint_identity(data, leg.finetune_folder)
        settings = resolve_settings(self.config.variant_configs()[variant], data.n_classes, data.train.spec)
        return mixture_identity(data, settings, seed)

    def _mixtures(self, leg: Leg) -> Iterator[tuple[str, int]]:
        """Variant and seed of every mixture on a leg's features."""
        for variant, seeds in self.config.variant_seeds(leg.backbone).items():
            yield from ((variant, seed) for seed in leg.train_seeds if seed in seeds)

    def to_train(self, leg: Leg | None = None) -> list[tuple[str, int]]:
        """Variant and seed of every mixture that is not fresh; by default of the pre-trained backbone's."""
        leg = leg or self._legs[0]
        if not self._is_finetuned(leg):
            return list(self._mixtures(leg))
        try:
            data = leg.id_data()
        except (InputError, CacheError):  # not extracted yet
            return list(self._mixtures(leg))
        found = []
        for variant, seed in self._mixtures(leg):
            try:
                self._trained(leg, data, variant, seed)
            except InputError:
                found.append((variant, seed))
        return found

    def training_cost(self, variant: str) -> float:
        """What a mixture takes to train, in tokens that its epochs read; the caches must be there."""
        data = self._legs[0].id_data()
        height, width = data.train.spec.grid
        rows = sum(map(len, data.train_rows().values()))
        settings = resolve_settings(self.config.variant_configs()[variant], data.n_classes)
        return float(settings.epochs * rows * (1 + height * width))

    def _score_identity(self, sources: Sequence[BackboneSource]) -> str:
        return fingerprint(
            {
                "semantics": SCORE_SEMANTICS,
                "config": self.config.score.model_dump(),
                "sources": [
                    {
                        "name": [source.name, source.seed],
                        "data": source.data.identity,
                        "tests": [[test.name, test.group, test.cache.digest] for test in source.tests],
                        "mixtures": [[mixture.variant, mixture.seed] for mixture in source.mixtures],
                        "models": dict(source.models),
                    }
                    for source in sources
                ],
            }
        )

    def report(self) -> Lines:
        """The table, and ``report/index.html``."""
        if (stale := self._stale_scores()) is not None:
            self.progress.note(f"report: {stale}")
        lines = self.write_report()
        return [*table_lines(self.config.work / "scores"), *lines]

    def _stale_scores(self) -> str | None:
        """Why the scores are not those of now, as far as that can be seen: what they were made from may be gone."""
        scored = (read_document(self.config.work / "scores" / CONTENTS) or {}).get("identity")
        if scored is None or not self._legs[0].link_path.exists():
            return None
        try:
            backbones = ["all"] if self.config.finetune is None else ["all", "pretrained"]
            if any(self._score_identity(self._sources(backbone)) == scored for backbone in backbones):
                return None
        except CacheError:
            return None
        except InputError as error:
            return f"the scores are not of the models of now: {error}"
        return "the scores are of other models, features or settings than those of now: run make score"

    def write_report(self) -> Lines:
        """Write ``report/index.html``, unless it shows what it would show."""
        from pipeline.report.page import report_identity, write_report
        from pipeline.report.study import ReportedStudy

        folder, shown = self.config.work / "report", ReportedStudy.of(self.config.work, self.evidence())
        if has_contents(folder, report_identity(shown)):
            return [f"report: fresh, {folder / 'index.html'}"]
        with self.record.running("report", ""):  # the page shows the record, which is of this run from here on
            shown = ReportedStudy(shown.scored, shown.evidence)
            path = write_report(shown, self.progress)
            write_contents(folder, report_identity(shown), [path.name])
        return [f"report: {path}"]

    def evidence(self) -> "Evidence":
        """What a report may look at beside the study's own files, as far as it is still there."""
        from pipeline.report.study import Evidence

        caches = {}
        for entry in self.config.sets:
            with suppress(InputError, CacheError):  # not there any more, of other settings, or damaged
                cache = self._legs[0].cache(entry)
                cache.check()
                caches[entry.name] = cache
        return Evidence(self.config.sets_of("id-train")[0].name, caches, self._images)

    def _images(self, name: str) -> SampleTable:
        (entry,) = (entry for entry in self.config.sets if entry.name == name)
        if entry.images is None:
            raise InputError(f"set {name} has features, no images")
        return self._table(entry)

    def run(self) -> Lines:
        """Every stage that is not fresh, in order."""
        self._check()  # now, and not after hours of the stages before
        self._say(self._extract(self._legs[0]))
        with self._alone():
            return self._run_on()

    def _run_on(self) -> Lines:
        """Every stage after the first."""
        self._say(self._train(self._legs[0]))
        if self.config.finetune is not None:
            self._say(self._finetune())
            for leg in self._legs[1:]:
                self._say(self._extract(leg))
                self._say(self._train(leg))
        return [*self._score("all"), *self.write_report()]

    # ------------------------------------------------------------------------------------------------ other verbs

    def predict(
        self, paths: Sequence[str], score_name: str | None = None, form: Format = "csv", backbone: str = "pretrained"
    ) -> Lines:
        """Score new images with the fitted detector of the study; of fine-tuned backbones, with the first's."""
        leg = next(self._existing(backbone))
        sources = [self._new_source(path, leg.spec()) for path in paths]  # a missing path is said before any work
        if not self.config.has_features and (device := leg.other_device(leg.spec())):
            self.progress.note(
                f"predict: the study's features were made on {device}, those of the new images are made on "
                f"{leg.device}: they are equal to a tolerance, not to the bit"
            )
        predictor = Predictor(self._detector_source(leg), self.config.score, score_name, self.progress)
        return [predict_sources(predictor, leg, paths, sources, form, self.progress)]

    def _new_source(self, path: str, spec: FeatureSpec) -> SampleTable | ArrayTable:
        """What `predict` is to score: images, or features as the study's sets have them."""
        if not self.config.has_features:
            images = list_images(path)
            for note in (*images.notes, *filter(None, [describe_left_out(images.left_out)])):
                self.progress.note(f"{path}: {note.removeprefix(f'{path}: ')}")
            return images
        if Path(path).suffix.lower() not in ARRAY_SUFFIXES and not os.path.isdir(path) and not is_pattern(path):
            raise InputError(
                f"{path}: this study's sets have features, and nothing here makes such features of an image: give a "
                f"file of them ({', '.join(ARRAY_SUFFIXES)})"
            )
        (train,) = self.config.sets_of("id-train")
        named = {key: name for key, name in (train.columns or {}).items() if key not in ("label", "id")}
        table = self._read_features(path, named or None, None)
        network = (spec.backbone, spec.weights_sha, spec.expert_blocks, spec.image_size)
        if difference := table.spec(spec.origin, spec.dtype, network).first_difference(spec):
            raise InputError(f"{path}: other arrays than those of the study: {difference}")
        return table

    def verify(self, repair: bool = False) -> Lines:
        """Compare every byte of every cache with its manifest, and of models and scores with what they say of them.

        Repair makes damaged shards again.
        """
        broken, stale = 0, self._verify_work()
        for leg in self._legs:
            if leg.seed is None or leg.link_path.is_file():  # a fine-tuned backbone is extracted later than the other
                for entry in self.config.sets:
                    broken += self._verify(leg, entry, repair)
        if broken:
            hint = "delete these caches, run make extract" if repair else "verify --repair makes damaged shards again"
            raise StageError(f"{broken + stale} damaged files: {hint}")
        if stale:
            raise StageError(
                f"{stale} damaged files of models or scores: make run makes those again that it needs; the others may "
                "be deleted"
            )
        return []

    def _verify_work(self) -> int:
        """Say what is damaged of models and scores, and what is none of theirs; how many are damaged."""
        work = self.config.work
        files = [path for name in ("model", "finetune") for path in sorted((work / name).rglob("*")) if path.is_file()]
        strays = [path for path in files if is_stray(path.name) and path.suffix != TEMPORARY]
        self._say(f"{path}: not part of the study, ignored" for path in strays)
        documents = [path for path in files if path.suffix == ".json" and path not in strays]
        documents += [path for name in ("scores", "report") if (path := work / name / CONTENTS).is_file()]
        found = dict(find_damages(documents))
        self._say(f"{path}: {what}" for path, what in found.items())
        return len(found)

    def _verify(self, leg: Leg, entry: SetConfig, repair: bool) -> int:
        try:
            if repair and restore_manifest(leg.cache_path(entry)):
                self._say([f"{leg.cache_path(entry)}: the manifest was put back from its copy, or the copy from it"])
            cache = leg.cache(entry)
        except (CacheDamagedError, CacheInvalidError) as error:  # its manifest; the other caches are looked at as well
            self._say([str(error)])
            return 1
        damages = cache.verify()
        self._say(f"{cache.path / damage.file}: {damage.what}" for damage in damages)
        self._say(f"{cache.path / name}: not part of the cache, ignored" for name in cache.strays())
        if not damages:
            self._say([f"{cache.path}: whole, {cache.n_rows} rows"])
        elif repair:
            if entry.images is not None and (device := leg.other_device(cache.spec)):
                raise InputError(
                    f"{cache.path}: made on {device}; made on {leg.device}, as here, its features would be others: "
                    f"repair it on a machine with {device}"
                )
            files = [damage.file for damage in damages]
            if entry.features is not None:
                repair_import(cache, files, self._given(entry), self.progress)
            else:
                repair_set(cache, files, self._table(entry), lambda: leg.loaded, progress=self.progress)
            damages = FeatureCache.open(cache.path).verify()
            self._say([f"{cache.path}: {'still damaged' if damages else 'repaired'}"])
        return len(damages)

    def info(self) -> Lines:
        """What the study has on disk."""
        from pipeline.cli import cache_lines

        lines: Lines = [f"study      {self.config.name}, work in {self.config.work}"]
        for leg in self._legs:
            for entry in self.config.sets:
                try:
                    cache = leg.cache(entry)
                except (InputError, CacheError) as error:
                    lines.append(f"{leg.name:10} {entry.name}: {error}")
                    continue
                lines += ["", *cache_lines(cache)]
            for variant, seed in self._mixtures(leg):
                about = read_document(leg.mixture_folder(variant, seed) / "mofe.json")
                state = (
                    f"{about['settings']['experts']} experts, {about['parameters']:,} parameters"
                    if about
                    else "not trained"
                )
                lines.append(f"model      {leg.name} {variant} seed {seed}: {state}")
        return lines

    def outline(self) -> str:
        """What the study is and what of it is still to be trained, in one line.

        Raises:
            InputError: a set is not there, or some stage is bound to refuse something.
        """
        self._check(lambda: self._legs[0].architecture)
        n_rows = sum(len(self._table(entry)) for entry in self.config.sets)
        n_mixtures, n_left = (len(list(mixtures)) for mixtures in (self._mixtures(self._legs[0]), self.to_train()))
        unit = "rows" if self.config.has_features else "images"
        return (
            f"{self.config.name}: {len(self.config.sets)} sets of {n_rows:,} {unit}; {n_left} of {n_mixtures} "
            f"mixtures to train, in {1 + len(self.config.variants)} variants; {self.config.work}"
        )

    def plan(self, verb: str, backbone: str = "all") -> Lines:
        """What a verb would do: what is fresh, what would run, and the bytes that it would write."""
        if verb in ("extract", "run"):
            self._check(lambda: self._legs[0].architecture)
        lines: Lines = []
        asked = [leg for leg in self._legs if backbone in (leg.backbone, "all")]
        if verb in ("extract", "run"):
            for leg in asked:
                lines += self._plan_extract(leg)
        if verb in ("train", "run"):
            lines += [line for leg in asked for line in self._plan_train(leg)]
        if verb == "finetune" and not all(map(self._is_finetuned, self._legs[1:])):
            check_tuning(self.config, self._table, lambda: self._legs[0].architecture)
        if verb in ("finetune", "run"):
            for leg in self._legs[1:]:
                state = f"fresh, {leg.finetune_folder}" if self._is_finetuned(leg) else "would run"
                lines.append(f"finetune seed {leg.seed}: {state}")
        if verb in ("score", "run"):
            lines.append(self._plan_score(asked, backbone))
        if verb in ("report", "run"):
            lines.append(self._plan_report())
        return lines

    def _plan_extract(self, leg: Leg) -> Lines:
        known = leg.known_spec() if self._is_finetuned(leg) else None
        spec = self._given_spec(leg) if self.config.has_features else known
        if spec is None:
            shape = leg.architecture
            cache = self.config.cache
            height, width = stored_grid(shape.grid, cache.patches)
            item = 2 if cache.dtype == "float16" else 4
            row_bytes = item * (shape.dim + shape.tap_dim * (1 + shape.n_registers + height * width))
        else:
            row_bytes = spec.row_bytes
            self._check_origins(spec)
        lines: Lines = []
        for entry in self.config.sets:
            table = self._table(entry)
            changes = spec and compare_versions(
                entry.name, table, spec, self.config.cache.root, rehash=self.options.rehash, progress=self.progress
            )
            state = f"would write {len(table) * row_bytes / 2**20:.1f} MiB"
            if changes and changes.fresh:
                state = f"fresh, {changes.cache.path}"
            elif changes:
                state = f"{changes}: would extract {changes.to_extract}, take over the others, and {state[6:]}"
            if table.left_out:
                state += f"; {describe_left_out(table.left_out)}"
            lines += [f"extract {leg.name} {entry.name}: {len(table)} {_unit(entry)}, {state}", *table.notes]
        return lines

    def _plan_train(self, leg: Leg) -> Lines:
        if self._is_finetuned(leg) and leg.link_path.is_file():
            with suppress(CacheError):  # extracted with other settings, or not there any more
                self._check_train(leg, leg.id_data())
        to_train = set(self.to_train(leg))
        return [
            f"train {leg.name} {variant} seed {seed}: {'would run' if (variant, seed) in to_train else 'fresh'}"
            for variant, seed in self._mixtures(leg)
        ]

    def _plan_report(self) -> str:
        from pipeline.report.page import report_identity
        from pipeline.report.study import ReportedStudy

        folder, fresh = self.config.work / "report", False
        with suppress(InputError):  # nothing is scored yet
            fresh = has_contents(folder, report_identity(ReportedStudy.of(self.config.work, self.evidence())))
        return f"report: {'fresh,' if fresh else 'would write'} {folder / 'index.html'}"

    def _plan_score(self, asked: Sequence[Leg], backbone: str) -> str:
        folder = self.config.work / "scores"
        try:
            fresh = all(map(self._is_finetuned, asked)) and self._is_scored(
                self._score_identity(self._sources(backbone))
            )
        except (InputError, CacheError):  # what it reads is not there yet
            fresh = False
        return f"score: fresh, {folder}" if fresh else f"score: would read caches and models, write {folder}"

    # ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from working on what this one makes below ``work``; those that work with it may.

        Raises:
            CacheBusyError: somebody is at it; says who, and since when.
        """
        work = self.config.work
        # Where nothing is there yet a verb says what to run first; who may not write changes nothing.
        if not self._speaks or not work.is_dir() or not os.access(work, os.W_OK):
            yield
            return
        with Lock(work / "study", "being trained or scored") as lock:
            if lock.notice:
                self.progress.note(lock.notice)
            yield

    def _existing(self, backbone: str) -> Iterator[Leg]:
        """Legs that a verb works on, each looked for when it is its turn: the one before may make what it needs."""
        found = False
        for leg in self._legs:
            if backbone not in (leg.backbone, "all") or not leg.exists:
                continue
            if not self._is_finetuned(leg):
                stale = f"{leg.finetune_folder} was made with other settings or features: run make finetune"
                if backbone != "all":
                    raise InputError(stale)
                self.progress.note(f"{leg.name} is left out: {stale}")
                continue
            found = True
            yield leg
        if not found:
            raise InputError(f"there is no {backbone} backbone yet: run make finetune")

    def _is_finetuned(self, leg: Leg) -> bool:
        """Whether the leg's backbone is there, made with the settings of now; that of the pre-trained leg always is."""
        if leg.seed is None:
            return True
        assert self.config.finetune is not None
        try:
            data = self._legs[0].id_data()
        except (InputError, CacheError):  # what it was made from is gone, so it is no longer what it says
            return False
        identity = finetune_identity(data, self.config.finetune, leg.seed, self._joint_plan(data))
        return finetune_is_fresh(leg.finetune_folder, identity)

    def _check(self, network: Callable[[], Backbone] | None = None) -> None:
        """Refuse all that can be known before work.

        Args:
            network: gives the architecture, where it is needed later as well; otherwise it is not kept.
        """
        self._check_sets()
        check_scalars(self.config)
        leg = self._legs[0]
        network = network or functools.cache(lambda: build_architecture(leg.start, self.config.cache.expert_blocks))
        spec, to_train = leg.known_spec(), self._variants_to_train(leg)
        spec = self._given_spec(leg) if self.config.has_features else spec
        check_study(self.config, self._table, spec, network, to_train)
        if not all(map(self._is_finetuned, self._legs[1:])):
            check_tuning(self.config, self._table, network)

    def _check_train(self, leg: Leg, data: IdData) -> None:
        """Refuse what no mixture on a leg's features can be trained with, before the first of them is."""
        check_scalars(self.config)
        names, to_train = data.class_names, self._variants_to_train(leg)
        check_mixtures(self.config, names, data.train.spec)
        check_patches(self.config, names, data.train.spec, to_train, lambda: leg.architecture)

    def _variants_to_train(self, leg: Leg) -> set[str]:
        return {variant for variant, _ in self.to_train(leg)}

    def _check_sets(self) -> None:
        """Refuse sets that are not there or cannot be scored before hours of extraction rather than after."""
        (train,) = self.config.sets_of("id-train")
        known = self._table(train).class_names
        for entry in self.config.sets:
            table = self._table(entry)
            if entry not in self.config.sets_of("id-train", "id-val", "id-test"):
                continue
            if len(without := np.flatnonzero(table.labels < 0)):
                how = "label in the file" if entry.features else "a folder per class, or a list with labels"
                raise InputError(
                    f"set {entry.name!r}: {len(without)} of {len(table)} {_unit(entry)} (the first: "
                    f"{table.ids[without[0]]!r}) have no label: give {how}"
                )
            places = np.array(match_classes(table.class_names, known))
            if len(others := np.flatnonzero(places[table.labels] < 0)):
                unknown = [table.class_names[place] for place in np.flatnonzero(places < 0)]
                raise InputError(
                    f"set {entry.name!r} has classes that id-train does not have: {unlike(unknown, known)}; the first "
                    f"of {len(others)} such {_unit(entry)}: {table.ids[others[0]]!r}"
                )

    def _table(self, entry: SetConfig) -> SampleTable:
        if entry.features is not None:
            return self._given(entry).samples
        if entry.name not in self._samples:
            with _about(entry):
                columns = Columns(entry.path_column, entry.label_column)
                table = list_images(str(entry.images), entry.root, columns)
                self._samples[entry.name] = only_classes(table, entry.classes) if entry.classes else table
        return self._samples[entry.name]

    def _given(self, entry: SetConfig) -> ArrayTable:
        if entry.name not in self._arrays:
            with _about(entry):
                self._arrays[entry.name] = self._read_features(str(entry.features), entry.columns, entry.classes)
        return self._arrays[entry.name]

    def _read_features(
        self, path: str, columns: Mapping[str, str] | None, classes: str | Sequence[str] | None
    ) -> ArrayTable:
        """Arrays; columns of logits are called as those of id-train, and those of its classes alone are taken."""
        (train,) = self.config.sets_of("id-train")
        if train.features is None:
            return list_arrays(path, columns, classes)
        table = list_arrays(path, columns, classes or train.classes)
        own = path == train.features and columns == train.columns
        return table.of_classes((table if own else self._given(train)).samples.class_names)

    def _given_spec(self, leg: Leg) -> FeatureSpec:
        """What the features of sets are that came as arrays; refuses those that do not go together."""
        tables = {entry.name: self._given(entry) for entry in self.config.sets}
        (train,) = self.config.sets_of("id-train")
        if self.config.backbone is not None and not tables[train.name].has_tokens:
            raise InputError(
                f"backbone: sets.{train.name}.features has no patches, so nothing reads it: leave [backbone] out, or "
                "give the tokens tap_cls and patches that enter its last blocks"
            )
        with _about(train):
            tables[train.name].check_logits()
        return leg.given_spec(tables)

    def _check_origins(self, spec: FeatureSpec) -> None:
        """Refuse arrays beside images that are not what the study's own network makes of images.

        Raises:
            InputError: another origin than the fingerprint of these features, or other arrays.
        """
        if self.config.has_features:
            return
        for entry in self.config.sets:
            if entry.features is None:
                continue
            if entry.origin != spec.fingerprint:
                raise InputError(
                    f"sets.{entry.name}.origin: {entry.origin} given, but the features of this study's images have "
                    f"{spec.fingerprint}: other weights, size, tap, patches, dtype or device"
                )
            columns = self._given(entry).columns
            for name, (shape, _) in spec.datasets().items():
                rows = columns[name].shape[1:] if name in columns else ()
                # Patches may come as [n, h, w, D'].
                if name not in columns or math.prod(rows) != math.prod(shape) or rows[-1] != shape[-1]:
                    raise InputError(
                        f"sets.{entry.name}.features: {entry.features} has {name} {list(rows) or 'missing'}, the "
                        f"features of this study's images {list(shape)}: give the arrays that their caches hold"
                    )

    def _say(self, lines: Iterable[Any]) -> None:
        from pipeline.cli import show

        show(lines)


@contextmanager
def _about(entry: SetConfig) -> Iterator[None]:
    """Name the key of the experiment file in front of what is wrong with a set."""
    try:
        yield
    except InputError as error:
        raise InputError(f"sets.{entry.name}.{'images' if entry.images else 'features'}: {error}") from error


def table_lines(folder: Path) -> Lines:
    """The summary as a table for the terminal, without the calibrated scores, and where the files are."""
    summary = read_summary(folder)
    calibrated = sum(line["calibrated"] and line["ood"] == "average" and line["group"] == "all" for line in summary)
    more = f" (with {calibrated} rows calibrated over experts)" if calibrated else ""
    table = terminal_table([line for line in summary if not line["calibrated"]])
    return [table, f"scores: {folder / 'summary.md'}{more}, {folder / 'table.csv'}, {folder / 'thresholds.json'}"]


def terminal_table(summary: Sequence[dict[str, Any]]) -> Table:
    """Averages of a summary for the terminal, the best of each column in bold."""
    header, body = compact(summary)
    table = Table(
        title="per cent; FPR95 with ID positive (admit 95 % of ID, report the OOD admitted)", title_style="dim"
    )
    names = header.index("score") + 1
    for index, column in enumerate(header):
        table.add_column(column, justify="left" if index < names else "right", no_wrap=True)
    best = [_best(header[index], [row[index] for row in body]) for index in range(len(header))]
    for row in body:
        table.add_row(
            *(
                Text(cell, style="bold" if index >= names and cell == best[index] else "")
                for index, cell in enumerate(row)
            )
        )
    return table


def _best(column: str, cells: Sequence[str]) -> str | None:
    values = {cell: float(cell.split()[0]) for cell in cells if cell[:1].isdigit()}
    choose: Callable[..., str] = max if column.endswith("↑") else min
    return choose(values, key=lambda cell: values[cell]) if values else None


def _unit(entry: SetConfig) -> str:
    return "images" if entry.features is None else "rows"
