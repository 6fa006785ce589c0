"""What a score may look at: rows to fit on or to score, which may be more than memory holds."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from stages.errors import InputError, NotFiniteError
from stages.heads.affine import LinearHead
from stages.id_data.lazy import Floats, ReadOnce, Rows2D
from stages.id_data.taps import TapRows

_Remembered = TypeVar("_Remembered")

ROWS_AT_ONCE = 4096  # fitting and scoring: memory stays flat as rows grow


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
        taps: tokens after several blocks or stages of the network.
        shared: what scores that are fitted on these very rows keep for one another; None: nothing. Nobody may change
            an array as long as it is there.

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
    taps: TapRows | None = None
    shared: dict[Hashable, Any] | None = None

    def __post_init__(self) -> None:
        rows = {name: len(array) for name, array in self._arrays().items()}
        if len(set(rows.values())) != 1:
            raise InputError(f"score inputs need one number of rows, got {rows or 'no array'}")
        if isinstance(self.head, tuple) and self.expert is None:
            raise InputError(f"{len(self.head)} heads, one for each expert, given with rows that name no expert")

    def __len__(self) -> int:
        return len(next(iter(self._arrays().values())))

    def _arrays(self) -> dict[str, Any]:
        return {name: value for name in _ARRAYS if (value := getattr(self, name)) is not None}

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_] | slice) -> "ScoreInputs":
        """The given rows, by number, by mask or by slice."""
        return ScoreInputs(**{name: array[rows] for name, array in self._arrays().items()}, head=self.head)

    def only(self, *names: str) -> "ScoreInputs":
        """The same rows, with these of their fields alone."""
        return ScoreInputs(**{name: getattr(self, name) for name in names})

    def remembered(self, key: Hashable, compute: Callable[[], _Remembered]) -> _Remembered:
        """What is computed of all of these rows: once for all scores that share it."""
        if self.shared is None:
            return compute()
        if key not in self.shared:
            self.shared[key] = compute()
        found: _Remembered = self.shared[key]
        return found

    def blocks(self, size: int = ROWS_AT_ONCE) -> Iterator["ScoreInputs"]:
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

    def need_taps(self, who: str) -> TapRows:
        """The taps; an `InputError` that says who needs them where they are absent."""
        if self.taps is None:
            raise InputError(f"{who} needs taps, which these rows do not have")
        return self.taps

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


# Asked for by every score and block.
_ARRAYS = tuple(each.name for each in fields(ScoreInputs) if each.name not in ("head", "shared"))


@contextmanager
def naming_rows(which: str, x: ScoreInputs | None) -> Iterator[None]:
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
