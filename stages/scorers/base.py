"""What a score may look at, and what a score is."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.errors import InputError


@dataclass(frozen=True, eq=False)
class ScoreInputs:
    """Rows to fit on or to score. What a score does not need may be left out.

    Attributes:
        features: [n, D], any float type.
        logits: [n, C]; −inf where a class does not apply (a routed expert's head covers its own classes only).
        labels: [n] integers, of ID rows.
        expert: [n] integers, the expert whose features and logits these are; absent where there are no experts.
        others: [n, E], each group's probability of "other"; only where the heads of all experts see the same features.

    Raises:
        InputError: nothing given, or numbers of rows that differ.
    """

    features: NDArray[np.floating] | None = None
    logits: NDArray[np.floating] | None = None
    labels: NDArray[np.integer] | None = None
    expert: NDArray[np.integer] | None = None
    others: NDArray[np.floating] | None = None

    def __post_init__(self) -> None:
        rows = {name: len(array) for name, array in self._given().items()}
        if len(set(rows.values())) != 1:
            raise InputError(f"score inputs need one number of rows, got {rows or 'no array'}")

    def __len__(self) -> int:
        return len(next(iter(self._given().values())))

    def _given(self) -> dict[str, NDArray[Any]]:
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> "ScoreInputs":
        """The given rows, by number or by mask."""
        return ScoreInputs(**{name: array[rows] for name, array in self._given().items()})

    def need(self, name: str, who: str) -> NDArray[Any]:
        """The array called ``name``; an `InputError` that says who needs it where it is absent."""
        array: NDArray[Any] | None = getattr(self, name)
        if array is None:
            raise InputError(f"{who} needs {name}, which these rows do not have")
        return array


class Scorer(Protocol):
    """A score with its settings and what it remembers of the ID training rows.

    Attributes:
        name: as in the table.
        needs: of ``logits``, ``features``, ``others`` and ``bank`` (ID training features, with labels, to fit on).
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    def params(self) -> dict[str, Any]:
        """Settings in force, for the table; JSON-able."""
        ...

    def fit(self, train: ScoreInputs) -> Self:
        """Remembers what it needs of the ID training rows, and returns itself."""
        ...

    def score(self, x: ScoreInputs) -> NDArray[np.float32]:
        """One score a row, [n] float32; higher = more OOD."""
        ...


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
        raise InputError(f"{bad.size} of {len(array)} rows of logits hold NaN, +inf or −inf alone, row {bad[0]} first")
    return array / temperature
