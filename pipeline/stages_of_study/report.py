"""The report of a study: ``report/index.html``."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from typing import ClassVar, Self

from cache import CacheError
from pipeline.backbones import StudyBackbone
from pipeline.report.page import report_identity, write_report
from pipeline.report.study import Evidence, ReportedStudy
from pipeline.stage import Done, Stage
from pipeline.terminal import Lines
from pipeline.workspace import Workspace
from stages.context import Context
from stages.errors import InputError
from stages.files.documents import has_contents, write_contents
from stages.results.scored_study import ScoredStudy


class Report(Stage):
    """Write the page, unless it shows what it would show."""

    alone: ClassVar = False  # it reads, while others may train

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.folder = workspace.config.work / "report"

    @classmethod
    def of(cls, workspace: Workspace, backbones: Iterable[StudyBackbone], which: str) -> Iterator[Self]:
        """One for all."""
        yield cls(workspace)

    @property
    def name(self) -> str:
        """``report``."""
        return "report"

    def identity(self) -> str:
        """Nothing: the page shows the record, which is of this run from here on; what it shows is `_shown`."""
        return ""

    def _shown(self) -> ReportedStudy:
        """All that the page would show now; the record alone changes meanwhile."""
        return ReportedStudy(self._scored, self._evidence)

    @cached_property
    def _scored(self) -> ScoredStudy:
        return ScoredStudy(self.workspace.config.work / "scores")

    @cached_property
    def _evidence(self) -> Evidence:
        return evidence_of(self.workspace)

    def is_fresh(self) -> bool:
        """Whether the page is there, as it was left, and shows that."""
        return has_contents(self.folder, report_identity(self._shown()))

    def plan(self) -> Lines:
        """Whether the page would be another."""
        fresh = False
        with suppress(InputError):  # nothing is scored yet
            fresh = self.is_fresh()
        return [f"{self.name}: {'fresh,' if fresh else 'would write'} {self.folder / 'index.html'}"]

    def run(self, context: Context) -> Done:
        """Write the page."""
        shown = self._shown()
        path = write_report(shown, context.progress)
        write_contents(self.folder, report_identity(shown), [path.name])
        return Done([f"{self.name}: {path}"])


def evidence_of(workspace: Workspace) -> Evidence:
    """What a report may look at beside the study's own files, as far as it is still there."""
    caches = {}
    for entry in workspace.config.sets:
        with suppress(InputError, CacheError):  # not there any more, of other settings, or damaged
            cache = workspace.pretrained.cache(entry)
            cache.check()
            caches[entry.name] = cache
    return Evidence(workspace.config.sets_of("id-train")[0].name, caches, workspace.sets.images)
