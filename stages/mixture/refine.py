"""Refined features: what the mixture makes of cached tokens, kept so that re-scoring runs no network."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache import FeatureCache, arrays_sha256
from stages.context import Context
from stages.errors import StageError
from stages.files.documents import read_document
from stages.files.rows import RowFormat, described_rows, map_described
from stages.id_data.lazy import LazyArray, Rows2D, one_after_another
from stages.id_data.rows import read_tokens, unit
from stages.id_data.split import Part, Rows, Split
from stages.mixture.model import MixtureOfFeatureExperts
from stages.networks.tokens import Tokens
from stages.progress import Progress

REFINE_BATCH = 64
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


def refine(
    mixture: MixtureOfFeatureExperts, cache: FeatureCache, routes: Routes = Routes(), context: Context = Context()
) -> Refined:
    """Run the mixture over a cache, in memory; see `refine_to` for rows that are to be kept, or are many.

    Args:
        mixture: trained.
        cache: of any set whose fingerprint is the one that the mixture was trained on.
        routes: which of its rows, and where they are sent.
        context: counts rows; the mixture runs on its device, and is brought back from there. In float32 everywhere: a
            GPU gives the CPU's features to rounding.
    """
    n = routes.count(cache)
    columns = _columns(mixture, cache)
    whole: dict[str, Any] = {name: np.empty((n, *column.shape), column.dtype) for name, column in columns.items()}
    start = 0
    with _placed(mixture, context.place):
        for batch in _batches(mixture, cache, routes, context.progress):
            stop = start + len(batch.expert)
            for name, array in vars(batch).items():
                whole[name][start:stop] = array
            start = stop
    return Refined(**whole)


def refine_to(
    path: Path,
    identity: Mapping[str, str],
    mixture: MixtureOfFeatureExperts,
    cache: FeatureCache,
    routes: Routes = Routes(),
    context: Context = Context(),
) -> Refined:
    """Run the mixture over a cache into a file, in memory that does not grow with N.

    Args:
        path: of the safetensors file; the JSON beside it says, last, of which mixture and which features it is.
        identity: what that is.
        mixture: as for `refine`, like all that follows.
        cache: of the set.
        routes: likewise,
        context: likewise.

    Returns:
        What stands in the file, as `load_refined` gives it.
    """
    n = routes.count(cache)
    with _placed(mixture, context.place), described_rows(path, _columns(mixture, cache), n, identity) as writer:
        for batch in _batches(mixture, cache, routes, context.progress):
            writer.append(vars(batch))
    written = load_refined(path, identity)
    if written is None:
        raise StageError(f"{path} was written and cannot be read: another process may be at work there")
    return written


@torch.inference_mode()
def _batches(
    mixture: MixtureOfFeatureExperts, cache: FeatureCache, routes: Routes, progress: Progress
) -> Iterator[Refined]:
    mixture.eval()
    device, n, rows, expert = mixture.group.device, routes.count(cache), routes.rows, routes.expert
    progress.start(n, unit(cache), f"refine {cache.manifest.dataset}")
    for start in range(0, n, REFINE_BATCH):
        batch = slice(start, min(start + REFINE_BATCH, n))
        tokens = read_tokens(cache, batch if rows is None else rows[batch], device)
        gate, _ = mixture.route(tokens)
        chosen = gate.argmax(1)
        if expert is not None:
            forced = torch.from_numpy(np.ascontiguousarray(expert[batch])).to(device)
            chosen = torch.where(forced >= 0, forced, chosen)
        out = mixture(tokens, chosen)
        columns = (out.features, out.logits, out.other, out.expert, gate, out.class_probability.argmax(1))
        yield Refined(*(column.cpu().numpy() for column in (*columns, _others(mixture, tokens))))
        progress.advance(batch.stop - batch.start)
    progress.close()


@contextmanager
def _placed(mixture: MixtureOfFeatureExperts, device: str) -> Iterator[None]:
    """The mixture on a device, computing there as precisely as a CPU does, and back where it was."""
    before = mixture.group.device
    mixture.to(device)
    try:
        # By torch's default convolutions on a GPU round their inputs to the 10 bits of TF32.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        mixture.to(before)


def _columns(mixture: MixtureOfFeatureExperts, cache: FeatureCache) -> dict[str, RowFormat]:
    """What `Refined` has of each row."""
    real, index = np.dtype(np.float32), np.dtype(np.int64)
    n_experts = mixture.n_experts
    return {
        "features": RowFormat(real, (cache.spec.cls_dim,)),
        "logits": RowFormat(real, (mixture.config.n_classes,)),
        "other": RowFormat(real),
        "expert": RowFormat(index),
        "gate": RowFormat(real, (n_experts,)),
        "router_class": RowFormat(index),
        "others": RowFormat(real, (n_experts if _says_other_of_all(mixture) else 0,)),
    }


def _others(mixture: MixtureOfFeatureExperts, tokens: Tokens) -> Tensor:
    """``[B, E]`` each group's log odds of "other"; ``[B, 0]`` where that needs E experts a row, or there is none."""
    if not _says_other_of_all(mixture):
        return tokens.cls[:, :0]
    outputs = [expert(tokens)[1] for expert in mixture.experts]  # over the group's classes and, last, "other"
    return torch.stack([each[:, -1] - each[:, :-1].logsumexp(1) for each in outputs], dim=1)


def _says_other_of_all(mixture: MixtureOfFeatureExperts) -> bool:
    return mixture.config.kind == "frozen" and mixture.n_experts > 1  # heads on the same features, each with an "other"


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
