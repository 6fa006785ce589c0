"""What a score may look at, and what a score is."""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from threadpoolctl import threadpool_limits

from stages.config import StageConfig, nearest
from stages.errors import InputError, NotFiniteError, StageError
from stages.heads.affine import LinearHead
from stages.id_data.lazy import ReadOnce, Rows2D
from stages.machine import usable_cores

Floats = NDArray[np.float32]
Temperature = Annotated[float, Field(gt=0)]
RowsName = Literal["train", "select"]
_BLOCK = 4096  # rows at once, fitting and scoring: memory stays flat as rows grow


class LazyRows(Protocol):
    """Rows that are taken without being read, and read by ``numpy.asarray``."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> "LazyRows": ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.floating]: ...


@dataclass(frozen=True, eq=False)
class ScoreInputs:
    """Rows to fit on or to score. What a score does not need may be left out; arrays may be memory-mapped or lazy.

    Attributes:
        features: [n, D], any float type.
        logits: [n, C]; −inf where a class does not apply (a routed expert's head covers its own classes only). Where
            they are left out, ``head`` gives them.
        labels: [n] integers, of ID rows; negative: unknown.
        expert: [n] integers, the expert whose features and logits these are; absent where there are no experts.
        others: [n, E], each group's log odds of "other"; only where the heads of all experts see the same features.
        other: [n] logit of the routed expert's "other", beside the ``logits`` of its own trained head.
        patches: [n, P, D] patch tokens after the final norm; an array, or rows that become one when they are read.
        head: the linear head that makes the logits: one for all rows, or one for each expert.

    Raises:
        InputError: nothing given, numbers of rows that differ, or a head for each expert of rows that name none.
    """

    features: Rows2D | ReadOnce | None = None
    logits: Rows2D | ReadOnce | None = None
    labels: NDArray[np.integer] | None = None
    expert: NDArray[np.integer] | None = None
    others: NDArray[np.floating] | None = None
    other: NDArray[np.floating] | None = None
    patches: NDArray[np.floating] | LazyRows | None = None
    head: LinearHead | tuple[LinearHead, ...] | None = None

    def __post_init__(self) -> None:
        rows = {name: len(array) for name, array in self._arrays().items()}
        if len(set(rows.values())) != 1:
            raise InputError(f"score inputs need one number of rows, got {rows or 'no array'}")
        if isinstance(self.head, tuple) and self.expert is None:
            raise InputError(f"{len(self.head)} heads, one for each expert, given with rows that name no expert")

    def __len__(self) -> int:
        return len(next(iter(self._arrays().values())))

    def _arrays(self) -> dict[str, NDArray[Any]]:
        names = (each.name for each in fields(self) if each.name != "head")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_] | slice) -> "ScoreInputs":
        """The given rows, by number, by mask or by slice."""
        return ScoreInputs(**{name: array[rows] for name, array in self._arrays().items()}, head=self.head)

    def blocks(self, size: int = _BLOCK) -> Iterator["ScoreInputs"]:
        """All rows in order, ``size`` at a time: a fit that walks them needs no more memory for a million rows."""
        return (self.take(slice(start, start + size)) for start in range(0, len(self), size))

    def has(self, name: str) -> bool:
        """Whether `need` would give it."""
        if name == "logits" and self.logits is None:
            return self.head is not None and self.features is not None
        return getattr(self, name) is not None

    def need(self, name: str, who: str) -> NDArray[Any]:
        """The array called ``name``, read; an `InputError` that says who needs it where it is absent.

        Logits that were not given are those of the head on the features.
        """
        if not self.has(name):
            raise InputError(f"{who} needs {name}, which these rows do not have")
        if name == "logits" and self.logits is None:
            return self._logits_of_head()
        array: NDArray[Any] = getattr(self, name)
        return array if name == "patches" else np.asarray(array)

    def need_unread(self, who: str) -> Rows2D | ReadOnce:
        """The features, to be taken and read by blocks; an `InputError` that says who needs them where they are absent.

        For fits, whose rows may be more than memory holds.
        """
        if self.features is None:
            raise InputError(f"{who} needs features, which these rows do not have")
        return self.features

    def need_head(self, who: str) -> LinearHead:
        """The one head of these rows, as it is on raw features.

        Raises:
            InputError: there is none, or one for each expert; it says who needs it.
        """
        if not isinstance(self.head, LinearHead):
            raise InputError(f"{who} needs the weights of the linear head, which these rows do not have")
        return self.head.on_raw_features()

    def _logits_of_head(self) -> Floats:
        assert self.head is not None
        assert self.features is not None
        if isinstance(self.head, LinearHead):
            return self.head.logits(np.asarray(self.features))
        assert self.expert is not None
        features = np.asarray(self.features)
        logits = np.empty((len(self), len(self.head[0].bias)), dtype=np.float32)
        for expert in np.unique(self.expert):
            rows = np.flatnonzero(self.expert == expert)
            logits[rows] = self.head[expert].logits(features[rows])
        return logits

    @property
    def n_classes(self) -> int | None:
        """C, of the logits or of the head that makes them; None where there is neither."""
        head = self.head[0] if isinstance(self.head, tuple) else self.head
        return self.logits.shape[1] if self.logits is not None else None if head is None else len(head.bias)

    def classes(self) -> NDArray[np.intp] | None:
        """Classes that apply, of the head or of the logits; None where there is neither."""
        if isinstance(self.head, LinearHead):
            return self.head.classes
        if self.logits is None:
            return None
        alive = np.zeros(self.logits.shape[1], dtype=bool)
        for block in self.blocks():
            alive |= ~np.isneginf(block.need("logits", "a class")).all(axis=0)
        return np.flatnonzero(alive)

    def of_expert(self, expert: int | None, rows: NDArray[np.integer] | slice = slice(None)) -> "ScoreInputs":
        """Given rows as one model's, which knows of no other expert: they, and the head, are that expert's own."""
        own = replace(self, head=self.head[expert]) if isinstance(self.head, tuple) and expert is not None else self
        return replace(own.take(rows), expert=None) if self.expert is not None else own.take(rows)

    def of_classes(self, classes: NDArray[np.intp] | None) -> "ScoreInputs":
        """The same rows in a world of some classes alone, numbered anew; a label outside becomes −1."""
        head = self.head if isinstance(self.head, LinearHead) else None
        known = self.logits.shape[1] if self.logits is not None else None if head is None else len(head.bias)
        if classes is None or len(classes) == known:
            return self
        labels = self.labels
        if labels is not None and len(labels):
            numbers = np.full(max(int(labels.max()), int(classes.max(initial=0))) + 2, -1)  # the last: unknown labels
            numbers[classes] = np.arange(len(classes))
            labels = numbers[np.maximum(labels, -1)]
        logits = None if self.logits is None else self.logits[:, classes]
        return replace(self, logits=logits, labels=labels, head=None if head is None else head.take(classes))


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
    may be. It writes `learn` and `judge` for one model; this class does the rest. With experts, what is learnt is
    learnt of each expert's rows and classes apart, and each row is judged by what its own expert's rows taught.

    Attributes:
        name: as in the table.
        needs: of ``features``, ``logits``, ``others``, ``other``, ``patches`` (what `score` reads of a row), ``head``
            (the weights that make the logits), ``bank`` (ID training rows, with labels, to fit on) and ``select``
            (held-out ID rows to choose settings on).
        profiles: settings that another implementation's defaults differ in, by profile; the fields' own defaults are
            the paper's.
        follows: settings that come from ``[score]`` itself: ``k``, ``temperature``.
        side_by_side: whether blocks of rows are scored side by side, each on one core; False where `judge` itself
            fills the cores. The number of cores changes no score.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    follows: ClassVar[frozenset[str]] = frozenset()
    side_by_side: ClassVar[bool] = True

    _learnt: dict[int | None, _Learnt] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_settings(type(self), self.settings())

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
        if not self.needs & {"bank", "select", "head"}:
            return self
        if not len(train):
            raise InputError(f"{self.name} needs ID training rows, none given")
        if self.needs & {"logits", "head"}:
            for rows in (train, *(() if select is None else (select,))):
                if rows.labels is not None and (n_classes := rows.n_classes) is not None:
                    labels_within(rows.labels, n_classes, self.name)
        experts = [None] if train.expert is None else np.unique(train.expert).tolist()
        with _naming_rows("ID training", train), _naming_rows("held-out ID", select):
            for expert in experts:
                own = train.of_expert(expert, _rows_of(train, expert))
                classes = own.classes()
                held_out = None
                if select is not None:
                    held_out = select.of_expert(expert, _rows_of(select, expert)).of_classes(classes)
                self._learnt[expert] = _Learnt(classes, self.learn(own.of_classes(classes), held_out))
        return self

    def score(self, x: ScoreInputs) -> Floats:
        """One score a row, [n] float32; higher = more OOD.

        Raises:
            StageError: not fitted, where it has to be.
            InputError: rows that lack what the score needs, or routed to an expert without training rows.
        """
        fits = bool(self.needs & {"bank", "select", "head"})
        if fits and not self._learnt:
            raise StageError(f"{self.name} is not fitted yet: call fit() with the ID training rows first")
        for name in sorted(self.needs - {"bank", "select", "head"}):
            if not x.has(name):
                raise InputError(f"{self.name} needs {name}, which these rows do not have")
        if fits:
            self._check_experts(x)
        scores = np.empty(len(x), dtype=np.float32)
        with ExitStack() as stack:
            stack.enter_context(_naming_rows("scored", x))
            run: Callable[..., Iterable[None]] = map
            if self.side_by_side and len(x) > _BLOCK and (cores := usable_cores()) > 1:
                stack.enter_context(threadpool_limits(1))
                run = stack.enter_context(ThreadPoolExecutor(cores)).map

            def judge(block: _Block) -> None:
                scores[block.rows] = self._judge_block(x, block)

            for _ in run(judge, self._blocks(x)):
                pass
        return scores

    def _blocks(self, x: ScoreInputs) -> Iterator["_Block"]:
        for expert, learnt in self._learnt.items() or [(None, None)]:
            rows = None if expert is None else np.flatnonzero(x.expert == expert)
            for start in range(0, len(x) if rows is None else len(rows), _BLOCK):
                some = slice(start, start + _BLOCK)
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


@contextmanager
def _naming_rows(which: str, x: ScoreInputs | None) -> Iterator[None]:
    """Say of rows that hold NaN or inf how many they are of all, and which is the first: who found it saw a block."""
    try:
        yield
    except NotFiniteError as error:
        if x is not None:
            check_finite(x, which, error)
        raise


def check_finite(x: ScoreInputs, which: str, cause: Exception | None = None) -> None:
    """Refuse features and logits that hold NaN or +inf, or logits of −inf alone.

    Args:
        x: all rows.
        which: what they are, for the message.
        cause: the error that made somebody look.

    Raises:
        NotFiniteError: with how many rows of all, and the first.
    """
    for name in ("features", "logits"):
        if not x.has(name):
            continue
        blocks = (block.need(name, which) for block in x.blocks())
        bad = np.flatnonzero(np.concatenate([~_is_finite(values, name) for values in blocks]))
        if bad.size:
            raise NotFiniteError(
                f"{bad.size} of {len(x)} {which} {name} hold NaN or inf, row {bad[0]} first"
            ) from cause


def _is_finite(values: NDArray[np.floating], name: str) -> NDArray[np.bool_]:
    """[n] whether a row may be used; a class that does not apply has logit −inf."""
    finite: NDArray[np.bool_] = (
        np.isfinite(values.max(axis=1) if name == "logits" else values).reshape(len(values), -1).all(axis=1)
    )
    return finite


def _rows_of(x: ScoreInputs, expert: int | None) -> NDArray[np.integer] | slice:
    return slice(None) if expert is None or x.expert is None else np.flatnonzero(x.expert == expert)


def fitting_rows(
    which: RowsName, train: ScoreInputs, select: ScoreInputs | None, who: str
) -> tuple[ScoreInputs, dict[str, Any]]:
    """Rows that a threshold is taken from, ``"train"`` or ``"select"``, and what to record of them.

    An expert that no held-out row went to takes its training rows, and the record says so.

    Raises:
        InputError: held-out rows are asked for and none were given.
    """
    if which == "select" and select is None:
        raise InputError(f"{who} needs held-out ID rows to fit on: give them to fit() as well")
    rows = select if which == "select" and select is not None and len(select) else train
    return rows, {"fitted_on": "train" if rows is train else "select", "fitted_rows": len(rows)}


def fitted_on_train(which: RowsName, record: Mapping[str, Any]) -> str:
    """What to say where held-out rows were asked for and training rows stand in: the remark of such a score."""
    return "fitted on ID training rows, for no held-out row is there" if record["fitted_on"] != which else ""


# ------------------------------------------------------------------------------------------------------ settings


class _Settings(StageConfig):
    model_config = ConfigDict(allow_inf_nan=False)


@cache
def _settings_model(scorer: type[Scorer]) -> type[BaseModel]:
    parameters = inspect.signature(scorer).parameters
    given: dict[str, Any] = {name: (each.annotation, each.default) for name, each in parameters.items()}
    return create_model(scorer.__name__, __base__=_Settings, **given)


def check_settings(scorer: type[Scorer], settings: Mapping[str, Any]) -> None:
    """Check settings of a score by name against what its constructor says that they may be.

    Raises:
        InputError: ``react.percentile: 120 given, must be less than or equal to 100``.
    """
    model = _settings_model(scorer)
    try:
        model.model_validate(dict(settings))
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0])
        if problem["type"] == "extra_forbidden":
            raise InputError(f"{scorer.name}.{key}: unknown setting{nearest(key, model.model_fields)}") from error
        must = re.sub(r"^\w+ should ", "", problem["msg"])
        raise InputError(f"{scorer.name}.{key}: {problem['input']!r} given, must {must}") from error


def labels_within(labels: NDArray[np.integer], n_classes: int, who: str) -> NDArray[np.integer]:
    """Labels [n], unknown ones (negative) included.

    Raises:
        InputError: one beyond the classes that there are logits of.
    """
    labels = np.asarray(labels)
    if len(labels) and labels.max() >= n_classes:
        raise InputError(
            f"{who}: ID rows of class {labels.max()}, but logits of {n_classes} classes, 0 to {n_classes - 1}"
        )
    return labels


def scaled_logits(logits: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """``logits / temperature`` as float64 [n, C], checked.

    Raises:
        InputError: not two-dimensional, a temperature that is not positive, NaN or +inf, a row of −inf alone.
    """
    array = np.asarray(logits, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] == 0:
        raise InputError(f"logits have shape {array.shape}; one row a sample, one column a class expected")
    if not (0 < temperature < np.inf):
        raise InputError(f"temperature = {temperature} given, must be greater than 0")
    bad = np.flatnonzero(~np.isfinite(array.max(axis=1)))  # NaN and +inf come through max; −inf alone stays −inf
    if bad.size:
        raise NotFiniteError(
            f"{bad.size} of {len(array)} rows of logits hold NaN, +inf or −inf alone, row {bad[0]} first"
        )
    return array / temperature
