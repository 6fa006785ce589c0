"""The page: sections of one study or of several, and the templates that format them."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cache import arrays_sha256, fingerprint
from pipeline.report import gallery, maps, mixtures, sections
from pipeline.report.study import ReportedStudy, as_written
from pipeline.report.wording import (
    COMPARED_METRICS,
    KINDS,
    SHOWN_METRICS,
    duration,
    method_name,
    percent,
    points,
    positive_class,
    score_title,
    size,
    verdict,
)
from stages.errors import InputError
from stages.files.documents import digest_of, write_text
from stages.progress import NullProgress, Progress
from stages.results.method import FROZEN_KNN, HEADS, ROUTINGS

if TYPE_CHECKING:
    from jinja2 import Environment


def write_report(study: ReportedStudy, progress: Progress | None = None) -> Path:
    """Write ``<work>/report/index.html``; the same files give the same bytes.

    Args:
        study: that was scored.
        progress: counts OOD sets, training logs and maps.

    Returns:
        Path of the page.

    Raises:
        InputError: something that ``score`` writes is missing or damaged.
    """
    path = study.folder / "report" / "index.html"
    write_text(path, _page([study], progress or NullProgress()))
    return path


def write_joint_report(studies: Sequence[ReportedStudy], folder: Path, progress: Progress | None = None) -> Path:
    """Write ``<folder>/index.html`` about several studies, which stand beside each other in its first table.

    Returns:
        Path of the page.

    Raises:
        InputError: as `write_report`.
    """
    path = folder / "index.html"
    write_text(path, _page(studies, progress or NullProgress()))
    return path


def report_identity(study: ReportedStudy) -> str:
    """Digest of all that the page of a study shows, and of what makes it."""
    stages = {name: stage for name, stage in study.record.get("stages", {}).items() if name != "report"}
    described = [path.with_name(name) for path in study.training_files() for name in (path.name, "mofe.json")]
    described += sorted(study.folder.glob("model/*/*/seed-*/refined/final/**/*.json"))
    shown = (study.id_test, *study.scored.shifted, *(ood for ood, _ in study.oods))
    here = Path(__file__)
    code = [*here.parent.glob("*.py"), *here.parents[1].glob("templates/*")]
    return fingerprint(
        {
            "scores": study.scored.contents,
            "record": study.record | {"stages": stages},
            "models": {str(path.relative_to(study.folder)): digest_of(path) for path in described},
            "features": {name: cache.digest for name, cache in study.evidence.caches.items()},
            "images": {name: _images_digest(study, name) for name in shown},
            "code": {path.name: digest_of(path) for path in sorted(code)},
        }
    )


def _images_digest(study: ReportedStudy, name: str) -> str:
    """Digest of the images of a set by id, size and time, or why there are none."""
    try:
        table = study.evidence.images(name)
    except InputError as error:
        return str(error)
    ids = np.asarray(table.ids, np.str_)
    return arrays_sha256({"ids": ids, "sizes": table.sizes, "times": table.mtimes_ns})


def _page(studies: Sequence[ReportedStudy], progress: Progress) -> str:
    _tell_apart(studies)
    bodies = []
    for number, study in enumerate(studies):
        with as_written(study.folder):
            shaped = _sections(study, progress, gallery.MOST_PICTURES // len(studies))
            prefix = f"study-{number}-" if len(studies) > 1 else ""
            bodies.append(_own_ids(_render("study.html.j2", shaped | {"id": prefix}), prefix))
    return _render("report.html.j2", {"studies": studies, "bodies": bodies, "side_by_side": side_by_side(studies)})


def _tell_apart(studies: Sequence[ReportedStudy]) -> None:
    """Add their folders to the names of those that are called alike, or their lines would be taken for one study's."""
    counts = Counter(study.name for study in studies)
    for study in [study for study in studies if counts[study.name] > 1]:
        above = os.path.commonpath([other.folder.parent for other in studies])
        study.name = f"{study.name} ({os.path.relpath(study.folder, above)})"


def _own_ids(body: str, prefix: str) -> str:
    """The same with ids of markers and clips that no other study of the page has: equal plots give equal ones.

    >>> _own_ids('<path id="m0123456789"/><use href="#m0123456789"/>', "b-")
    '<path id="b-m0123456789"/><use href="#b-m0123456789"/>'
    """
    return re.sub(r"""(id="|href="#|url\(#)([mp][0-9a-f]{10})""", rf"\g<1>{prefix}\g<2>", body)


def _render(name: str, values: Mapping[str, Any]) -> str:
    names = {
        "metrics": SHOWN_METRICS,
        "compared": COMPARED_METRICS,
        "baseline": FROZEN_KNN,
        "heads": HEADS,
        "meaning_of_routing": ROUTINGS,
        "kinds": KINDS,
    }
    return _templates().get_template(name).render(names | dict(values))


@cache
def _templates() -> "Environment":
    """Compiled once, however many pages are written."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "positive_class": positive_class,
        "verdict": verdict,
        "duration": duration,
        "size": size,
        "score_title": score_title,
        "method_name": method_name,
    }
    return environment


def _sections(study: ReportedStudy, progress: Progress, most_pictures: int) -> dict[str, Any]:
    progress.start(len(study.oods) + len(study.logs) + 2, "plot", f"report {study.name}")
    routers = mixtures.routers(study)
    config = study.record.get("config")
    shaped = {
        "study": study,
        "config": config,
        "config_text": json.dumps(config, indent=2, ensure_ascii=False),
        "table": sections.table(study),
        "sets": sections.per_set(study),
        "selective": sections.selective(study),
        "shifted": sections.shifted(study),
        "distributions": sections.distributions(study, progress),
        "maps": maps.feature_maps(study, progress),
        "variants": mixtures.variants(study),
        "accuracy": sections.accuracy_over_seeds(
            study.scored.id["accuracy"], ("backbone", "features", "variant", "head")
        ),
        "routers": routers,
        "routings": [name for name in ROUTINGS if any(name in line["id_accuracy"] for line in routers)],
        "oracle": mixtures.oracle(study),
        "classes": mixtures.classes(study),
        "training": sections.training(study, progress),
        "galleries": gallery.galleries(study, most_pictures),
        "thresholds": sections.thresholds(study),
        "cost": sections.cost(study),
    }
    progress.close()
    return shaped


def side_by_side(studies: Sequence[ReportedStudy]) -> list[dict[str, Any]]:
    """Studies with the same test sets together: the frozen baselines and the recommended method of each.

    What was tested on other images is not to be compared: bold is the best of a group.
    """
    groups: dict[Any, list[ReportedStudy]] = {}
    for study in studies:
        tested = (study.scored.n_id, tuple((ood, group, study.scored.n_ood[ood]) for ood, group in study.oods))
        groups.setdefault(tested, []).append(study)
    found = []
    for members in groups.values():
        lines = [(study, method) for study in members for method in study.compared]
        cells = {
            group: [study.scored.lines[method].get(("average", group)) for study, method in lines]
            for group in members[0].scored.ood_groups
        }
        found.append(
            {
                "studies": members,
                "lines": lines,
                "groups": members[0].scored.ood_groups,
                "best": {group: sections.best(own) for group, own in cells.items()},
            }
        )
    return found
