"""Stage two, the other half: one fine-tuned backbone, with `joint` together with experts.

What trains is imported where there is something to train.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Self

from cache import fingerprint
from pipeline.backbones import StudyBackbone
from pipeline.checks import check_before_tuning
from pipeline.stage import Done, Stage
from pipeline.terminal import Lines
from pipeline.workspace import Workspace
from stages.context import Context
from stages.files.documents import read_document
from stages.id_data.rows import IdData


class Finetune(Stage):
    """Fine-tune the whole backbone on images, with one seed."""

    looks_again: ClassVar = True
    makes_backbones: ClassVar = True

    def __init__(self, workspace: Workspace, backbone: StudyBackbone) -> None:
        self.workspace = workspace
        self.backbone = backbone

    @classmethod
    def before(cls, workspace: Workspace, planning: bool) -> None:
        """Refuse settings that the network's shape does not allow."""
        if not planning:
            workspace.pretrained.id_data()  # not extracted yet: that is said first
        check_before_tuning(workspace, lambda: workspace.pretrained.architecture)

    @classmethod
    def of(cls, workspace: Workspace, backbones: Iterable[StudyBackbone], which: str) -> Iterator[Self]:
        """One for each backbone that is to be made, whichever there are."""
        return (cls(workspace, backbone) for backbone in workspace.finetuned)

    @property
    def name(self) -> str:
        """``finetune`` and the seed."""
        return f"finetune seed {self.backbone.seed}"

    def identity(self) -> str:
        """Digest of the images and their split; the settings are compared by what is in the folder."""
        return fingerprint(self._data.identity)

    def is_fresh(self) -> bool:
        """Whether the backbone is there, made with the settings of now."""
        return self.workspace.is_finetuned(self.backbone)

    def check(self) -> None:
        """Refuse features that are not as they were sealed: they say which images there are."""
        self.workspace.check_caches(self.workspace.pretrained, "id-train", "id-val")

    @cached_property
    def _data(self) -> IdData:
        return self.workspace.pretrained.id_data()

    def plan(self) -> Lines:
        """Whether it would run."""
        state = f"fresh, {self.backbone.finetune_folder}" if self.is_fresh() else "would run"
        return [f"{self.name}: {state}"]

    def run(self, context: Context) -> Done:
        """Train, unless the folder is fresh."""
        done = self._tune(context)
        about: dict[str, Any] = read_document(self.backbone.finetune_folder / "finetune.json") or {}
        line = (
            f"{self.name}: {'done' if done else 'fresh'}, epoch {about['best_epoch']} kept, "
            f"held-out ID accuracy{'' if self._data.labels == 'given' else ' by clusters'} "
            f"{100 * about['select_accuracy']:.1f} %, {self.backbone.finetune_folder}"
        )
        return Done([line], fresh=not done)

    def _tune(self, context: Context) -> bool:
        """Whether there was anything to do."""
        config, sets, backbone = self.workspace.config, self.workspace.sets, self.backbone
        assert config.finetune is not None
        assert backbone.seed is not None
        # Joined processes ask each other, and of a run that is there curves may be missing.
        if context.ranks.world == 1 and not config.finetune.tensorboard and self.is_fresh():
            return False
        from stages.finetune import TuningImages, finetune

        (train,), val = config.sets_of("id-train"), config.sets_of("id-val")
        return finetune(
            self.workspace.pretrained.start,
            TuningImages(self._data, sets.table(train), sets.table(val[0] if val else train)),
            config.finetune,
            backbone.seed,
            backbone.finetune_folder,
            replace(context, device=backbone.device),
            self.workspace.joint_plan(self._data),
        )
