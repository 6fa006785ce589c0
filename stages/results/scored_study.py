"""What stage three leaves under ``scores``: how the files of samples are called, and whether all is as it was left.

``contents.json``, written last, says what the scores were made of and what bytes every other file has.
"""

from pathlib import Path
from typing import Any

from stages.errors import InputError
from stages.files.documents import CONTENTS, changed_files, read_document

FILES = (  # beside the samples
    "table.csv",
    "table.json",
    "summary.csv",
    "summary.json",
    "summary.md",
    "summary.tex",
    "id.json",
    "thresholds.json",
)
HEADS = ("none", "probe", "trained", "refit", "refit-group", "finetune", "given")  # of the table
_NOTHING = "none"  # where a column of the table is empty


def samples_path(
    folder: Path, backbone: str, features: str, head: str, variant: str, seed: int | None, routing: str
) -> Path:
    """Where the scores of every image stand: one file for each head of a choice of features, and for no two the same.

    ``<backbone>-<features>-<head>-<variant>-<seed>-<routing>.parquet``, ``none`` where there is nothing. A variant
    whose name would be read as another's, or as a part of the head, has one character written as in an address.

    Args:
        folder: ``<work>/scores``.
        backbone: as in the table, like all that follows.
        features: ``cls`` or ``mofe``.
        head: one of `HEADS`.
        variant: empty where there is none.
        seed: None where nothing is random.
        routing: ``none``, ``predicted``, ``top2`` or ``oracle``.

    >>> samples_path(Path(), "pretrained", "mofe", "refit-group", "x", 0, "top2").name
    'pretrained-mofe-refit-group-x-0-top2.parquet'
    >>> samples_path(Path(), "pretrained", "mofe", "refit", "group-x", 0, "top2").name
    'pretrained-mofe-refit-group%2Dx-0-top2.parquet'
    """
    longer = [other.removeprefix(f"{head}-") for other in HEADS if other.startswith(f"{head}-")]
    if variant == _NOTHING:
        variant = f"%{ord(variant[0]):02X}{variant[1:]}"
    elif any(variant.startswith(f"{rest}-") for rest in longer):
        variant = variant.replace("-", "%2D", 1)
    words = (backbone, features, head, variant or _NOTHING, _NOTHING if seed is None else str(seed), routing)
    return folder / "samples" / f"{'-'.join(words)}.parquet"


def check_scores(folder: Path) -> dict[str, Any]:
    """What the scores are made of, and what bytes: `identity` and `files`.

    Raises:
        InputError: a file is missing or has other bytes than stage three left.
    """
    contents = read_document(folder / CONTENTS)
    if contents is None:
        raise InputError(f"{folder / CONTENTS} is missing or damaged: run make score")
    for path, found in changed_files(folder / CONTENTS, contents):
        what = "is missing" if found is None else "is not as it was left"
        raise InputError(f"{path} {what}: run make score")
    return contents
