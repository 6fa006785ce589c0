"""Rows as a mixture sees them: what is known of each, where they are kept, and the banks that calibrate.

Nothing is computed here, and no network is loaded: what is kept is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache import FeatureCache, arrays_sha256
from stages.files.documents import read_document
from stages.files.rows import map_described
from stages.id_data.lazy import LazyArray, Rows2D, one_after_another
from stages.id_data.split import Part, Rows, Split

LEFT_OUT = "left-out"  # the name of a fold's calibrate rows as its bank would have them, beside "id-train"


@dataclass(frozen=True)
class Refined:
    """Rows of a set as the mixture sees them.

    Attributes:
        features: ``[N, D]`` float32, from the expert that the row went to.
        logits: ``[N, C]`` float32 of that expert's trained head, ``-inf`` outside its group.
        other: ``[N]`` float32, logit of its "other" class.
        expert: ``[N]`` int64.
        gate: ``[N, E]`` float32, the router's group probabilities.
        router_class: ``[N]`` int64, the router's most probable class.
        others: ``[N, E]`` float32, each group's log odds of its "other"; ``[N, 0]`` where every head sees the features
            of its own expert, or where there is no "other".
    """

    features: NDArray[np.float32]
    logits: NDArray[np.float32]
    other: NDArray[np.float32]
    expert: NDArray[np.int64]
    gate: NDArray[np.float32]
    router_class: NDArray[np.int64]
    others: NDArray[np.float32]

    @property
    def confidence(self) -> NDArray[np.float32]:
        """``[N]`` the router's probability of its first choice."""
        return self.gate.max(axis=1)

    @property
    def runner_up(self) -> NDArray[np.int64]:
        """``[N]`` the router's second choice; needs two experts."""
        gate = self.gate.copy()
        gate[np.arange(len(gate)), gate.argmax(axis=1)] = -np.inf
        return gate.argmax(axis=1)

    def __getitem__(self, rows: NDArray[np.int64]) -> "Refined":
        return Refined(**{name: array[rows] for name, array in vars(self).items()})


@dataclass(frozen=True, eq=False)
class Routes:
    """Which rows of a cache are refined, and by which experts.

    Attributes:
        expert: ``[N]`` sends each row to a given expert; −1, and None, leave it to the router.
        rows: N rows of the cache, ascending; None: all of them.
    """

    expert: NDArray[np.int64] | None = None
    rows: Rows | None = None

    def count(self, cache: FeatureCache) -> int:
        """N."""
        return cache.n_rows if self.rows is None else len(self.rows)


def refined_path(folder: Path, run: str, name: str) -> Path:
    """Where a set's refined features stand, for one run (``final`` or ``fold-<i>``) of a trained mixture."""
    return folder / "refined" / run / f"{name}.safetensors"


def refined_identity(weights: str, cache: FeatureCache, routes: Routes = Routes()) -> dict[str, str]:
    """What refined features are made of, by its bytes.

    Args:
        weights: SHA-256 of the mixture's ``mofe.safetensors``.
        cache: of the set.
        routes: as for `refine`.
    """
    given = {name: array for name, array in vars(routes).items() if array is not None}
    return {"weights": weights, "features": cache.digest, "routes": arrays_sha256(given)}


def training_routes(train: Rows, group: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[N]`` where the bank sends rows of id-train: training rows to their own group's expert, −1 else: by the router.

    Args:
        train: which rows these are.
        group: ``[N]`` group of each row's class.
    """
    routes = np.full(len(group), -1, dtype=np.int64)
    routes[train] = group[train]
    return routes


def refined_digest(path: Path) -> str | None:
    """SHA-256 of a set's refined features, as their document says it; None where there is no whole document."""
    digest = ((read_document(path.with_suffix(".json")) or {}).get("files") or {}).get(path.name)
    return None if digest is None else str(digest)


@dataclass(frozen=True, eq=False)
class PartBank:
    """A bank of all rows but those of a part, through the experts of the part's fold.

    Attributes:
        rows: ``[n]`` which of id-train's they are.
        features: ``[n, D]``, read when they are looked at.
        expert: ``[n]`` each row's own group's.
    """

    rows: Rows
    features: Rows2D
    expert: NDArray[np.int64]


def part_bank(split: Split, part: Part, bank: Refined, left_out: Refined) -> PartBank:
    """What calibrates a part: as many rows as the final bank has, but for a few.

    Args:
        split: cross-fitted.
        part: one of its parts.
        bank: id-train through the experts of the part's fold, its training rows by their own groups.
        left_out: the calibrate rows of that fold, by their own groups as well.
    """
    fold = split.folds[part.fold]
    others = np.flatnonzero(~np.isin(fold.calibrate, part.rows))
    return PartBank(
        np.concatenate([fold.train, fold.calibrate[others]]),
        one_after_another([LazyArray.of(bank.features, fold.train), LazyArray.of(left_out.features, others)]),
        np.concatenate([bank.expert[fold.train], left_out.expert[others]]),
    )


def load_refined(path: Path, identity: Mapping[str, Any]) -> Refined | None:
    """A set's refined features; None where there are none of this identity (or, in maps, of a part of one).

    Features and logits are memory-mapped: rows of them are read when they are looked at.
    """
    stored = map_described(path, identity)
    if stored is None or stored.keys() != {field.name for field in fields(Refined)}:  # damaged, or an older version's
        return None
    mapped = ("features", "logits")
    return Refined(**{name: array if name in mapped else np.array(array) for name, array in stored.items()})
