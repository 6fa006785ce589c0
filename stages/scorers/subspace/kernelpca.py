"""Kernel PCA: how much of a mapped feature the principal components of mapped ID training features leave.

The kernel is that of a map of features to vectors, of which only mean and covariance are kept: no ID row is, but for
landmarks. Three maps of z̄ = z / ‖z‖, each a score::

    cop           z̄ itself: the cosine kernel
    corp          random Fourier features of z̄: nearly the Gaussian kernel on z̄
    kpca-nystrom  the Gaussian kernel of z̄ with landmarks, whitened: exactly that kernel among the landmarks

The authors choose γ, M and the share of the variance for each network. Defaults are those that their code has for a ViT
on ImageNet-1K, and for CoP, which it does not run on one, for a ResNet-50.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.special import logsumexp

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.arrays import scaled_logits
from stages.scorers.shared.components import explaining
from stages.scorers.shared.moments import FeatureMoments, Matrix, float64_rows, squared_distances
from stages.scorers.shared.shrinkage import varies

_LEAST_EIGENVALUE = 1e-12  # of a kernel matrix, as in the authors' code: smaller ones are rounding

Gamma = Annotated[float, Field(gt=0)]
VarianceShare = Annotated[float, Field(gt=0, le=1)]


def reconstruction_error(mapped: ArrayLike, mean: ArrayLike, components: ArrayLike) -> Floats:
    """‖(I − UUᵀ)(Φ − μ)‖; higher = more OOD.

    Fang et al., "Kernel PCA for Out-of-Distribution Detection", NeurIPS 2024, arXiv 2402.02949.

    Args:
        mapped: [n, M] rows Φ; computed in float64.
        mean: [M] μ.
        components: [M, q] U, orthonormal columns.

    Returns:
        [n] float32, at least 0.

    Raises:
        InputError: another M, NaN or inf.

    >>> reconstruction_error([[7.0, 4.0, 5.0]], mean=[0.0, 0.0, 2.0], components=[[1.0], [0.0], [0.0]])
    array([5.], dtype=float32)
    """
    mean, components = np.asarray(mean, dtype=np.float64), np.asarray(components, dtype=np.float64)
    rows = float64_rows(mapped, dim=len(mean))
    rows -= mean
    rows -= (rows @ components) @ components.T
    return np.asarray(np.linalg.norm(rows, axis=1), dtype=np.float32)


def fourier_features(features: ArrayLike, frequencies: ArrayLike, phases: ArrayLike, gamma: float) -> Matrix:
    """√(2/M) · cos(√(2γ) W z̄ + u), whose products are nearly exp(−γ‖z̄ − z̄′‖²).

    Rahimi and Recht, "Random Features for Large-Scale Kernel Machines", NeurIPS 2007.

    Args:
        features: [n, D], any float type; a zero row stays zero.
        frequencies: [M, D] W, each value normal with deviation 1.
        phases: [M] u, uniform from 0 to 2π.
        gamma: γ.

    Returns:
        [n, M] float64.

    Raises:
        InputError: another D, NaN or inf.

    >>> fourier_features([[0.0], [2.0]], frequencies=[[np.pi / 2]], phases=[0.0], gamma=0.5).round(4).tolist()
    [[1.4142], [0.0]]
    """
    turned = np.sqrt(2 * gamma) * np.asarray(frequencies, dtype=np.float64)
    angles = float64_rows(features, normalise=True, dim=turned.shape[1]) @ turned.T
    angles += np.asarray(phases, dtype=np.float64)
    mapped: Matrix = np.cos(angles, out=angles)
    mapped *= np.sqrt(2 / len(turned))
    return mapped


def nystrom_features(features: ArrayLike, landmarks: ArrayLike, root: ArrayLike, gamma: float) -> Matrix:
    """k(z̄, B) · K^(−½), k(z̄, z̄′) = exp(−γ‖z̄ − z̄′‖²), whose products are k itself among the landmarks B.

    Williams and Seeger, "Using the Nyström Method to Speed Up Kernel Machines", NeurIPS 2000.

    Args:
        features: [n, D], any float type; a zero row stays zero.
        landmarks: [M, D] B.
        root: [M, M] with root · rootᵀ = K⁻¹, K = k(B, B) (`inverse_root`).
        gamma: γ.

    Returns:
        [n, M] float64.

    Raises:
        InputError: another D, NaN or inf.

    >>> nystrom_features([[0.0], [2.0]], landmarks=[[0.0], [5.0]], root=np.eye(2), gamma=np.log(2)).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    return _gaussian_kernel(features, landmarks, gamma) @ np.asarray(root, dtype=np.float64)


def _gaussian_kernel(features: ArrayLike, landmarks: ArrayLike, gamma: float) -> Matrix:
    points = float64_rows(landmarks, normalise=True)
    apart = squared_distances(float64_rows(features, normalise=True, dim=points.shape[1]), points)
    kernel: Matrix = np.exp(-gamma * apart)
    return kernel


def inverse_root(landmarks: ArrayLike, gamma: float) -> Matrix:
    """Of landmarks [M, D], the ``root`` of `nystrom_features`, [M, M]; eigenvalues of K are at least 1e-12."""
    values, vectors = np.linalg.eigh(_gaussian_kernel(landmarks, landmarks, gamma))
    return vectors / np.sqrt(np.maximum(values, _LEAST_EIGENVALUE))


@dataclass(frozen=True, eq=False)
class Components:
    """Mean [M] and principal components [M, q] of mapped ID training features."""

    mean: Matrix
    directions: Matrix

    @property
    def facts(self) -> dict[str, Any]:
        """How many components there are."""
        return {"dim_used": self.directions.shape[1]}

    @property
    def remark(self) -> str:
        """Whether there are components at all."""
        return "" if self.directions.size else "rows are measured from the mean, for no two ID training rows differ"


def components_of(train: ScoreInputs, variance: float, mapped: Callable[[ScoreInputs], Matrix]) -> Components:
    """Mean and principal components of mapped rows, read and mapped block by block.

    Args:
        train: ID training rows.
        variance: as few components are kept as explain this share of it. One dimension is always left, or no row would
            have an error.
        mapped: the map, of a block of rows to [n, M].
    """
    moments = FeatureMoments()
    for block in train.blocks():
        moments.add(mapped(block))
    if not varies(moments.within, moments):
        return Components(moments.mean, np.zeros((moments.dim, 0)))
    lengths, directions = moments.within.spectrum()
    kept = min(explaining(lengths, variance), moments.dim - 1)
    return Components(moments.mean, np.ascontiguousarray(directions[:, :kept]))


@dataclass(eq=False)
class CoPScorer(Scorer):
    """`reconstruction_error` of z̄; no labels are read.

    Attributes:
        variance: share of the variance that the components explain. The authors take 0.99 for a ResNet-50 of
            ImageNet-1K, 0.85 for a ResNet-18 of CIFAR-10, 0.7 after supervised contrastive learning.
    """

    name: ClassVar[str] = "cop"
    title: ClassVar[str] = "CoP"
    says: ClassVar[str] = "what principal components of normalised features leave"
    paper: ClassVar[str] = "Fang 2024"
    cost: ClassVar[str] = "D²"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "bank"})

    variance: VarianceShare = 0.99

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> Components:
        """Mean and components."""
        return components_of(train, self.variance, lambda x: float64_rows(x.need("features", self.name), True))

    def judge(self, x: ScoreInputs, memory: Components) -> Floats:
        """Reconstruction error, [n]."""
        rows = float64_rows(x.need("features", self.name), normalise=True, dim=len(memory.mean))
        return reconstruction_error(rows, memory.mean, memory.directions)

    def facts(self, memory: Components) -> dict[str, Any]:
        """The number of components."""
        return memory.facts

    def remark(self, memory: Components) -> str:
        """Whether there are components at all."""
        return memory.remark


@dataclass(frozen=True, eq=False)
class FourierComponents:
    """Arguments of `fourier_features`, frequencies [M, D] and phases [M], and the components of what it gives."""

    frequencies: NDArray[np.floating]
    phases: NDArray[np.floating]
    components: Components


@dataclass(eq=False)
class CoRPScorer(Scorer):
    """`reconstruction_error` of `fourier_features`; no labels are read.

    Attributes:
        gamma: γ.
        features: M. Fits take M² numbers and M³ multiplications.
        variance: share of the variance that the components explain. The authors take γ = 0.1, M = 2048 and 0.9 for a
            ViT of ImageNet-1K, 3, 4096 and 0.5 for a ResNet-50, 2, 2048 and 0.8 for a ResNet-18 of CIFAR-10.
        seed: of the random features; with the same one they are the same, for every expert too.
    """

    name: ClassVar[str] = "corp"
    title: ClassVar[str] = "CoRP"
    says: ClassVar[str] = "the same as CoP, of random Fourier features"
    paper: ClassVar[str] = "Fang 2024"
    cost: ClassVar[str] = "M·D + M²"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "bank"})

    gamma: Gamma = 0.1
    features: Annotated[int, Field(ge=2)] = 2048
    variance: VarianceShare = 0.9
    seed: Annotated[int, Field(ge=0)] = 0

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> FourierComponents:
        """Random features, and their mean and components."""
        drawn, dim = np.random.default_rng(self.seed), train.need_unread(self.name).shape[1]
        frequencies = drawn.standard_normal((self.features, dim), dtype=np.float32)
        phases = np.float32(2 * np.pi) * drawn.random(self.features, dtype=np.float32)

        def mapped(x: ScoreInputs) -> Matrix:
            return fourier_features(x.need("features", self.name), frequencies, phases, self.gamma)

        return FourierComponents(frequencies, phases, components_of(train, self.variance, mapped))

    def judge(self, x: ScoreInputs, memory: FourierComponents) -> Floats:
        """Reconstruction error, [n]."""
        mapped = fourier_features(x.need("features", self.name), memory.frequencies, memory.phases, self.gamma)
        return reconstruction_error(mapped, memory.components.mean, memory.components.directions)

    def facts(self, memory: FourierComponents) -> dict[str, Any]:
        """The number of components."""
        return memory.components.facts

    def remark(self, memory: FourierComponents) -> str:
        """Whether there are components at all."""
        return memory.components.remark


@dataclass(frozen=True, eq=False)
class LandmarkComponents:
    """Arguments of `nystrom_features`, landmarks [M, D] and root [M, M], and the components of what it gives."""

    landmarks: NDArray[np.floating]
    root: Matrix
    components: Components


@dataclass(eq=False)
class NystromKPCAScorer(Scorer):
    """`reconstruction_error` of `nystrom_features`.

    Fang et al., "Kernel PCA for Out-of-Distribution Detection: Non-Linear Kernel Selections and Approximations", arXiv
    2505.15284. Landmarks are the ID training rows that the head is least sure of, by the smallest logsumexp(l): what
    the authors call low energy, and their code takes.

    Attributes:
        gamma: γ.
        landmarks: M at most; every row where there are fewer. Fits take M² numbers and M³ multiplications.
        variance: share of the variance that the components explain. The authors take γ = 0.2, M = 2048 and 0.96 for a
            ViT of ImageNet-1K, 0.15, 2048 and 0.995 for a ResNet-50.
    """

    name: ClassVar[str] = "kpca-nystrom"
    title: ClassVar[str] = "Nyström kernel PCA"
    says: ClassVar[str] = "the same as CoP, of Gaussian kernels with landmarks"
    paper: ClassVar[str] = "Fang 2025"
    cost: ClassVar[str] = "M·D + M²"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "logits", "bank"})

    gamma: Gamma = 0.2
    landmarks: Annotated[int, Field(ge=1)] = 2048
    variance: VarianceShare = 0.96

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> LandmarkComponents:
        """Landmarks, and mean and components of the kernels with them."""
        sure = [logsumexp(scaled_logits(block.need("logits", self.name), 1.0), axis=1) for block in train.blocks()]
        chosen = np.sort(np.argsort(np.concatenate(sure), kind="stable")[: self.landmarks])
        landmarks = np.array(train.take(chosen).need("features", self.name))
        root = inverse_root(landmarks, self.gamma)

        def mapped(x: ScoreInputs) -> Matrix:
            return nystrom_features(x.need("features", self.name), landmarks, root, self.gamma)

        return LandmarkComponents(landmarks, root, components_of(train, self.variance, mapped))

    def judge(self, x: ScoreInputs, memory: LandmarkComponents) -> Floats:
        """Reconstruction error, [n]."""
        mapped = nystrom_features(x.need("features", self.name), memory.landmarks, memory.root, self.gamma)
        return reconstruction_error(mapped, memory.components.mean, memory.components.directions)

    def facts(self, memory: LandmarkComponents) -> dict[str, Any]:
        """The number of components, and of landmarks where there are fewer than asked for."""
        used = len(memory.landmarks)
        return memory.components.facts | ({"landmarks_used": used} if used < self.landmarks else {})

    def remark(self, memory: LandmarkComponents) -> str:
        """Whether there are components at all."""
        return memory.components.remark
