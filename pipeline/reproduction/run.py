"""``make study``: the runs of a study file one after the other, and whether they reproduce what they must.

study file ── its runs as experiments (`document`) ── what is not there, a line each (`missing`)
each run   ── extract ── kNN accuracy, before anything is trained (`targets`) ── train, score, report
WORK/      ── study.md, study.csv (`targets`), leaderboard.csv (`leaderboard`)
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import RunOptions
from pipeline.reproduction.document import StudyDocument, Target, load_study, run_configs
from pipeline.reproduction.leaderboard import LEADERBOARD_COLUMNS, is_full_spectrum, leaderboard_rows
from pipeline.reproduction.missing import missing_things
from pipeline.reproduction.selection import Selection
from pipeline.reproduction.targets import Reproduced, measure_features, measure_scores, not_run, write_verdicts
from pipeline.study import Study
from stages.errors import InputError, StageError
from stages.files.documents import write_text
from stages.results.formats import csv_text
from stages.results.scored_study import ScoredStudy


def run_reproduction(
    path: Path,
    data: Path,
    work: Path,
    selection: Selection | None = None,
    options: RunOptions | None = None,
    *,
    dry_run: bool = False,
) -> Iterator[Any]:
    """Run what a study file names, as far as it is not fresh; lines as they come.

    Args:
        path: the study file.
        data: folder of images, and of weights below ``weights``.
        work: folder of the runs and of what is said of all.
        selection: what of it to run; by default all.
        options: how to run.
        dry_run: say what would run, and no more.

    Raises:
        InputError: a setting is wrong, or something is missing; which, was said before.
        StageError: a number was not reproduced.
    """
    selection = selection or Selection()
    document = load_study(path)
    configs = run_configs(document, path, data, work, selection)
    lacking = missing_things(configs, data)
    yield from (f"missing: {what}: needed by {', '.join(runs)}" for what, runs in lacking.items())
    incomplete = {run for runs in lacking.values() for run in runs}
    complete = {name: config for name, config in configs.items() if name not in incomplete}
    if lacking and not (complete and selection.available):
        more = "; or give --available, which leaves those runs out" if complete else ""
        raise InputError(f"{path}: {len(lacking)} of the things that it needs are missing: put them there{more}")
    ready = {name: Study(config, options or RunOptions()) for name, config in complete.items()}
    found: list[Reproduced] = []
    try:
        yield from [study.outline() for study in ready.values()]
        if dry_run:
            for study in ready.values():
                yield from study.plan("run")
            return
        for name in configs:
            targets = document.targets_of(name)
            if name in incomplete:
                found += not_run(targets, "images or weights are missing")
                continue
            yield from _run(ready[name], targets, found)
    finally:
        for study in ready.values():
            study.workspace.close()
    yield from _write(document, ready, work, found)


def _run(study: Study, targets: Sequence[Target], found: list[Reproduced]) -> Iterator[Any]:
    """One run; its verdicts are added to those found."""
    yield from study.do("extract", "pretrained")
    of_features = measure_features(study.workspace, targets)
    found += of_features
    yield from map(str, of_features)
    others = [target for target in targets if not target.needs_features_alone]
    if any(own.verdict == "fail" for own in of_features):
        # Features that do not do what they are known to do are wrong, and hours of work on them are lost.
        reason = "the features are not those that were published"
        yield f"{study.config.name}: not trained and not scored: {reason}"
        found += not_run(others, reason)
        return
    yield from (line for line in study.run() if isinstance(line, str))
    of_scores = measure_scores(ScoredStudy(study.config.work / "scores"), others)
    found += of_scores
    yield from map(str, of_scores)


def _write(
    document: StudyDocument, studies: dict[str, Study], work: Path, found: Sequence[Reproduced]
) -> Iterator[Any]:
    """The tables of all runs; ends in an error where a number was not reproduced."""
    places = write_verdicts(work, found)
    stopped = {own.target.run for own in found if own.target.needs_features_alone and own.verdict == "fail"}
    scored = {name: ScoredStudy(study.config.work / "scores") for name, study in studies.items() if name not in stopped}
    for full_spectrum in (False, True)[: 1 + is_full_spectrum(scored)]:
        rows = [
            row
            for run in document.runs
            if run.name in scored and (scored[run.name].shifted or not full_spectrum)
            for row in leaderboard_rows(run, studies[run.name].config, scored[run.name], full_spectrum)
        ]
        places.append(work / f"leaderboard{'-fsood' if full_spectrum else ''}.csv")
        write_text(places[-1], csv_text(rows, LEADERBOARD_COLUMNS))
    counts = {verdict: sum(own.verdict == verdict for own in found) for verdict in ("pass", "fail", "not run")}
    summary = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    yield f"{document.name}: {summary}: {', '.join(map(str, places))}"
    if counts["fail"]:
        first = next(own for own in found if own.verdict == "fail")
        what = f"{counts['fail']} of {len(found)} numbers were not reproduced"
        raise StageError(f"{what}, the first {first}; see {places[0]}")
