"""What the stages of a study work on: its sets, its backbones, its record, and which of its models are those of now."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from cache import CacheError, FeatureSpec, Lock
from pipeline.backbones import StudyBackbone, backbones_of
from pipeline.config import JOINT, RunConfig, RunOptions
from pipeline.engine import engine_for
from pipeline.processes import ranks
from pipeline.progress import TqdmProgress
from pipeline.record import RunRecord
from pipeline.sets import Sets
from stages.context import Context
from stages.errors import InputError
from stages.files.documents import read_document
from stages.id_data.rows import IdData
from stages.progress import NullProgress, Progress
from stages.training.identity import (
    finetune_identity,
    finetune_is_fresh,
    joint_identity,
    mixture_identity,
    mixture_is_fresh,
)
from stages.training.recipes import MixturePlan, resolve_settings

_SECONDS_TO_READ = 1 << 30  # bytes: what is less is read before anybody wonders


class Workspace:
    """One study on this machine.

    Args:
        config: the study.
        options: how to run it.
        on_trained: told the variant and the seconds of every mixture that was trained on pre-trained features.

    Attributes:
        ranks: this process among those that work together.
        progress: who listens.
        engine: other processes that stages hand their work to, where that was asked for.
        record: what ran.
        sets: what the sets hold.
        pretrained: the backbone that the study starts from.
        finetuned: those that it makes of it, one a seed.

    Raises:
        InputError: a file stands where a folder is to be.
    """

    def __init__(
        self, config: RunConfig, options: RunOptions, on_trained: Callable[[str, float], None] | None = None
    ) -> None:
        for key, folder in (("work", config.work), ("cache.root", config.cache.root)):
            if isinstance(folder, Path) and folder.exists() and not folder.is_dir():
                raise InputError(f"{key}: {folder} is a file, a folder is needed")
        self.config = config
        self.options = options
        self.on_trained = on_trained
        self.ranks = ranks()
        self.progress: Progress = TqdmProgress() if self.ranks.first else NullProgress()
        shared = [folder for folder in (config.work, config.cache.root) if isinstance(folder, Path)]
        self.engine = (
            engine_for(options.scheduler, options.workers, shared, self.progress) if self.ranks.first else None
        )
        self.record = RunRecord(config.work / "record.json", config, writes=self.ranks.first)
        self.sets = Sets(config)
        self.pretrained, *self.finetuned = backbones_of(config)

    @property
    def backbones(self) -> list[StudyBackbone]:
        """All of them, the pre-trained one first."""
        return [self.pretrained, *self.finetuned]

    def context(self) -> Context:
        """Who listens and takes part; a cluster that does not answer is refused here, before the work."""
        if self.engine is not None and self.options.scheduler is not None:
            self.engine.start()
        return Context(progress=self.progress, ranks=self.ranks, cluster=self.engine)

    def close(self) -> None:
        """No work is to come: the line of progress ends, and so do workers."""
        self.progress.close()
        if self.engine is not None:
            self.engine.close()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from working on what this one makes below ``work``; those that work with it may.

        Raises:
            CacheBusyError: somebody is at it; says who, and since when.
        """
        work = self.config.work
        # Where nothing is there yet a verb says what to run first; who may not write changes nothing.
        if not self.ranks.first or not work.is_dir() or not os.access(work, os.W_OK):
            yield
            return
        with Lock(work / "study", "being trained or scored") as lock:
            if lock.notice:
                self.progress.note(lock.notice)
            yield

    # ------------------------------------------------------------------------------------------------- backbones

    def asked(self, which: str) -> list[StudyBackbone]:
        """Backbones of a kind (``pretrained``, ``finetuned`` or ``all``), whether they are there or not."""
        return [backbone for backbone in self.backbones if which in (backbone.kind, "all")]

    def existing(self, which: str) -> Iterator[StudyBackbone]:
        """Backbones to work on, each looked for when it is its turn: the one before may make what it needs.

        Raises:
            InputError: there is none, or one that was asked for by its kind is not of the settings of now.
        """
        found = False
        for backbone in self.asked(which):
            if not backbone.exists:
                continue
            if not self.is_finetuned(backbone):
                stale = f"{backbone.finetune_folder} was made with other settings or features: run make finetune"
                if which != "all":
                    raise InputError(stale)
                self.progress.note(f"{backbone.name} is left out: {stale}")
                continue
            found = True
            yield backbone
        if not found:
            raise InputError(f"there is no {which} backbone yet: run make finetune")

    def is_finetuned(self, backbone: StudyBackbone) -> bool:
        """Whether a backbone is there, made with the settings of now; the pre-trained one always is."""
        if backbone.seed is None:
            return True
        assert self.config.finetune is not None
        try:
            data = self.pretrained.id_data()
        except (InputError, CacheError):  # what it was made from is gone, so it is no longer what it says
            return False
        identity = finetune_identity(data, self.config.finetune, backbone.seed, self.joint_plan(data))
        return finetune_is_fresh(backbone.finetune_folder, identity)

    def all_finetuned(self) -> bool:
        """Whether no backbone is left to fine-tune."""
        return all(map(self.is_finetuned, self.finetuned))

    def joint_plan(self, data: IdData) -> MixturePlan | None:
        """The experts of ``[train]`` as a fine-tune trains them together with the backbone, if that is asked for."""
        if self.config.finetune is None or not self.config.finetune.joint:
            return None
        train = self.config.train
        if train.preset == "default":  # its heads start as a probe; there is none of features that are still learned
            train = train.model_copy(update={"preset": "zero"})
        settings = resolve_settings(train, data.n_classes, data.train.spec)
        return MixturePlan(**{field.name: getattr(settings, field.name) for field in fields(MixturePlan)})

    def known_spec(self, backbone: StudyBackbone) -> FeatureSpec | None:
        """What a backbone's features are, where that is known without its weights."""
        return self.sets.spec_of_arrays(backbone) if self.config.has_features else backbone.known_spec()

    def check_caches(self, backbone: StudyBackbone, *roles: str) -> None:
        """Refuse caches that were written to since they were sealed; say which files of features are others by now."""
        for entry in self.config.sets_of(*roles):
            cache = backbone.cache(entry)
            suspects = cache.suspects()
            if sum(shard.nbytes for shard in suspects) > _SECONDS_TO_READ:
                self.progress.start(len(suspects), "shard", f"compare the bytes of {cache.path.name}")
            cache.check(lambda n_bytes: self.progress.advance(1))
            self.progress.close()
            for path in backbone.changed_files(entry):
                self.progress.note(
                    f"sets.{entry.name}.features: {path} has changed since it was extracted (size or time): its rows "
                    "are used as they were; run make extract"
                )

    # -------------------------------------------------------------------------------------------------- mixtures

    def mixtures(self, backbone: StudyBackbone) -> list[tuple[str, int]]:
        """Variant and seed of every mixture on a backbone's features."""
        seeds = self.config.variant_seeds(backbone.kind)
        return [(variant, seed) for variant, own in seeds.items() for seed in backbone.train_seeds if seed in own]

    def trained(self, backbone: StudyBackbone, data: IdData, variant: str, seed: int) -> Path:
        """Folder of a mixture that was trained with the settings of now.

        Raises:
            InputError: there is none, or one of other settings or features.
        """
        folder = backbone.mixture_folder(variant, seed)
        if read_document(folder / "mofe.json") is None:
            raise InputError(f"{folder} holds no trained mixture: run make train")
        if not mixture_is_fresh(folder, self._mixture_identity(backbone, data, variant, seed), data):
            raise InputError(
                f"{folder}: trained with other settings or features than this run's, or not whole: run make train"
            )
        return folder

    def _mixture_identity(self, backbone: StudyBackbone, data: IdData, variant: str, seed: int) -> str:
        if variant == JOINT:
            return joint_identity(data, backbone.finetune_folder)
        settings = resolve_settings(self.config.variant_configs()[variant], data.n_classes, data.train.spec)
        return mixture_identity(data, settings, seed, backbone.probe_folder)

    def to_train(self, backbone: StudyBackbone) -> list[tuple[str, int]]:
        """Variant and seed of every mixture on a backbone's features that is not fresh."""
        if not self.is_finetuned(backbone):
            return self.mixtures(backbone)
        try:
            data = backbone.id_data()
        except (InputError, CacheError):  # not extracted yet
            return self.mixtures(backbone)
        found = []
        for variant, seed in self.mixtures(backbone):
            try:
                self.trained(backbone, data, variant, seed)
            except InputError:
                found.append((variant, seed))
        return found
