"""Whether a run reproduces the numbers that it must."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.reproduction.document import Target, Verdict
from pipeline.workspace import Workspace
from stages.detection.subject import NO_HEAD
from stages.files.documents import read_document, write_document, write_text
from stages.metrics.ranking import METRICS
from stages.results.formats import csv_text, markdown_table
from stages.results.method import FROZEN_SUM, NO_ROUTING, Method
from stages.results.scored_study import ScoredStudy
from stages.results.table import GROUPS
from stages.sanity import VOTE_K, VOTE_TEMPERATURE, knn_accuracy
from stages.scorers import reads_head

_KNN_FILE = (
    "knn-accuracy.json"  # below the work folder of a run: the search takes minutes where there are a million rows
)


@dataclass(frozen=True)
class Reproduced:
    """A target and what was found.

    Attributes:
        target: the published number.
        found: per cent; None where it was not measured.
        reason: why it was not.
    """

    target: Target
    found: float | None = None
    reason: str = ""

    @property
    def verdict(self) -> Verdict:
        """Whether it is within its tolerance."""
        if self.found is None:
            return "not run"
        return "pass" if round(abs(self.found - self.target.value), 9) <= self.target.tolerance else "fail"

    def __str__(self) -> str:
        own = self.target
        what = " ".join(filter(None, (own.run, own.score, own.of, own.measure)))
        found = self.reason if self.found is None else f"{self.found:.2f}"
        return f"{self.verdict}: {what}: {found}, published {own.value:g} ± {own.tolerance:g} ({own.source})"


def measure_features(workspace: Workspace, targets: Sequence[Target]) -> list[Reproduced]:
    """Those that features alone are needed for; the caches must be there."""
    wanted = [target for target in targets if target.needs_features_alone]
    return [Reproduced(target, 100 * _knn_accuracy(workspace)) for target in wanted]


def _knn_accuracy(workspace: Workspace) -> float:
    """Of id-test rows by their neighbours among *all* id-train rows, whatever the study holds out of them."""
    (train,), (test,) = workspace.config.sets_of("id-train"), workspace.config.sets_of("id-test")
    caches = [workspace.pretrained.cache(entry) for entry in (train, test)]
    identity = {"caches": [cache.digest for cache in caches], "k": VOTE_K, "temperature": VOTE_TEMPERATURE}
    path = workspace.config.work / _KNN_FILE
    known = read_document(path)
    if known is None or known.get("of") != identity:
        known = {"of": identity, "accuracy": knn_accuracy(*caches)}
        write_document(path, known)
    return float(known["accuracy"])


def measure_scores(scored: ScoredStudy, targets: Sequence[Target]) -> list[Reproduced]:
    """The others: rows of the frozen backbone in the table."""
    return [_measure(scored, target) for target in targets if not target.needs_features_alone]


def _measure(scored: ScoredStudy, target: Target) -> Reproduced:
    score, of = str(target.score), str(target.of)
    head = FROZEN_SUM.head if reads_head(score) else NO_HEAD
    cells = scored.lines.get(Method("pretrained", "cls", head, "", NO_ROUTING, score))
    if cells is None:
        return Reproduced(target, reason=f"{score} was not scored")
    wanted = ("average", of) if of in GROUPS else (of, None)
    line = next((own for (ood, group), own in cells.items() if ood == wanted[0] and wanted[1] in (None, group)), None)
    value = None if line is None else line.get(f"{target.measure}_mean")
    if value is None:
        return Reproduced(target, reason=f"the table has no {target.measure} of {of}")
    return Reproduced(target, 100 * value)


def not_run(targets: Sequence[Target], reason: str) -> list[Reproduced]:
    """All of them, for one reason."""
    return [Reproduced(target, reason=reason) for target in targets]


def write_verdicts(work: Path, found: Sequence[Reproduced]) -> list[Path]:
    """Write ``study.md`` and ``study.csv``: a line a target."""
    lines = [_line(own) for own in found]
    columns = list(_line(found[0])) if found else []
    header = ["run", "score", "of", "measure", "published", "tolerance", "found", "", "source"]
    body = [
        ["" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value) for value in line.values()]
        for line in lines
    ]
    title = "# What must be reproduced\n\nPer cent; FPR95 (`fpr95`) has ID positive, `fpr95_ood` OOD positive.\n\n"
    write_text(work / "study.md", title + markdown_table(header, body))
    write_text(work / "study.csv", csv_text(lines, columns))
    return [work / "study.md", work / "study.csv"]


def _line(own: Reproduced) -> dict[str, Any]:
    target = own.target
    return {
        "run": target.run,
        "score": target.score,
        "of": target.of,
        "measure": METRICS[target.measure].heading if target.measure in METRICS else target.measure,
        "published": target.value,
        "tolerance": target.tolerance,
        "found": own.found,
        "verdict": own.verdict if own.found is not None else f"{own.verdict}: {own.reason}",
        "source": target.source,
    }
