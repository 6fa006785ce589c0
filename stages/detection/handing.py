"""Who fits scores and scores rows: this process, or a cluster where there are many rows.

::

    scores/.handed-<number>/
        bank.pickle, 0.pickle, …    rows, as plans: where they are read, and what is computed of them
        scorers.pickle              fitted scores
        fit-3.pickle                a score that somebody fitted
        0-000000032768.safetensors  scores of a block of rows

All of it is on the disk that workers share, and gone when the scores are there. A score is fitted whole by one worker,
and a block is scored as one process would, by all scores: bits do not depend on who does it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from cache.files import write_file
from stages.context import Cluster
from stages.detection.detectors import raw_scores
from stages.detection.subject import BLOCK_ROWS, SetRows
from stages.errors import NotFiniteError
from stages.files.handed import HandedFolder, unpickled
from stages.files.places import dumped
from stages.files.tensors import read_handed, write_tensors
from stages.id_data.lazy import Floats
from stages.progress import MOMENT, SILENT, Progress
from stages.scorers.inputs import check_finite
from stages.scorers.neighbours.knn import KNNScorer
from stages.scorers.scorer import Scorer

_MANY_ROWS = 1 << 17  # in all: fewer are done in less time than workers need to start
_HEADS = Sequence[tuple[Scorer, str]]  # scorers, and whose logits they read


@dataclass(frozen=True)
class FitItem:
    """A score to be fitted.

    Attributes:
        rows: file of the rows to fit on, and of those to choose settings by.
        scorer: not fitted: its settings.
        head: whose logits it reads.
        path: of the file that the fitted one goes to.
        threads: of one process that would fit it, by kind of library; their number is seen in the last bits.
    """

    rows: str
    scorer: Scorer
    head: str
    path: str
    threads: dict[str, int]

    def __str__(self) -> str:
        return f"the fit of {self.scorer.name}"


@dataclass(frozen=True)
class ScoreItem:
    """A block of rows to be scored.

    Attributes:
        name: of the set.
        rows: file of all of its rows.
        scorers: file of the fitted scores, with their heads.
        start: first row of the block.
        path: of the file that the scores go to.
        threads: as in `FitItem`.
    """

    name: str
    rows: str
    scorers: str
    start: int
    path: str
    threads: dict[str, int]

    def __str__(self) -> str:
        return f"rows of {self.name} from {self.start} on, to be scored"


def fit_item(item: FitItem) -> None:
    """Fit one score in whatever process this is."""
    bank, select = _fitted_on_by_process(item.rows)
    with threadpool_limits(item.threads):
        fitted = item.scorer.fit(bank.inputs(item.head), select.inputs(item.head))
    write_file(Path(item.path), dumped(fitted))


def score_item(item: ScoreItem) -> int:
    """Score one block in whatever process this is, which keeps the scores for the next; returns how many rows."""
    rows = _rows_of_process(item.rows).take(slice(item.start, item.start + BLOCK_ROWS))
    with threadpool_limits(item.threads):
        found = raw_scores(_scorers_of_process(item.scorers), rows)
    write_tensors(Path(item.path), {str(number): scores for number, scores in enumerate(found)})
    return len(rows)


@lru_cache(maxsize=1)
def _fitted_on_by_process(path: str) -> tuple[SetRows, SetRows]:
    """Rows to fit on, whose moments stay for the next score, and those to choose settings by."""
    bank, select = unpickled(path)
    return bank.sharing(), select


# What a process keeps: sets of rows that come in turn must not put the scores out.
_rows_of_process, _scorers_of_process = lru_cache(maxsize=2)(unpickled), lru_cache(maxsize=1)(unpickled)


@dataclass(frozen=True, eq=False)
class Handing:
    """Fits scores and scores rows, by a cluster where there are many; to the bits of this process.

    Neighbours are searched by `stages.scorers.neighbours.store`, which knows of the cluster itself; scores of patches
    and taps stay here.

    Attributes:
        cluster: who else works; None: this process does everything.
        folder: for what workers read and write.
        least_rows: how many are many.
        progress: counts scores that are fitted, and rows that are scored.
    """

    cluster: Cluster | None = None
    folder: Path = Path()
    least_rows: int = _MANY_ROWS
    progress: Progress = SILENT

    def fit(self, scorers: _HEADS, bank: SetRows, select: SetRows, name: str = "") -> list[Scorer]:
        """Scores, in their order, fitted with their heads on rows.

        Args:
            scorers: not fitted, and whose logits they read.
            bank: ID training rows.
            select: held-out ID rows.
            name: of the choice of features, for the progress.

        Raises:
            InputError: as `Scorer.fit`.
            StageError: as `stages.context.Cluster.map`.
        """
        self.progress.start(len(scorers), "score", f"fit {name}", MOMENT)
        given = self._given(scorers, len(bank) + len(select))
        fitted: dict[int, Scorer] = {}
        if given:
            assert self.cluster is not None
            with HandedFolder(self.folder) as shared:
                rows = shared.file("bank", (_travelling(bank), _travelling(select)))
                items = {
                    index: FitItem(rows, *scorers[index], shared.path(f"fit-{index}.pickle"), _threads())
                    for index in given
                }
                for _ in self.cluster.map(fit_item, items.values()):
                    self.progress.advance()
                fitted = {index: unpickled(item.path) for index, item in items.items()}
        bank = bank.sharing()
        for index, (scorer, head) in enumerate(scorers):
            if index not in fitted:
                fitted[index] = scorer.fit(bank.inputs(head), select.inputs(head))
                self.progress.advance()
        self.progress.close()
        return [fitted[index] for index in range(len(scorers))]

    def raw_scores(self, scorers: _HEADS, sets: Mapping[str, SetRows], name: str = "") -> dict[str, list[Floats]]:
        """Scores of the rows of each set, ``[n]`` by each fitted scorer with its head; `name` is as in `fit`.

        Raises:
            NotFiniteError: a row that holds NaN or inf.
            StageError: as `stages.context.Cluster.map`.
        """
        n = sum(map(len, sets.values()))
        given = self._given(scorers, n)
        here = [index for index in range(len(scorers)) if index not in given]
        self.progress.start(n * (bool(here) + bool(given)), "row", f"score rows of {name}", MOMENT)
        found: dict[str, dict[int, Floats]] = {key: {} for key in sets}
        if here:
            own = [scorers[index] for index in here]
            for key, rows in sets.items():
                found[key] |= zip(here, raw_scores(own, rows, self.progress), strict=True)
        if given:
            for key, scores in self._by_cluster([scorers[index] for index in given], sets).items():
                found[key] |= zip(given, scores, strict=True)
        self.progress.close()
        return {key: [scores[index] for index in range(len(scorers))] for key, scores in found.items()}

    def _given(self, scorers: _HEADS, n_rows: int) -> list[int]:
        """Which scorers are handed out."""
        if self.cluster is None or n_rows < self.least_rows:
            return []
        return [
            index
            for index, (scorer, _) in enumerate(scorers)
            if not isinstance(scorer, KNNScorer) and not scorer.needs & {"patches", "taps"}
        ]

    def _by_cluster(self, scorers: _HEADS, sets: Mapping[str, SetRows]) -> dict[str, list[Floats]]:
        assert self.cluster is not None
        with HandedFolder(self.folder) as shared:
            fitted = shared.file("scorers", scorers)
            items: list[ScoreItem] = []
            for number, (name, rows) in enumerate(sets.items()):
                file = shared.file(str(number), _travelling(rows))
                items += [
                    ScoreItem(name, file, fitted, start, shared.path(f"{number}-{start:012d}.safetensors"), _threads())
                    for start in range(0, len(rows), BLOCK_ROWS)
                ]
            try:
                for scored in self.cluster.map(score_item, items):
                    self.progress.advance(scored)
            except NotFiniteError as error:  # who found it saw a block
                for rows in sets.values():
                    for head in dict.fromkeys(head for _, head in scorers):
                        check_finite(rows.inputs(head), "scored", error)
                raise
            found = {name: [np.empty(len(rows), np.float32) for _ in scorers] for name, rows in sets.items()}
            for item in items:
                for place, scores in read_handed(Path(item.path)).items():
                    found[item.name][int(place)][item.start : item.start + BLOCK_ROWS] = scores
        return found


def _travelling(rows: SetRows) -> SetRows:
    """The rows without what stays here."""
    frozen = None if rows.frozen is None else _travelling(rows.frozen)
    return replace(rows, patches=None, taps=None, frozen=frozen)


def _threads() -> dict[str, int]:
    """Of this process, by kind of library: ``blas``, ``openmp``."""
    pools = [(str(pool["user_api"]), int(pool["num_threads"])) for pool in threadpool_info()]
    return {kind: max(n for other, n in pools if other == kind) for kind, _ in pools}
