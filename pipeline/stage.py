"""What a stage of a study is."""

from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple, Protocol, Self

from pipeline.backbones import StudyBackbone
from pipeline.terminal import Lines
from pipeline.workspace import Workspace
from stages.context import Context


class Done(NamedTuple):
    """What a stage says when it has run, and whether it found that there was nothing to do."""

    lines: Lines
    fresh: bool = False


class Stage(Protocol):
    """One step of a study: what it makes, whether that is there already, and how it is made.

    A stage is *fresh* where all that it leaves is there, as it was left, and made of what it would be made of now. It
    is then not run, unless it `looks_again`.

    Attributes:
        alone: whether nobody else may work on the study meanwhile.
        looks_again: whether it runs where it is fresh as well: it consists of parts, each fresh or not, and there is
            something to say or to note of those that are. Its record then stays that of the run that did the work.
        makes_backbones: whether `run`, after it, does for each fine-tuned backbone what it did for the pre-trained one.
        of_backbone: whether there is one for every backbone, rather than one of the study.
    """

    alone: ClassVar[bool] = True
    looks_again: ClassVar[bool] = False
    makes_backbones: ClassVar[bool] = False
    of_backbone: ClassVar[bool] = False

    workspace: Workspace

    @classmethod
    def before(cls, workspace: Workspace, planning: bool) -> None:
        """Refuse what can be known before the first of its kind begins, or is planned."""
        return

    @classmethod
    def of(cls, workspace: Workspace, backbones: Iterable[StudyBackbone], which: str) -> Iterator[Self]:
        """Those of its kind that are to run.

        Args:
            workspace: the study.
            backbones: to work on.
            which: how they were asked for: ``pretrained``, ``finetuned`` or ``all``.
        """
        ...

    @property
    def name(self) -> str:
        """Of its record, and how its lines begin."""
        ...

    def identity(self) -> str:
        """Digest of what it is made of; with `name`, of which run of it the record tells.

        Raises:
            InputError, CacheError: what it reads is not there yet.
        """
        ...

    def is_fresh(self) -> bool:
        """Whether there is nothing to do."""
        ...

    def check(self) -> None:
        """Refuse what it is bound to refuse, before it is recorded as begun."""
        return

    def plan(self) -> Lines:
        """What would run, what is fresh, and the bytes that would be written; does nothing."""
        ...

    def run(self, context: Context) -> Done:
        """Make what is not fresh."""
        ...

    def found(self) -> Lines:
        """What it says where it is fresh and not run."""
        return self.plan()


class BackboneStage(Stage):
    """A stage that there is one of for every backbone."""

    of_backbone: ClassVar = True

    def __init__(self, workspace: Workspace, backbone: StudyBackbone) -> None:
        self.workspace = workspace
        self.backbone = backbone

    @classmethod
    def of(cls, workspace: Workspace, backbones: Iterable[StudyBackbone], which: str) -> Iterator[Self]:
        """One for each backbone."""
        return (cls(workspace, backbone) for backbone in backbones)
