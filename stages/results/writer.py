"""What stage three writes under ``scores``: the other side of `stages.results.scored_study`."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cache.arrow import column_of_numbers, column_of_text
from stages.detection.conformal import ThresholdEstimate
from stages.files.documents import write_contents, write_json
from stages.results.method import Method, samples_path
from stages.results.table import MethodRun, OODRow, Replicates, summarise, write_table

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
_THRESHOLD_COLUMNS = (
    *("backbone", "features", "variant", "seed", "head", "routing", "score", "params", "profile", "calibrated"),
)


@dataclass
class IdRecord:
    """What ``id.json`` says.

    Attributes:
        accuracy: of each head on ID test rows.
        shifted_accuracy: of each head on the labelled rows of each covariate-shifted ID set.
        router: accuracy, load and cost of each mixture's router.
        k: of each choice of features, and by which rule.
        split: the rule of each backbone.
        overlap: images that stand in two sets.
    """

    accuracy: list[dict[str, Any]] = field(default_factory=list)
    router: list[dict[str, Any]] = field(default_factory=list)
    k: list[dict[str, Any]] = field(default_factory=list)
    split: dict[str, str] = field(default_factory=dict)
    overlap: list[dict[str, Any]] = field(default_factory=list)
    shifted_accuracy: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class SampleBlock:
    """Some images of a set, as a file of samples has them.

    Attributes:
        set: its name.
        id: ``[n]``.
        label: ``[n]`` class names; empty for OOD images.
        prediction: ``[n]`` class names; empty where the head predicts none.
        expert: ``[n]`` that each went to; None without experts.
        confidence: ``[n]`` the router's probability of its choice; None without experts.
        scores: ``[n]`` of each column.
    """

    set: str
    id: Sequence[str]
    label: Sequence[str]
    prediction: Sequence[str]
    expert: NDArray[np.int64] | None
    confidence: NDArray[np.float32] | None
    scores: dict[str, NDArray[np.float32]]

    def table(self) -> pa.Table:
        """As it is written."""
        n = len(self.id)
        about = {"set": [self.set] * n, "id": self.id, "label": self.label, "prediction": self.prediction}
        routes = {"expert": (self.expert, np.int64), "confidence": (self.confidence, np.float64)}
        columns: dict[str, Any] = {name: column_of_text(values) for name, values in about.items()}
        for name, (values, dtype) in routes.items():
            columns[name] = pa.nulls(n) if values is None else column_of_numbers(values.astype(dtype))
        return pa.table(
            columns | {name: column_of_numbers(np.asarray(own, np.float32)) for name, own in self.scores.items()}
        )


class ScoresWriter:
    """Takes what is found of one method after the other; the scores are whole when `finish` returns.

    Attributes:
        rows: of the table, with what they would be on other images.
        id: what ``id.json`` is to say.

    Args:
        folder: ``<work>/scores``.
    """

    def __init__(self, folder: Path) -> None:
        self.rows: list[tuple[OODRow, Replicates]] = []
        self.id = IdRecord()
        self._folder = folder
        self._thresholds: list[dict[str, Any]] = []
        self._samples: set[Path] = set()

    def add_threshold(self, run: MethodRun, estimate: ThresholdEstimate) -> None:
        """A threshold of a method."""
        columns = run.columns
        self._thresholds.append({name: columns[name] for name in _THRESHOLD_COLUMNS} | asdict(estimate))

    def write_samples(self, method: Method, seed: int | None, blocks: Iterable[SampleBlock]) -> None:
        """Write the file of a head: a row per image, a float32 column per score; it arrives whole."""
        path = samples_path(self._folder, method, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with ExitStack() as stack:
            writer: pq.ParquetWriter | None = None
            for block in blocks:
                table = block.table()
                writer = writer or stack.enter_context(pq.ParquetWriter(temporary, table.schema))
                writer.write_table(table)
        temporary.replace(path)
        self._samples.add(path)

    def finish(self, identity: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Write all other files, and last what the folder holds; files of methods that are no more go.

        Args:
            identity: of all that the scores are made of.

        Returns:
            Lines of the table, and of its summary over seeds.
        """
        table, summary = [row.columns for row, _ in self.rows], summarise(self.rows)
        write_json(self._folder / "id.json", asdict(self.id))
        write_json(self._folder / "thresholds.json", self._thresholds)
        for left in set((self._folder / "samples").glob("*.parquet")) - self._samples:
            left.unlink()
        write_table(self._folder, table, summary)
        names = (path.relative_to(self._folder).as_posix() for path in self._samples)
        write_contents(self._folder, identity, [*FILES, *names])
        return table, summary
