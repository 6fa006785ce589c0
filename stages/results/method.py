"""What a row of the table is about, seed and OOD set aside: its `Method`, and what is said of its words.

The baselines that every other method is compared with, and the one that is recommended, are named here and nowhere
else, before any run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from stages.detection.subject import NO_HEAD
from stages.scorers import AUTO

HEADS = {  # whose logits a score reads, in the order of the page, and what it says of each; `NO_HEAD` reads none
    "probe": "Linear probe on the backbone's own features.",
    "finetune": "The linear head that was trained together with the backbone.",
    "trained": "The experts' own heads, as they trained the experts.",
    "refit": "One regularised linear head over all classes, fitted on the refined features after training.",
    "refit-group": "The same for each expert, over its own group's classes.",
    "given": "Logits that came with the features.",
}
NO_ROUTING = "none"  # where there are no experts, or a score sees them all
ROUTINGS = {  # ways to send rows to experts, in the order of the page, and what it says of each
    "predicted": "The router decides, for ID and OOD rows alike.",
    "top2": "Scored by the router's two likeliest experts, the mean weighted by the gate, which costs twice as much.",
    "oracle": "ID rows by their true label, OOD rows by the router: a diagnostic, in no average.",
}
_NOTHING = "none"  # where a column of the table is empty


@dataclass(frozen=True)
class Method:
    """All that names a method, with the words of ``table.csv``.

    Attributes:
        backbone: ``pretrained`` or ``finetuned``.
        features: ``cls``, the backbone's own, or ``mofe``, refined by a mixture.
        head: one of `HEADS`, or `NO_HEAD`.
        variant: of the mixture; empty where there is none.
        routing: one of `ROUTINGS`, or `NO_ROUTING`.
        score: ``knn``, ``knn+energy``, …
        calibrated: whether scores are first put on their expert's scale.
    """

    backbone: str
    features: str
    head: str
    variant: str
    routing: str
    score: str
    calibrated: bool = False

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Self:
        """The method that a line of a table is about."""
        return cls(**{field.name: line[field.name] for field in fields(cls)})

    @property
    def column(self) -> str:
        """Its column in the file of samples."""
        return self.score + (" (calibrated)" if self.calibrated else "")


RECOMMENDED = Method("pretrained", "mofe", "refit", "default", "predicted", "knn+energy")
FROZEN_KNN = Method("pretrained", "cls", NO_HEAD, "", NO_ROUTING, "knn")  # stands first in every table
FROZEN_SUM = Method("pretrained", "cls", "probe", "", NO_ROUTING, RECOMMENDED.score)  # the same without a mixture
FROZEN_MAHALANOBIS = replace(FROZEN_KNN, score="mahalanobis-pp")  # its covariance is shrunk where rows are few
FROZEN_MEANS_SUM = replace(FROZEN_SUM, score="ncm+energy")


def recommended_of(has_experts: bool, has_classes: bool = True, scores: Sequence[str] = ()) -> Method:
    """What decides of new images where nothing is asked.

    The detector that is chosen for the study, where `scores` have ``auto``; else the sum of kNN and energy, each of
    which alone fails somewhere. Where ID images have no classes it is kNN, which asks for none; the head then says what
    an image is called.
    """
    method = RECOMMENDED if has_experts else FROZEN_SUM
    if not has_classes:
        return replace(method, score=FROZEN_KNN.score)
    return replace(method, score=AUTO) if AUTO in scores else method


# What every other method is compared with, by the name that columns of differences end in: ``auroc_minus_knn``.
BASELINES = {method.score: method for method in (FROZEN_KNN, FROZEN_SUM, FROZEN_MAHALANOBIS, FROZEN_MEANS_SUM)}


def samples_path(folder: Path, method: Method, seed: int | None) -> Path:
    """Where a method's scores of every image stand: one file for each head of a choice of features, each its own.

    ``<backbone>-<features>-<head>-<variant>-<seed>-<routing>.parquet``, ``none`` where there is nothing. A variant
    whose name would be read as another's, or as a part of the head, has one character written as in an address.

    Args:
        folder: ``<work>/scores``.
        method: whatever its score, which is a column of the file.
        seed: None where nothing is random.

    >>> samples_path(Path(), Method("pretrained", "mofe", "refit-group", "x", "top2", "knn"), 0).name
    'pretrained-mofe-refit-group-x-0-top2.parquet'
    >>> samples_path(Path(), Method("pretrained", "mofe", "refit", "group-x", "top2", "energy"), 0).name
    'pretrained-mofe-refit-group%2Dx-0-top2.parquet'
    """
    head, variant = method.head, method.variant
    longer = [other.removeprefix(f"{head}-") for other in HEADS if other.startswith(f"{head}-")]
    if variant == _NOTHING:
        variant = f"%{ord(variant[0]):02X}{variant[1:]}"
    elif any(variant.startswith(f"{rest}-") for rest in longer):
        variant = variant.replace("-", "%2D", 1)
    number = _NOTHING if seed is None else str(seed)
    words = (method.backbone, method.features, head, variant or _NOTHING, number, method.routing)
    return folder / "samples" / f"{'-'.join(words)}.parquet"
