"""How `predict` is to decide, as it is asked on the command line."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.predict import Per


@dataclass(frozen=True)
class Deciding:
    """What decides of new images, and what is promised.

    Attributes:
        score_name: which score; None: the detector's own choice.
        per: whose ID images are promised how many false alarms: all, or those of each class or expert.
        fdr: share of ID among the images that are flagged together, at most; None: images are not judged together.
    """

    score_name: str | None = None
    per: "Per" = "all"
    fdr: float | None = None
