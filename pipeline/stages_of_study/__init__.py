"""The stages of a study, in the order in which `run` runs them: the one list that all else follows from.

Verbs of the command line and of make, ``--help``, ``--dry-run``, ``run`` and the record come from it. To add a stage,
write a module here whose class of the same name is a `pipeline.stage.Stage`, and name it in a line below.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.stage import Stage


@dataclass(frozen=True)
class Listed:
    """A stage as the command line knows it; what it works with is imported when it is first needed.

    Attributes:
        verb: of the command line, and the module here that holds the stage.
        about: what ``--help`` says.
        options: of the verb, names in `pipeline.options.OF_STAGES`; ``--dry-run`` is every stage's.
    """

    verb: str
    about: str
    options: tuple[str, ...] = ()

    def load(self) -> "type[Stage]":
        """Its class, called as its module."""
        found: type[Stage] = getattr(import_module(f"{__name__}.{self.verb}"), self.verb.capitalize())
        return found


_TRAINING = ("processes", "cluster", "backbone")

STAGES = (
    Listed("extract", "Stage one: images to sealed feature caches.", ("cluster", "images", "backbone")),
    Listed("train", "Stage two: probe and Mixture of Feature Experts, on cached features.", _TRAINING),
    Listed("finetune", "Stage two, the other half: the whole backbone end to end, on images.", ("processes",)),
    Listed("score", "Stage three: OOD scores and the table, from caches alone.", ("cluster", "backbone")),
    Listed("report", "Write report/index.html, or one page of several studies."),
)
