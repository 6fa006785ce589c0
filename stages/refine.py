"""Refined features: what the mixture makes of cached tokens, kept so that re-scoring runs no network."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache import FeatureCache
from stages.artifacts import map_tensors, read_json, write_described
from stages.backbone import Tokens
from stages.dataset import read_tokens
from stages.experts import MixtureOfFeatureExperts
from stages.progress import NullProgress, Progress
from stages.split import Rows

REFINE_BATCH = 64


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
        others: ``[N, E]`` float32, each group's probability of its "other"; ``[N, 0]`` where every head sees the
            features of its own expert, or where there is no "other".
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


@torch.inference_mode()
def refine(
    mixture: MixtureOfFeatureExperts,
    cache: FeatureCache,
    expert: NDArray[np.int64] | None = None,
    progress: Progress | None = None,
    rows: Rows | None = None,
) -> Refined:
    """Run the mixture over a cache.

    Args:
        mixture: trained.
        cache: of any set whose fingerprint is the one that the mixture was trained on.
        expert: ``[N]`` sends each row to a given expert; −1, and None, leave it to the router.
        progress: counts rows.
        rows: N rows of the cache, ascending; all of them by default.
    """
    progress = progress or NullProgress()
    mixture.eval()
    n = cache.n_rows if rows is None else len(rows)
    progress.start(n, "image", f"refine {cache.manifest.dataset}")
    parts = []
    for start in range(0, n, REFINE_BATCH):
        batch = slice(start, min(start + REFINE_BATCH, n))
        tokens = read_tokens(cache, batch if rows is None else rows[batch])
        gate, _ = mixture.route(tokens)
        chosen = gate.argmax(1)
        if expert is not None:
            forced = torch.from_numpy(np.ascontiguousarray(expert[batch]))
            chosen = torch.where(forced >= 0, forced, chosen)
        out = mixture(tokens, chosen)
        others = _others(mixture, tokens)
        parts.append((out.features, out.logits, out.other, out.expert, gate, out.class_probability.argmax(1), others))
        progress.advance(batch.stop - batch.start)
    progress.close()
    if not parts:
        empty = np.zeros(0, dtype=np.float32)
        nothing = np.zeros(0, dtype=np.int64)
        return Refined(
            np.zeros((0, cache.spec.cls_dim), np.float32), np.zeros((0, mixture.n_classes), np.float32),
            empty, nothing, np.zeros((0, mixture.n_experts), np.float32), nothing,
            np.zeros((0, mixture.n_experts if _says_other_of_all(mixture) else 0), np.float32),
        )  # fmt: skip
    return Refined(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def _others(mixture: MixtureOfFeatureExperts, tokens: Tokens) -> Tensor:
    """``[B, E]`` each group's probability of "other"; ``[B, 0]`` where that needs E experts a row, or there is none."""
    if not _says_other_of_all(mixture):
        return tokens.cls[:, :0]
    return torch.stack([expert(tokens)[1].softmax(1)[:, -1] for expert in mixture.experts], dim=1)


def _says_other_of_all(mixture: MixtureOfFeatureExperts) -> bool:
    return mixture.kind == "frozen" and mixture.n_experts > 1  # heads on the same features, each with an "other"


def refined_path(folder: Path, run: str, name: str) -> Path:
    """Where a set's refined features stand, for one run (``final`` or ``fold-<i>``) of a trained mixture."""
    return folder / "refined" / run / f"{name}.safetensors"


def save_refined(path: Path, refined: Refined, identity: Mapping[str, str]) -> None:
    """Write a set's refined features and, last, of which mixture and which features they are."""
    write_described(path, vars(refined), identity)


def load_refined(path: Path, identity: Mapping[str, str]) -> Refined | None:
    """A set's refined features; None where there are none of this identity.

    Features and logits are memory-mapped: rows of them are read when they are looked at.
    """
    if read_json(path.with_suffix(".json")) != identity:
        return None
    stored = map_tensors(path)
    if stored is None or stored.keys() != {field.name for field in fields(Refined)}:  # damaged, or an older version's
        return None
    mapped = ("features", "logits")
    return Refined(**{name: array if name in mapped else np.array(array) for name, array in stored.items()})
