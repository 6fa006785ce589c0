"""The images that a detector is most wrong, or least sure, about: thumbnails, or a list where they cannot be shown.

The report reads at most `MOST_PICTURES` images; nothing else in stage three opens any.
"""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.report.study import ReportedStudy
from stages.errors import InputError
from stages.id_data.lazy import Floats
from stages.inputs.images import SampleTable, decode_image
from stages.results.scored_study import Samples

MOST_PICTURES = 200  # of one page
_MOST_OF_A_SET = 12
_SIDE = 112  # of a thumbnail, pixels
_TINY = 48  # what is smaller is kept as it is


@dataclass(frozen=True)
class Picture:
    """One image of the gallery.

    Attributes:
        id: in its set.
        score: higher = more OOD.
        label: class name; empty for OOD images.
        prediction: class name.
        expert: that it went to; None without experts.
        uri: the thumbnail as a ``data:`` address; None where it cannot be shown.
        reason: why not.
    """

    id: str
    score: float
    label: str
    prediction: str
    expert: int | None
    uri: str | None
    reason: str


def galleries(study: ReportedStudy, most: int = MOST_PICTURES) -> list[dict[str, Any]]:
    """Of each set the images that look least like what they are, by the recommended method: ID as OOD, OOD as ID.

    Args:
        study: with its evidence.
        most: images to read in all.
    """
    method = study.recommended
    if method is None:
        return []
    samples = study.scored.samples(method, study.scored.first_seed(method))
    n = min(_MOST_OF_A_SET, most // len(samples))
    groups = dict.fromkeys(("id", *study.scored.shifted), "") | dict(study.oods)
    found = []
    for name, (rows, scores) in samples.items():
        # The least like their kind first; equal ones in the order of the set.
        order = np.argsort(scores if groups[name] else -scores, kind="stable")[:n]
        own = study.id_test if name == "id" else name
        reason, thumbnails = _thumbnails(study, own, rows.id[order].tolist())
        pictures = [
            _picture(rows, scores, row, thumbnails.get(str(rows.id[row]), (None, ""))) for row in order.tolist()
        ]
        found.append({"set": own, "group": groups[name], "pictures": pictures, "reason": reason})
    return found


def _picture(rows: Samples, scores: Floats, row: int, thumbnail: tuple[str | None, str]) -> Picture:
    return Picture(
        id=str(rows.id[row]),
        score=float(scores[row]),
        label=str(rows.label[row]),
        prediction=str(rows.prediction[row]),
        expert=None if rows.expert is None else int(rows.expert[row]),
        uri=thumbnail[0],
        reason=thumbnail[1],
    )


def _thumbnails(study: ReportedStudy, name: str, ids: Sequence[str]) -> tuple[str, dict[str, tuple[str | None, str]]]:
    """Why a set has no pictures, or ``""`` and each one's address or why there is none."""
    try:
        table = study.evidence.images(name)
    except InputError as error:
        return str(error), {}
    place = {id_: row for row, id_ in enumerate(table.ids)}
    digests = _digests(study, name, ids)
    return "", {id_: _thumbnail(table, place.get(id_), digests.get(id_)) for id_ in ids}


def _digests(study: ReportedStudy, name: str, ids: Sequence[str]) -> Mapping[str, bytes]:
    """SHA-256 of the images as they were extracted, where the cache still says it."""
    cache = study.evidence.caches.get(name)
    if cache is None:
        return {}
    rows = np.flatnonzero(np.isin(cache.ids, ids))
    return {str(cache.ids[row]): cache.image_hashes[row].tobytes() for row in rows}


def _thumbnail(table: SampleTable, row: int | None, digest: bytes | None) -> tuple[str | None, str]:
    if row is None:
        return None, "not in the set any more"
    try:
        data = table.reader().read(row)
        if digest is not None and hashlib.sha256(data).digest() != digest:
            return None, "another image now than the one that was scored"
        image = decode_image(data)
    except InputError as error:
        return None, str(error)
    out = io.BytesIO()
    if max(image.size) <= _TINY:
        image.save(out, "PNG")
        kind = "png"
    else:
        image.thumbnail((_SIDE, _SIDE))
        image.save(out, "JPEG", quality=80)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}", ""
