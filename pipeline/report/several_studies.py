"""``report A.toml B.toml …``: several studies in one page and one table."""

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.report.page import side_by_side, write_joint_report
from pipeline.report.study import ReportedStudy
from pipeline.study import Study
from pipeline.tables import terminal_table
from pipeline.terminal import Lines
from stages.errors import InputError
from stages.results.method import Method
from stages.results.scored_study import Line
from stages.results.table import write_summary


def joint_folder(studies: Sequence[Study], output: Path | None) -> Path:
    """Where the page of several studies goes: as asked, or into ``report`` beside their work folders.

    Raises:
        InputError: their work folders have nothing above them in common.
    """
    if output is not None:
        return output
    above = Path(os.path.commonpath([study.config.work.parent for study in studies]))
    if above == above.parent:
        raise InputError("the studies' work folders have no folder in common: say where the report goes with --output")
    return above / "report"


def joint_report(studies: Sequence[Study], folder: Path) -> Lines:
    """Write ``index.html`` and ``summary.csv``, ``.json``, ``.md``, ``.tex`` of several studies.

    Raises:
        InputError: one of them is not scored yet.
    """
    scored = [ReportedStudy.of(study.config.work, study.evidence()) for study in studies]
    path = write_joint_report(scored, folder, studies[0].progress)
    write_summary(folder, [line for study in scored for method in study.scored.lines for line in _lines(study, method)])
    tables = [
        terminal_table([line for study, method in group["lines"] for line in _lines(study, method)])
        for group in side_by_side(scored)
    ]
    return [*tables, f"summary: {folder / 'summary.csv'}, .json, .md, .tex", f"report: {path}"]


def _lines(study: ReportedStudy, method: Method) -> list[Line]:
    return [{"study": study.name} | line for line in study.scored.lines[method].values()]
