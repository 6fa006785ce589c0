"""Distance to the k-th nearest ID training feature, in the routed expert's subspace where there are experts."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stages.errors import InputError
from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.neighbours.bank import FeatureBank, IndexKind
from stages.scorers.neighbours.space import RAW, Space, SpaceName, bank_in, queries_in
from stages.scorers.neighbours.store import NeighbourStore
from stages.scorers.scorer import Scorer
from stages.scorers.shared.pairs import seeded_share

_RECALL_ROWS = 256  # of held-out ID, to tell how many exact neighbours an approximate index finds


def knn_score(features: ArrayLike, bank: FeatureBank, k: int, exclude_self: bool = False) -> NDArray[np.float32]:
    """√(2 − 2·cos) to the k-th nearest feature of the bank, clipped at 0; higher = more OOD.

    Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022.

    Args:
        features: [n, D], any float type; normalised by the bank.
        bank: ID training features.
        k: which neighbour counts.
        exclude_self: leave-one-out, where ``features`` are the bank's own rows, in order.

    Returns:
        [n] float32 in [0, 2].

    Raises:
        InputError: as `FeatureBank.search`.

    >>> knn_score([[2.0, 0.0]], FeatureBank([[1.0, 0.0], [0.0, 1.0]]), k=2).round(3).tolist()
    [1.4140000343322754]
    """
    return bank.search(features, k, exclude_self)[0][:, -1]


class ExpertBanks:
    """One `FeatureBank` for each expert of the training rows; a single one where they name no expert.

    Args:
        train: ID training rows with ``features``, and ``expert`` where each expert has a subspace of its own.
        device: as in `FeatureBank`.
        space: as in `Space.of`, of each expert's rows.

    Raises:
        InputError: no rows, no features, or NaN or inf in one.
    """

    def __init__(self, train: ScoreInputs, device: Literal["auto", "cpu"] = "auto", space: SpaceName = RAW) -> None:
        if not len(train):
            raise InputError("a bank needs ID training rows, none given")
        features = train.need_unread("a bank")
        self._routed = train.expert is not None
        expert = np.zeros(len(train), dtype=int) if train.expert is None else train.expert
        rows = {int(e): features[expert == e] for e in np.unique(expert)}
        self._spaces = {e: Space.of(space, ScoreInputs(features=own), "a bank") for e, own in rows.items()}
        self.banks = {e: FeatureBank(bank_in(self._spaces[e], own), device) for e, own in rows.items()}

    @property
    def sizes(self) -> dict[int, int]:
        """Rows of each expert's bank."""
        return {expert: len(bank) for expert, bank in self.banks.items()}

    def distances(self, x: ScoreInputs, k_max: int, neighbours: NeighbourStore | None = None) -> NDArray[np.float32]:
        """Distances to the ``k_max`` nearest rows of each row's own bank: a score for every k is a column.

        Args:
            x: rows with ``features``, and ``expert`` exactly where the bank has it.
            k_max: neighbours. Where a bank has fewer rows, its farthest fills the columns beyond.
            neighbours: remembers what was searched.

        Returns:
            [n, k_max] float32, ascending.

        Raises:
            InputError: ``expert`` on one side alone, or an expert without training rows.
        """
        features = x.need("features", "kNN")
        if self._routed != (x.expert is not None):
            raise InputError(
                "rows that name an expert need a bank that does, and the reverse: "
                f"the bank has {len(self.banks)} expert(s), the rows {'none' if x.expert is None else 'name theirs'}"
            )
        expert = np.zeros(len(x), dtype=int) if x.expert is None else x.expert
        if unknown := sorted(set(np.unique(expert).tolist()) - self.banks.keys()):
            raise InputError(f"rows are routed to experts {unknown}, which have no training rows in the bank")
        if k_max < 1:
            raise InputError(f"k = {k_max} given, must be at least 1")
        distances = np.empty((len(x), k_max), dtype=np.float32)
        for e, bank in self.banks.items():
            rows = np.flatnonzero(expert == e)
            k, queries = min(k_max, len(bank)), queries_in(self._spaces[e], features[rows])
            found = bank.search(queries, k)[0] if neighbours is None else neighbours.distances(bank, queries, k).T
            distances[rows, :k] = found
            distances[rows, k:] = found[:, -1:]
        return distances


@dataclass(eq=False)
class KNNScorer(Scorer):
    """`knn_score` with its k and the banks that it was fitted on.

    Attributes:
        k: which neighbour counts; clipped to a bank's size, and ``params()`` says so. The default is OpenOOD's and
            pytorch-ood's; the paper takes 50 for CIFAR-10, 1000 for ImageNet. `choose_k` chooses one from ID rows.
        index: as in `FeatureBank`; what an approximate one finds of the exact neighbours of some held-out ID rows
            (training rows where none were given) is in ``params()`` as ``recall``.
        bank: share of the ID training rows to search in, drawn at random once and for all; the paper's code takes 0.5.
        space: where to search: ``"raw"``, or as in `Space.of`, fitted on all ID training rows; the distance is that of
            the directions there.
        device: as in `FeatureBank`.

    Raises:
        InputError: a setting that is not allowed, such as ``k`` < 1.
    """

    name: ClassVar[str] = "knn"
    title: ClassVar[str] = "kNN"
    says: ClassVar[str] = "distance to the k-th neighbour"
    paper: ClassVar[str] = "Sun 2022"
    cost: ClassVar[str] = "N·D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "bank"})
    side_by_side: ClassVar[bool] = False  # faiss has threads of its own
    follows: ClassVar[frozenset[str]] = frozenset({"k"})
    few_rows: ClassVar[str] = "fewer rows than k: the farthest is the k-th"

    k: Annotated[int, Field(ge=1)] = 50
    index: IndexKind = "flat"
    bank: Annotated[float, Field(gt=0, le=1)] = 1.0
    space: SpaceName = RAW
    device: Literal["auto", "cpu"] = "auto"
    neighbours: NeighbourStore | None = field(init=False, repr=False, default=None)

    def settings(self) -> dict[str, Any]:
        """k, and what is not the exact search in all raw rows; the device changes no result."""
        approximate = {} if self.index == "flat" else {"index": self.index}
        where = {} if self.space == RAW else {"space": self.space}
        return {"k": self.k} | approximate | ({} if self.bank == 1 else {"bank": self.bank}) | where

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> "SearchedIn":
        """The bank, and the space where it is not that of the features."""
        features = train.need_unread("a bank")
        space = Space.of(self.space, train, self.name)
        if self.bank < 1:
            features = features[seeded_share(len(features), self.bank)]
        bank = FeatureBank(bank_in(space, features), self.device, self.index)
        if self.neighbours is None:  # else all may be known, and nothing searched
            bank.prepare()
        judged = features if select is None or not len(select) else select.need_unread("the recall of an index")
        some = np.sort(np.random.default_rng(0).permutation(len(judged))[:_RECALL_ROWS])
        searched = Searched(bank, queries_in(space, np.asarray(judged[some])))
        return searched if space is None else (space, searched)

    def judge(self, x: ScoreInputs, memory: "SearchedIn") -> Floats:
        """Distance to the k-th neighbour, [n]."""
        return self._distances(x, memory)[-1]

    def _distances(self, x: ScoreInputs, memory: "SearchedIn", nearer: bool = False) -> Floats:
        """Distances to the k-th neighbour [1, n], or to all k, the nearest first, [k, n]."""
        space, searched = _apart(memory)
        queries, k = queries_in(space, x.need("features", self.name)), min(self.k, len(searched.bank))
        first = 0 if nearer else k - 1
        if self.neighbours is None:
            return searched.bank.search(queries, k)[0].T[first:]
        return self.neighbours.distances(searched.bank, queries, k, first)

    def facts(self, memory: "SearchedIn") -> dict[str, Any]:
        """``k_used``, where a bank has fewer than k rows; ``recall`` of an approximate index; facts of the space."""
        space, searched = _apart(memory)
        n = len(searched.bank)
        clipped = {"k_used": n} if n < self.k else {}
        recall = {} if self.index == "flat" else {"recall": searched.recall(min(self.k, n))}
        return clipped | recall | ({} if space is None else space.facts)

    def remark(self, memory: "SearchedIn") -> str:
        """Whether a bank has fewer than k rows; what there is to say of the space."""
        space, searched = _apart(memory)
        few = self.few_rows if len(searched.bank) < self.k else ""
        return "; ".join(said for said in (few, "" if space is None else space.remark) if said)


@dataclass(frozen=True, eq=False)
class Searched:
    """A bank, and rows to judge its index by."""

    bank: FeatureBank
    judged: NDArray[np.floating]
    recalls: dict[int, float] = field(init=False, default_factory=dict)

    def recall(self, k: int) -> float:
        """To four digits; measured once."""
        if k not in self.recalls:
            self.recalls[k] = round(self.bank.recall(self.judged, k), 4)
        return self.recalls[k]


SearchedIn = Searched | tuple[Space, Searched]  # in the features' own space, or in another


def _apart(memory: SearchedIn) -> tuple[Space | None, Searched]:
    return memory if isinstance(memory, tuple) else (None, memory)
