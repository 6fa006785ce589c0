"""What stage three left under ``scores``, read back: the one reader, for the report and for the benchmark.

Nothing is shown that is not as it was left: ``contents.json``, written last, says what the scores were made of and what
bytes every other file has.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.arrow import column_values
from stages.detection.sources import CS_ID
from stages.errors import InputError
from stages.files.documents import CONTENTS, changed_files, read_document
from stages.results.method import FROZEN_KNN, Method, samples_path
from stages.results.table import GROUPS, read_summary
from stages.scorers import AUTO

SCORE_SEMANTICS = 4  # raise it when the same caches, models and settings would give another table
# What a file that is not as this version writes it raises when it is looked into.
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)
_ABOUT_IMAGES = ["set", "id", "label", "prediction", "expert"]  # columns of the samples, beside the scores

Line = dict[str, Any]  # of summary.csv, table.json, id.json, thresholds.json


@dataclass(frozen=True, eq=False)
class Samples:
    """Every test image by one model: a row of ``samples/*.parquet``.

    Attributes:
        set: ``[n]`` name of its set.
        id: ``[n]``.
        label: ``[n]`` class name, empty for OOD images.
        prediction: ``[n]`` class name, empty where the head is ``none``.
        expert: ``[n]`` that the row went to; None without experts.
    """

    set: NDArray[np.str_]
    id: NDArray[np.str_]
    label: NDArray[np.str_]
    prediction: NDArray[np.str_]
    expert: NDArray[np.int64] | None

    def __getitem__(self, rows: NDArray[Any]) -> "Samples":
        expert = None if self.expert is None else self.expert[rows]
        return Samples(self.set[rows], self.id[rows], self.label[rows], self.prediction[rows], expert)

    def __len__(self) -> int:
        return len(self.id)


class ScoredStudy:
    """What lies under ``<work>/scores``; each file is read when it is first asked for.

    Attributes:
        folder: ``<work>/scores``.
        contents: what the scores are made of, and the digests of their files.

    Args:
        folder: as the attribute.

    Raises:
        InputError: a file is missing or has other bytes than stage three left; so do the properties, of a file that
            is not as this version writes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents = check_scores(folder)

    @cached_property
    def rows(self) -> list[Line]:
        """Of ``table.json``."""
        found: list[Line] = read_file(self.folder / "table.json", lambda path: _load(path, list))
        if not found:
            raise InputError(f"{self.folder} holds no result: run make score")
        return found

    @cached_property
    def lines(self) -> dict[Method, dict[tuple[str, str], Line]]:
        """Of each method the lines of the summary, by (OOD set or ``"average"``, group); the frozen kNN first."""
        summary: list[Line] = read_file(self.folder / "summary.csv", lambda path: read_summary(path.parent))
        found: dict[Method, dict[tuple[str, str], Line]] = {}
        for line in summary:
            found.setdefault(Method.of(line), {})[line["ood"], line["group"]] = line
        if not found:
            raise InputError(f"{self.folder} holds no result: run make score")
        return dict(sorted(found.items(), key=lambda item: item[0] != FROZEN_KNN))

    @cached_property
    def chosen(self) -> dict[Method, list[str]]:
        """What each ``auto`` chose, one score a seed at most; ``frozen`` before one that looks past the experts."""
        found: dict[Method, list[str]] = {}
        for row in self.rows:
            if row["score"] != AUTO:
                continue
            params = json.loads(row["params"])
            name = params["chosen"] if params["features"] == row["features"] else f"frozen {params['chosen']}"
            names = found.setdefault(Method.of(row), [])
            names += [] if name in names else [name]
        return found

    @cached_property
    def id(self) -> Line:
        """Of ``id.json``: accuracies, routers, k, split, overlap."""
        found: Line = read_file(self.folder / "id.json", lambda path: _load(path, dict))
        return found

    @cached_property
    def thresholds(self) -> list[Line]:
        """Of ``thresholds.json``."""
        found: list[Line] = read_file(self.folder / "thresholds.json", lambda path: _load(path, list))
        return found

    @cached_property
    def oods(self) -> list[tuple[str, str]]:
        """(name, group) of each OOD set, as the study has them."""
        return [(ood, group) for ood, group in self._sets if group != CS_ID]

    @cached_property
    def shifted(self) -> list[str]:
        """Names of the covariate-shifted ID sets."""
        return [name for name, group in self._sets if group == CS_ID]

    @cached_property
    def _sets(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((row["ood"], row["group"]) for row in self.rows if row["ood"] != "average"))

    @cached_property
    def ood_groups(self) -> list[str]:
        """Groups that have averages."""
        return [group for group in GROUPS if any(("average", group) in cells for cells in self.lines.values())]

    @cached_property
    def n_ood(self) -> dict[str, int]:
        """Images of each OOD set."""
        return {row["ood"]: row["n_ood"] for row in self.rows}

    @property
    def n_id(self) -> int:
        """Images of the ID test set."""
        return int(self.rows[0]["n_id"])

    @property
    def n_seeds(self) -> int:
        """Most seeds that a method has."""
        return max(line["n_seeds"] for cells in self.lines.values() for line in cells.values())

    def average(self, method: Method) -> Line | None:
        """The averages over all OOD sets; None for a diagnostic that has none."""
        return self.lines.get(method, {}).get(("average", "all"))

    def row(self, method: Method, ood: str, group: str) -> Line | None:
        """The row of ``table.json``, with its intervals, of a method that ran with one seed."""
        rows = self._rows_by_cell.get((method, ood, group), [])
        return rows[0] if len(rows) == 1 else None

    @cached_property
    def _rows_by_cell(self) -> dict[tuple[Method, str, str], list[Line]]:
        found: dict[tuple[Method, str, str], list[Line]] = {}
        for row in self.rows:
            found.setdefault((Method.of(row), row["ood"], row["group"]), []).append(row)
        return found

    @cached_property
    def seeds(self) -> dict[Method, list[int]]:
        """Seeds that each method was run with; none where nothing is random."""
        found: dict[Method, set[int]] = {}
        for (method, *_), rows in self._rows_by_cell.items():
            found.setdefault(method, set()).update(row["seed"] for row in rows if row["seed"] is not None)
        return {method: sorted(seeds) for method, seeds in found.items()}

    def first_seed(self, method: Method) -> int | None:
        """The first seed that a method was run with; None where nothing is random."""
        return next(iter(self.seeds.get(method, [])), None)

    @cached_property
    def first_thresholds(self) -> dict[Method, dict[float, Line]]:
        """Lines of `thresholds` of each method's first seed, by share of ID admitted."""
        found: dict[Method, dict[float, Line]] = {}
        for line in self.thresholds:
            if line["seed"] == self.first_seed(method := Method.of(line)):
                found.setdefault(method, {})[line["admit"]] = line
        return found

    def threshold(self, method: Method, admit: float) -> Line | None:
        """The first seed's threshold that admits a share of ID; None where it has none."""
        line = self.first_thresholds.get(method, {}).get(admit)
        return None if line is None or line["threshold"] is None else line

    def scores(self, method: Method, seed: int | None) -> dict[str, NDArray[np.float32]]:
        """Scores ``[n]`` of each set's images by the model of a seed; the ID test set's under ``"id"``."""
        path, table = self._sample_table(method, seed, ["set"])
        return self._by_set(path, np.asarray(table["set"].to_pylist()), column_values(table[method.column]))

    def samples(self, method: Method, seed: int | None) -> dict[str, tuple[Samples, NDArray[np.float32]]]:
        """Images of each set with their scores by the model of a seed; the ID test set's under ``"id"``."""
        path, table = self._sample_table(method, seed, _ABOUT_IMAGES)
        text = {name: np.asarray(table[name].to_pylist(), dtype=str) for name in _ABOUT_IMAGES[:-1]}
        expert = None if table["expert"].null_count else np.asarray(table["expert"].to_pylist(), dtype=np.int64)
        samples = Samples(**text, expert=expert)
        rows = self._by_set(path, samples.set, np.arange(len(samples)))
        scores = column_values(table[method.column])
        return {name: (samples[own], scores[own]) for name, own in rows.items()}

    def _sample_table(self, method: Method, seed: int | None, columns: list[str]) -> tuple[Path, Any]:
        import pyarrow.parquet as pq

        def read(path: Path) -> Any:
            with pq.ParquetFile(path) as file:  # not read_table, which imports pyarrow.dataset, and pandas with it
                return file.read(columns=wanted).select(wanted)

        path, wanted = samples_path(self.folder, method, seed), [*columns, method.column]
        return path, read_file(path, read)

    def _by_set(self, path: Path, sets: NDArray[np.str_], values: NDArray[Any]) -> dict[str, NDArray[Any]]:
        others = [name for name, _ in self._sets]
        found = {"id": values[~np.isin(sets, others)]} | {name: values[sets == name] for name in others}
        if empty := [name for name, own in found.items() if not len(own)]:
            raise InputError(f"{path} holds no image of {empty[0]}: run make score")
        return found


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


def read_file(path: Path, load: Callable[[Path], Any]) -> Any:
    """What `load` makes of a file that stage three left.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        return load(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: run make score") from None
    except DAMAGE as error:
        raise InputError(f"{path} cannot be read ({error}): delete it and run make score") from error


def _load(path: Path, kind: type) -> Any:
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, kind):
        raise TypeError(f"{'a list' if kind is list else 'an object'} expected")
    return value
