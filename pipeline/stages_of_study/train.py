"""Stage two: the linear probe and the mixtures on a backbone's cached features.

What trains is imported where there is something to train.
"""

import time
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

from cache import CacheError, fingerprint
from pipeline.checks import check_before_training
from pipeline.config import JOINT
from pipeline.sources import linear_probe
from pipeline.stage import BackboneStage, Done
from pipeline.terminal import Lines
from stages.context import Context
from stages.files.documents import read_document
from stages.heads.choose import FittedHeads
from stages.id_data.rows import IdData


class Train(BackboneStage):
    """Fit probe and mixtures on the features of one backbone."""

    looks_again: ClassVar = True

    @property
    def name(self) -> str:
        """``train`` and the backbone."""
        return f"train {self.backbone.name}"

    def identity(self) -> str:
        """Digest of the features and their split; settings and seed are compared mixture by mixture."""
        return fingerprint(self._data.identity)

    def is_fresh(self) -> bool:
        """Whether every mixture is there; the probe is fitted in passing."""
        return not self.workspace.to_train(self.backbone)

    def check(self) -> None:
        """Refuse settings that do not fit the data, and features that are not as they were sealed."""
        check_before_training(self.workspace, self.backbone, self._data)
        self.workspace.check_caches(self.backbone, "id-train", "id-val")

    @cached_property
    def _data(self) -> IdData:
        return self.backbone.id_data()

    def plan(self) -> Lines:
        """A line a mixture."""
        workspace, backbone = self.workspace, self.backbone
        if workspace.is_finetuned(backbone) and backbone.link_path.is_file():
            with suppress(CacheError):  # extracted with other settings, or not there any more
                check_before_training(workspace, backbone, self._data)
        to_train = set(workspace.to_train(backbone))
        return [
            f"{self.name} {variant} seed {seed}: {'would run' if (variant, seed) in to_train else 'fresh'}"
            for variant, seed in workspace.mixtures(backbone)
        ]

    def run(self, context: Context) -> Done:
        """Fit what is not fresh."""
        probe = self._probe(context)
        lines: Lines = [f"{self.name}: probe with strength {probe.strength:g} ({self._data.split.rule})"]
        lines += [f"{self.name}: {note}" for note in probe.notes("probe")]
        fresh, left = True, self._left(context)
        for variant, seed in self.workspace.mixtures(self.backbone):
            started = time.monotonic()
            done = (variant, seed) in left and self._train_mixture(variant, seed, context)
            fresh &= not done
            if not context.ranks.first:  # nor are the files there yet: rank 0 still fits the heads
                continue
            lines.append(self._line(variant, seed, done))
            if done and self.backbone.seed is None and self.workspace.on_trained is not None:
                self.workspace.on_trained(variant, time.monotonic() - started)
        return Done(lines, fresh)

    def _probe(self, context: Context) -> FittedHeads:
        if context.ranks.world == 1:
            return linear_probe(self.workspace, self.backbone, self._data, fits=True)
        from stages.train import train_probe

        return train_probe(self._data, self.backbone.probe_folder, context)

    def _left(self, context: Context) -> set[tuple[str, int]]:
        """Mixtures of which anything may be left to do."""
        mixtures = self.workspace.mixtures(self.backbone)
        if context.ranks.world > 1:  # joined processes ask each other
            return set(mixtures)
        configs = self.workspace.config.variant_configs()
        drawn = {name for name, config in configs.items() if config.tensorboard}  # curves may be missing
        return {own for own in mixtures if own[0] in drawn} | set(self.workspace.to_train(self.backbone))

    def _train_mixture(self, variant: str, seed: int, context: Context) -> bool:
        """Train and finish one mixture, or only finish that which was trained together with the backbone."""
        from stages.train import finish_joint, train_mofe

        backbone, folder = self.backbone, self.backbone.mixture_folder(variant, seed)
        context = replace(context, device=backbone.device)
        if variant == JOINT:
            return finish_joint(
                self._data, backbone.finetune_folder, lambda: backbone.architecture.end(), folder, context
            )
        config = self.workspace.config.variant_configs()[variant]
        probe = backbone.probe_folder
        return train_mofe(self._data, config, lambda: backbone.loaded.end(), seed, folder, context, probe)

    def _line(self, variant: str, seed: int, done: bool) -> str:
        folder = self.backbone.mixture_folder(variant, seed)
        about: dict[str, Any] = read_document(folder / "mofe.json") or {}
        return (
            f"{self.name} {variant} seed {seed}: {'done' if done else 'fresh'}, "
            f"{about['settings']['experts']} experts, epoch {about['best_epoch']} kept, {folder}"
        )
