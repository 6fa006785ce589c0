"""Patch kNN: the patches of an image that lie farthest from all patches of the ID training images."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stages.errors import InputError
from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.neighbours.bank import FeatureBank
from stages.scorers.scorer import Scorer

_IMAGES = 16  # whose patches are in memory at once


def patch_knn_score(patches: ArrayLike, bank: FeatureBank, share: float = 0.01) -> Floats:
    """Mean of the largest 1 % of the patches' cosine distances to their nearest patch of the bank; higher = more OOD.

    Damm et al., "AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2", WACV 2025.

    Args:
        patches: [n, P, D] patch tokens after the final norm, any float type.
        bank: patch tokens of ID training images.
        share: of the P distances, rounded down, that are averaged; at least the largest.

    Returns:
        [n] float32 in [0, 2].

    Raises:
        InputError: not three-dimensional, no patches, another D, NaN or inf.

    >>> patch_knn_score([[[1.0, 0.0], [0.6, 0.8]]], FeatureBank([[2.0, 0.0]])).round(4).tolist()  # 1 − 1, 1 − 0.6
    [0.4000000059604645]
    """
    tokens = np.asarray(patches)
    if tokens.ndim != 3 or not tokens.shape[1]:
        raise InputError(f"patch tokens have shape {tokens.shape}; images, patches of each and features expected")
    n, count, dim = tokens.shape
    nearest = bank.search(tokens.reshape(n * count, dim), k=1)[0].reshape(n, count).astype(np.float64)
    farthest = np.sort(np.square(nearest) / 2, axis=1)[:, -max(1, int(count * share)) :]  # 1 − cos = half the square
    return np.asarray(farthest.mean(axis=1), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class PatchBank:
    """Patches of ID training images, and of how many images they are."""

    bank: FeatureBank
    n_images: int


@dataclass(eq=False)
class PatchKNNScorer(Scorer):
    """`patch_knn_score` with its bank.

    Attributes:
        share: of an image's patches that are averaged.
        bank: patches to compare with, at most; where the ID training images have more, all patches of as many of them
            as that allows, drawn at random once and for all. ``params()`` says of how many images.
    """

    name: ClassVar[str] = "patch-knn"
    title: ClassVar[str] = "patch kNN"
    says: ClassVar[str] = "distance of the farthest 1 % of the patches to their nearest"
    paper: ClassVar[str] = "Damm 2025"
    cost: ClassVar[str] = "N·P²·D"
    costly: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"patches", "bank"})

    share: Annotated[float, Field(gt=0, le=1)] = 0.01
    bank: Annotated[int, Field(ge=1)] = 100_000

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> PatchBank:
        """The bank.

        Raises:
            InputError: images without patches, NaN or inf in one.
        """
        patches = train.need("patches", self.name)
        count = np.asarray(patches[:1]).shape[1]
        if not count:
            raise InputError(f"{self.name} needs patch tokens, these images have none")
        chosen = np.sort(np.random.default_rng(0).permutation(len(train))[: max(1, self.bank // count)])
        tokens = np.concatenate([np.asarray(patches[some], dtype=np.float32) for some in _few(chosen)])
        return PatchBank(FeatureBank(tokens.reshape(-1, tokens.shape[2])), len(chosen))

    def judge(self, x: ScoreInputs, memory: PatchBank) -> Floats:
        """Mean of the largest patch distances, [n]."""
        patches, scores = x.need("patches", self.name), np.empty(len(x), dtype=np.float32)
        for some in _few(np.arange(len(x))):
            scores[some] = patch_knn_score(patches[some], memory.bank, self.share)
        return scores

    def facts(self, memory: PatchBank) -> dict[str, Any]:
        """Images whose patches are in the bank."""
        return {"bank_images": memory.n_images}


def _few(rows: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    return [rows[start : start + _IMAGES] for start in range(0, len(rows), _IMAGES)]
