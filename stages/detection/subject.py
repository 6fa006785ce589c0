"""A subject: one choice of features with its heads, as scores and their calibration see it.

It is the backbone's own features, or those of one trained mixture. It has a run for each fold of the split (one where
rows were simply held out) and a final bank; under cross-fitting also a run for each part of the rows, whose bank has
all others.
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.errors import InputError
from stages.heads.affine import LinearHead
from stages.id_data.lazy import Floats, LazyArray, ReadOnce, RowNumbers, Rows2D
from stages.id_data.split import N_PARTS
from stages.id_data.taps import TapRows
from stages.scorers import FROZEN
from stages.scorers.inputs import LazyRows, ScoreInputs

Head = LinearHead | tuple[LinearHead, ...]
NO_HEAD = "none"
BLOCK_ROWS = 1 << 15  # rows that are read at once, and that every score sees before the next are read


@dataclass(frozen=True, eq=False)
class SetRows:
    """Rows of a set as one choice of features sees them; features and logits may be more than memory holds.

    Attributes:
        features: ``[n, D]``.
        labels: ``[n]`` class numbers of the study; −1 for OOD rows.
        logits: ``[n, C]`` for each head.
        expert: ``[n]`` the expert that each row went to; None without experts.
        confidence: ``[n]`` the router's probability of its choice, or of its second one where it is that; None without
            experts.
        others: ``[n, E]`` each group's log odds of "other"; None where the heads do not see the same features.
        other: ``[n]`` logit of the expert's "other" beside its trained head's; None where there is none.
        patches: ``[n, P, D]`` patch tokens after the final norm, read when they are asked for; None where there are
            none.
        taps: tokens after several blocks or stages of the backbone, read when they are asked for; None where there are
            none.
        heads: the linear head itself, by its name, or one for each expert; of rows to fit on.
        frozen: of a mixture's rows, the same as the backbone's own features see them; of rows to fit on, what the
            scores of these features are fitted on.
        shared: as in `stages.scorers.inputs.ScoreInputs`.
    """

    features: Rows2D | ReadOnce
    labels: NDArray[np.int32]
    logits: Mapping[str, Rows2D | ReadOnce] = field(default_factory=dict)
    expert: NDArray[np.int64] | None = None
    confidence: Floats | None = None
    others: Floats | None = None
    other: Floats | None = None
    patches: NDArray[np.floating] | LazyRows | None = None
    taps: TapRows | None = None
    heads: dict[str, Head] = field(default_factory=dict)
    frozen: "SetRows | None" = None
    shared: dict[Hashable, Any] | None = None

    def __len__(self) -> int:
        return len(self.features)

    def sharing(self) -> "SetRows":
        """The same rows, to fit several scores on: what one gathers of them is there for the next."""
        return replace(self, shared={}, frozen=None if self.frozen is None else self.frozen.sharing())

    def inputs(self, head: str) -> ScoreInputs:
        """What a scorer may look at.

        Args:
            head: whose logits it reads; ``frozen:`` before it, on the backbone's own features.
        """
        if head.startswith(FROZEN):
            if self.frozen is None:
                raise InputError(f"{head}: these rows do not know the backbone's own features")
            return self.frozen.inputs(head.removeprefix(FROZEN))
        return ScoreInputs(
            self.features,
            self.logits.get(head),
            self.labels,
            self.expert,
            self.others,
            self.other,
            self.patches,
            self.heads.get(head),
            self.taps,
            self.shared,
        )

    def take(self, rows: NDArray[np.integer] | slice) -> "SetRows":
        """The given rows, by number or by slice; features and logits are not read."""
        small = {
            name: None if (values := getattr(self, name)) is None else values[rows]
            for name in ("expert", "confidence", "others", "other", "patches", "taps")
        }
        logits = {head: values[rows] for head, values in self.logits.items()}
        frozen = None if self.frozen is None else self.frozen.take(rows)
        return SetRows(self.features[rows], self.labels[rows], logits, **small, heads=self.heads, frozen=frozen)

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[slice, "SetRows"]]:
        """All rows in order, `size` at a time, a block read once for all who look at it; and which rows they are."""
        for start in range(0, len(self), size):
            some = slice(start, start + size)
            yield some, self.take(some)._read_once()

    def _read_once(self) -> "SetRows":
        """The same, whose arrays are read when somebody first asks for them, and kept."""
        logits = {head: _read_once(values) for head, values in self.logits.items()}
        frozen = None if self.frozen is None else self.frozen._read_once()
        return replace(self, features=_read_once(self.features), logits=logits, frozen=frozen)

    def predictions(self) -> dict[str, NDArray[np.int32]]:
        """``[n]`` the most probable class by each head."""
        found = {head: np.empty(len(self), dtype=np.int32) for head in self.logits}
        for some, block in self.blocks():
            for head, logits in block.logits.items():
                found[head][some] = np.asarray(logits).argmax(axis=1)
        return found


def _read_once(rows: Rows2D | ReadOnce) -> Rows2D | ReadOnce:
    return ReadOnce(rows) if isinstance(rows, LazyArray) else rows


def logits_by_head(
    features: LazyArray, heads: Mapping[str, Head], expert: NDArray[np.int64] | None = None
) -> dict[str, LazyArray]:
    """Logits ``[n, C]`` of rows by each head, computed when they are read.

    Args:
        features: ``[n, D]``; some of the rows of an array, or all.
        heads: by name, one for all rows or one for each expert.
        expert: of *all* rows of the array, where heads are for experts.
    """
    return {name: _logits_of(features, head, expert) for name, head in heads.items()}


def _logits_of(features: LazyArray, head: Head, expert: NDArray[np.int64] | None) -> LazyArray:
    if isinstance(head, LinearHead):
        return features.then(head.logits, len(head.bias))
    return features.then_by_row(partial(_of_experts, head, known_route(expert)), len(head[0].bias))


def _of_experts(head: tuple[LinearHead, ...], routed: NDArray[np.int64], rows: Floats, numbers: RowNumbers) -> Floats:
    logits = np.full((len(rows), len(head[0].bias)), -np.inf, dtype=np.float32)
    for own, each in enumerate(head):
        some = np.flatnonzero(routed[numbers] == own)
        logits[some] = each.logits(rows[some])
    return logits


@dataclass(frozen=True, eq=False)
class FoldRows:
    """The model of a fold or of a part: its bank (training rows), the rows that it was selected on, and unseen ones.

    `second` are the calibrate rows once more, through the router's second choice; None where no top-2 row is asked.
    """

    bank: SetRows
    select: SetRows
    calibrate: SetRows
    second: SetRows | None = None

    def beside(self, frozen: "FoldRows") -> "FoldRows":
        """The same, with what the backbone's own features say of them."""
        return FoldRows(
            replace(self.bank, frozen=frozen.bank),
            replace(self.select, frozen=frozen.select),
            replace(self.calibrate, frozen=frozen.calibrate),
            None if self.second is None else replace(self.second, frozen=frozen.calibrate),
        )


@dataclass(frozen=True)
class SubjectKey:
    """The first columns of the table."""

    backbone: str
    features: str
    variant: str
    seed: int | None

    @property
    def slug(self) -> str:
        """``pretrained-mofe-default-0``."""
        return "-".join((self.backbone, self.features, self.variant or "none", str(self.seed).lower()))


@dataclass(frozen=True, eq=False)
class Subject:
    """One choice of features.

    Attributes:
        key: its name in the table.
        heads: heads whose logits its rows carry.
        runs: one for each fold; they choose k.
        bank: training rows of the final model.
        select_rows: rows that the final model's scores may choose their settings by; it was trained on none of them.
        n_experts: E; 0 without experts.
        has_others: whether its rows carry each group's log odds of "other".
        parts: one for each part under cross-fitting; they calibrate, for their banks have all rows but a few. Their
            select rows are the final model's.
        strengths: inverse penalty of each head that can be fitted again, on other rows.
        pseudo: rows of images that play OOD, made of ID images, by kind; of the backbone's own features.
    """

    key: SubjectKey
    heads: tuple[str, ...]
    runs: tuple[FoldRows, ...]
    bank: SetRows
    select_rows: SetRows
    n_experts: int = 0
    has_others: bool = False
    parts: tuple[FoldRows, ...] = ()
    strengths: Mapping[str, float] = field(default_factory=dict)
    pseudo: Mapping[str, SetRows] = field(default_factory=dict)

    def beside(self, frozen: "Subject") -> "Subject":
        """A mixture's, whose rows know what the backbone's own features say of them: a sum may read both."""
        return replace(
            self,
            runs=tuple(own.beside(other) for own, other in zip(self.runs, frozen.runs, strict=True)),
            parts=tuple(own.beside(other) for own, other in zip(self.parts, frozen.parts, strict=True)),
            bank=replace(self.bank, frozen=frozen.bank),
            select_rows=replace(self.select_rows, frozen=frozen.select_rows),
            strengths={**self.strengths, **{FROZEN + name: each for name, each in frozen.strengths.items()}},
        )

    @property
    def calibrating(self) -> tuple[FoldRows, ...]:
        """Runs whose calibrate rows calibrate the final model."""
        return self.parts or self.runs

    @property
    def calibration_part(self) -> NDArray[np.int64]:
        """``[n]`` the part of each calibration row; those of a single run are dealt to as many."""
        sizes = [len(run.calibrate) for run in self.calibrating]
        if len(sizes) == 1:
            return np.arange(sizes[0]) % N_PARTS
        return np.repeat(np.arange(len(sizes)), sizes)

    @property
    def calibration_expert(self) -> NDArray[np.int64] | None:
        """Expert that each calibration row went to; None without experts."""
        return (
            np.concatenate([known_route(run.calibrate.expert) for run in self.calibrating]) if self.n_experts else None
        )


def known_route(values: NDArray[Any] | None) -> NDArray[Any]:
    """Experts, or confidences, of rows.

    Raises:
        InputError: the rows were not routed.
    """
    if values is None:
        raise InputError("these rows were not routed: calibration over experts needs a mixture's features")
    return values
