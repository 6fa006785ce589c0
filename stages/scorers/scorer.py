"""What a score is: the contract that every score is written to, and its routing over experts."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from types import GenericAlias, MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self, get_type_hints

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from stages.config import Profile
from stages.errors import InputError, StageError
from stages.files.packing import pack, unpack
from stages.id_data.lazy import Floats
from stages.machine import usable_cores
from stages.scorers.inputs import ROWS_AT_ONCE, ScoreInputs, naming_rows
from stages.scorers.settings import check_settings
from stages.scorers.shared.arrays import labels_within

FITTED_ON = frozenset({"bank", "select", "head", "labels"})  # needs that no row has which is only scored
_NO_EXPERT = "none"


@dataclass(frozen=True, eq=False)
class ScorerState:
    """A fitted score as it is stored: JSON and arrays, no code.

    Attributes:
        name: of the score.
        settings: all of them, by name.
        learnt: what was learnt of the rows of each expert, by its number; of a model without experts under ``none``.
        arrays: what `learnt` speaks of, see `stages.files.packing`.
    """

    name: str
    settings: dict[str, Any]
    learnt: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class _Learnt:
    """What a score learnt of one expert's rows, and the classes that apply there."""

    classes: NDArray[np.intp] | None
    memory: Any


class _Block(NamedTuple):
    """Some rows to score, by what was learnt for their expert."""

    expert: int | None
    learnt: _Learnt | None
    rows: NDArray[np.integer] | slice


@dataclass(eq=False)
class Scorer(ABC):
    """A score with its settings and what it remembers of ID rows; higher = more OOD.

    A score is a dataclass: its fields are its settings, ``Annotated[float, Field(gt=0)]`` and the like say what they
    may be. It writes `learn` and `judge` for one model; this class does the rest. What `learn` says that it returns is
    what `state` stores and `from_state` reads: a type of `stages.files.packing`. With experts, what is learnt is
    learnt of each expert's rows and classes apart, and each row is judged by what its own expert's rows taught.

    Attributes:
        name: as in the table and in `stages.scorers.SCORERS`.
        title: as the field writes it.
        says: what is high for an OOD row, in a few words.
        paper: first author and year; the formula's docstring has all of it.
        cost: multiplications a row that is scored, up to a constant: N training rows, D features, C classes, P patches
            an image, E experts, M random features or landmarks.
        costly: whether a fit, or the scores of some thousand rows, take so long that ``auto``, which tries many, leaves
            it out.
        needs: of ``features``, ``logits``, ``others``, ``other``, ``patches``, ``taps`` (what `score` reads of a row),
            ``head`` (the weights that make the logits), ``bank`` (ID training rows to fit on), ``select`` (held-out ID
            rows to choose settings on) and ``labels`` (the class of each row that it is fitted on).
        profiles: settings that another implementation's defaults differ in, by profile; the fields' own defaults are
            the paper's.
        follows: settings that come from ``[score]`` itself: ``k``, ``temperature``.
        side_by_side: whether blocks of rows are scored side by side, each on one core; False where `judge` itself
            fills the cores. The number of cores changes no score.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    says: ClassVar[str]
    paper: ClassVar[str]
    cost: ClassVar[str]
    costly: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]]
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    follows: ClassVar[frozenset[str]] = frozenset()
    side_by_side: ClassVar[bool] = True

    _learnt: dict[int | None, _Learnt] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_settings(type(self), self.settings())

    @classmethod
    def of(cls, profile: Profile = "paper", **params: Any) -> Self:
        """With a profile's defaults, and settings that differ from them.

        Raises:
            InputError: no such setting, or a value that it cannot have.
        """
        settings = dict(cls.profiles.get(profile, {})) | params
        check_settings(cls, settings)
        return cls(**settings)

    # ------------------------------------------------------------------------------------- what a score writes

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> Any:
        """What to remember of ID rows of one model; nothing by default.

        Args:
            train: ID training rows of one expert, or of a model without; classes are 0 … C − 1, all of which apply.
            select: held-out ID rows that went to the same expert; None where none were given.
        """
        return None

    @abstractmethod
    def judge(self, x: ScoreInputs, memory: Any) -> Floats:
        """Scores [n] of rows of the same model, by what `learn` gave."""

    def facts(self, memory: Any) -> dict[str, Any]:
        """What was chosen from ID rows, and from which, for the record; JSON-able."""
        return {}

    def remark(self, memory: Any) -> str:
        """What to say of the fit to whoever reads the scores, in a few words; empty for nothing. Numbers are facts."""
        return ""

    # ------------------------------------------------------------------------------------------- what it is used by

    def settings(self) -> dict[str, Any]:
        """Settings by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    def params(self) -> dict[str, Any]:
        """Settings in force and what was chosen from ID rows, for the table; by expert where experts differ."""
        found = {expert: self.facts(learnt.memory) for expert, learnt in self._learnt.items()}
        names = dict.fromkeys(name for facts in found.values() for name in facts)
        chosen: dict[str, Any] = {}
        for name in names:
            values = {str(expert): facts[name] for expert, facts in found.items() if name in facts}
            same = len(values) == len(found) and all(value == next(iter(values.values())) for value in values.values())
            chosen[name] = next(iter(values.values())) if same else values
        return self.settings() | chosen

    def remarks(self) -> list[str]:
        """What there is to say of the fit, of several experts each thing once."""
        said = (self.remark(learnt.memory) for learnt in self._learnt.values())
        return [remark for remark in dict.fromkeys(said) if remark]

    def fit(self, train: ScoreInputs, select: ScoreInputs | None = None) -> Self:
        """Learns of ID rows what `score` needs, of each expert's apart where ``train`` names experts.

        Args:
            train: ID training rows.
            select: held-out ID rows, for scores that choose a setting by them.

        Raises:
            InputError: no rows, rows that lack what the score needs, or, of a score that reads logits, labels beyond
                their columns.
        """
        self._learnt = {}
        if not self._fits:
            return self
        if not len(train):
            raise InputError(f"{self.name} needs ID training rows, none given")
        if self.needs & {"logits", "head"}:
            for rows in (train, *(() if select is None else (select,))):
                if rows.labels is not None and (n_classes := rows.n_classes) is not None:
                    labels_within(rows.labels, n_classes, self.name)
        experts = [None] if train.expert is None else np.unique(train.expert).tolist()
        with naming_rows("ID training", train), naming_rows("held-out ID", select):
            for expert in experts:
                own = train.of_expert(expert, _rows_of(train, expert))
                classes = own.classes()
                known = None if classes is None else tuple(classes.tolist())
                shared = None if train.shared is None else train.shared.setdefault((expert, known), {})
                held_out = None
                if select is not None:
                    held_out = select.of_expert(expert, _rows_of(select, expert)).of_classes(classes)
                fitted_on = replace(own.of_classes(classes), shared=shared)
                with _not_warned_of():
                    self._learnt[expert] = _Learnt(classes, self.learn(fitted_on, held_out))
        return self

    def score(self, x: ScoreInputs) -> Floats:
        """One score a row, [n] float32; higher = more OOD.

        Raises:
            StageError: not fitted, where it has to be.
            InputError: rows that lack what the score needs, or routed to an expert without training rows.
        """
        self._check_fitted()
        for name in sorted(self.needs - FITTED_ON):
            if not x.has(name):
                raise InputError(f"{self.name} needs {name}, which these rows do not have")
        if self._fits:
            self._check_experts(x)
        scores = np.empty(len(x), dtype=np.float32)
        with ExitStack() as stack:
            stack.enter_context(naming_rows("scored", x))
            run: Callable[..., Iterable[None]] = map
            if self.side_by_side and len(x) > ROWS_AT_ONCE and (cores := usable_cores()) > 1:
                stack.enter_context(threadpool_limits(1))
                run = stack.enter_context(ThreadPoolExecutor(cores)).map

            def judge(block: _Block) -> None:
                with _not_warned_of():
                    scores[block.rows] = self._judge_block(x, block)

            for _ in run(judge, self._blocks(x)):
                pass
        return scores

    def state(self) -> ScorerState:
        """The fitted score as it is stored; `from_state` gives a score that says the same of every row, to the bit.

        Raises:
            StageError: not fitted, where it has to be.
        """
        self._check_fitted()
        learnt = {
            _NO_EXPERT if expert is None else str(expert): (each.classes, each.memory)
            for expert, each in self._learnt.items()
        }
        arrays: dict[str, NDArray[Any]] = {}
        packed = pack(learnt, arrays)
        return ScorerState(self.name, Scorer.settings(self), packed, arrays)

    @classmethod
    def from_state(cls, state: ScorerState) -> Self:
        """The fitted score again.

        Raises:
            InputError: the state is not one of this score.
        """
        check_settings(cls, state.settings)
        scorer = cls(**state.settings)
        memory = get_type_hints(cls.learn, include_extras=True)["return"]
        each = GenericAlias(tuple, (NDArray[np.integer] | None, memory))
        learnt: dict[str, Any] = unpack(GenericAlias(dict, (str, each)), state.learnt, state.arrays)
        if bool(learnt) != scorer._fits or (_NO_EXPERT in learnt and len(learnt) > 1):
            raise InputError(f"{cls.name}: {len(learnt)} models were learnt, which no fit leaves")
        for name, (classes, known) in learnt.items():
            if name != _NO_EXPERT and not re.fullmatch(r"0|[1-9]\d{0,8}", name):
                raise InputError(f"{cls.name}: {name[:20]!r} is no expert's number")
            scorer._learnt[None if name == _NO_EXPERT else int(name)] = _Learnt(classes, known)
        return scorer

    @property
    def _fits(self) -> bool:
        return bool(self.needs & {"bank", "select", "head"})

    def _check_fitted(self) -> None:
        if self._fits and not self._learnt:
            raise StageError(f"{self.name} is not fitted yet: call fit() with the ID training rows first")

    def _blocks(self, x: ScoreInputs) -> Iterator["_Block"]:
        for expert, learnt in self._learnt.items() or [(None, None)]:
            rows = None if expert is None else np.flatnonzero(x.expert == expert)
            for start in range(0, len(x) if rows is None else len(rows), ROWS_AT_ONCE):
                some = slice(start, start + ROWS_AT_ONCE)
                yield _Block(expert, learnt, some if rows is None else rows[some])

    def _judge_block(self, x: ScoreInputs, block: "_Block") -> Floats:
        if block.learnt is None:
            return self.judge(x.take(block.rows), None)
        own = x.of_expert(block.expert, block.rows).of_classes(block.learnt.classes)
        return self.judge(own, block.learnt.memory)

    def _check_experts(self, x: ScoreInputs) -> None:
        if (x.expert is None) != (None in self._learnt):
            raise InputError(
                "rows that name an expert need a fit on rows that do, and the reverse: "
                f"{self.name} was fitted {'without' if None in self._learnt else 'with'} experts"
            )
        if x.expert is not None and (unknown := sorted(set(np.unique(x.expert).tolist()) - self._learnt.keys())):
            raise InputError(f"rows are routed to experts {unknown}, which have no training rows")


def _not_warned_of() -> np.errstate:
    """NumPy warns by lines of code on a terminal: what is no number is found in the scores, and said with them."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")


def _rows_of(x: ScoreInputs, expert: int | None) -> NDArray[np.integer] | slice:
    return slice(None) if expert is None or x.expert is None else np.flatnonzero(x.expert == expert)
