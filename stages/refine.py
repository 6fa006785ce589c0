"""Refined features: what the mixture makes of cached tokens, kept so that re-scoring runs no network."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cache import FeatureCache
from stages.artifacts import read_json, read_tensors, write_described
from stages.dataset import read_tokens
from stages.experts import MixtureOfFeatureExperts
from stages.progress import NullProgress, Progress

REFINE_BATCH = 64


@dataclass(frozen=True)
class Refined:
    """Rows of a set as the mixture sees them.

    Attributes:
        features: ``[N, D]`` float32, from the expert that the row went to.
        logits: ``[N, C]`` float32 of that expert's trained head, ``-inf`` outside its group.
        other: ``[N]`` float32, logit of its "other" class.
        expert: ``[N]`` int64.
        confidence: ``[N]`` float32, the router's probability of its first choice.
        router_class: ``[N]`` int64, the router's most probable class.
    """

    features: NDArray[np.float32]
    logits: NDArray[np.float32]
    other: NDArray[np.float32]
    expert: NDArray[np.int64]
    confidence: NDArray[np.float32]
    router_class: NDArray[np.int64]

    def __getitem__(self, rows: NDArray[np.int64]) -> "Refined":
        return Refined(**{name: array[rows] for name, array in vars(self).items()})


@torch.inference_mode()
def refine(
    mixture: MixtureOfFeatureExperts,
    cache: FeatureCache,
    expert: NDArray[np.int64] | None = None,
    progress: Progress | None = None,
) -> Refined:
    """Run the mixture over a cache.

    Args:
        mixture: trained.
        cache: of any set whose fingerprint is the one that the mixture was trained on.
        expert: ``[N]`` sends each row to a given expert; −1, and None, leave it to the router.
        progress: counts rows.
    """
    progress = progress or NullProgress()
    mixture.eval()
    progress.start(cache.n_rows, "image", f"refine {cache.manifest.dataset}")
    parts = []
    for start in range(0, cache.n_rows, REFINE_BATCH):
        rows = slice(start, min(start + REFINE_BATCH, cache.n_rows))
        tokens = read_tokens(cache, rows)
        gate, _ = mixture.route(tokens.tap_cls)
        chosen = gate.argmax(1)
        if expert is not None:
            forced = torch.from_numpy(np.ascontiguousarray(expert[rows]))
            chosen = torch.where(forced >= 0, forced, chosen)
        out = mixture(tokens, chosen)
        parts.append((out.features, out.logits, out.other, out.expert, gate.amax(1), out.class_probability.argmax(1)))
        progress.advance(rows.stop - rows.start)
    progress.close()
    if not parts:
        empty = np.zeros(0, dtype=np.float32)
        nothing = np.zeros(0, dtype=np.int64)
        return Refined(
            np.zeros((0, cache.spec.cls_dim), np.float32), np.zeros((0, mixture.n_classes), np.float32),
            empty, nothing, empty, nothing,
        )  # fmt: skip
    return Refined(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def refined_path(folder: Path, run: str, name: str) -> Path:
    """Where a set's refined features stand, for one run (``final`` or ``fold-<i>``) of a trained mixture."""
    return folder / "refined" / run / f"{name}.safetensors"


def save_refined(path: Path, refined: Refined, identity: Mapping[str, str]) -> None:
    """Write a set's refined features and, last, of which mixture and which features they are."""
    write_described(path, vars(refined), identity)


def load_refined(path: Path, identity: Mapping[str, str]) -> Refined | None:
    """Read a set's refined features; None where there are none of this identity."""
    if read_json(path.with_suffix(".json")) != identity:
        return None
    stored = read_tensors(path)
    return None if stored is None else Refined(**stored)
