"""CADRef: how far a feature is from the mean of its predicted class, for and against that class apart."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer
from stages.scorers.shared.arrays import scaled_logits
from stages.scorers.shared.moments import FeatureMoments, Matrix, float64_rows

_LEAST = 0.01  # of the mean over ID training rows: less energy, or length, is not divided by


@dataclass(frozen=True, eq=False)
class Reference:
    """What ID training rows are like.

    Attributes:
        weight: [C, D] of the head.
        means: [C, D] of the rows that are predicted to be of each class.
        length: mean of ‖z‖₁.
        energy: Ḡ, mean of logsumexp(l).
        centred: whether that is of logits less their mean.
        n_unpredicted: classes that no row is predicted to be of; they have the mean of all rows.
        n_capped: rows with less energy than is divided by.
    """

    weight: Matrix
    means: Matrix
    length: float
    energy: float
    centred: bool = False
    n_unpredicted: int = 0
    n_capped: int = 0


def cadref_score(features: ArrayLike, logits: ArrayLike, reference: Reference) -> Floats:
    """e⁺ / G + e⁻ / Ḡ, e± = ‖relu(±(z − μ_ŷ) ⊙ sign w_ŷ)‖₁ / ‖z‖₁, G = logsumexp(l); higher = more OOD.

    Ling et al., "CADRef: Robust Out-of-Distribution Detection via Class-Aware Decoupled Relative Feature Leveraging",
    CVPR 2025; G is the default of the authors' code. e⁺ is what speaks for the predicted class ŷ, and more than its
    rows have.

    Args:
        features: [n, D], any float type; computed in float64.
        logits: [n, C]; the first of equal ones is predicted.
        reference: of the ID training rows.

    Returns:
        [n] float32, at least 0. Below a hundredth of what ID training rows have on average, G and ‖z‖₁ count as that:
        the quotients have no meaning at 0 and beyond.

    Raises:
        InputError: another D, NaN or inf.

    >>> two = Reference(weight=[[1.0, -1.0], [0.0, 0.0]], means=[[1.0, 2.0], [0.0, 0.0]], length=3.0, energy=5.0)
    >>> cadref_score([[2.0, 1.0], [0.0, 4.0]], [[10.0, -np.inf], [10.0, -np.inf]], two).round(4)  # 2/3 / 10, 3/4 / 5
    array([0.0667, 0.15  ], dtype=float32)
    """
    weight, means = np.asarray(reference.weight, dtype=np.float64), np.asarray(reference.means, dtype=np.float64)
    rows, scaled = float64_rows(features, dim=weight.shape[1]), scaled_logits(logits, 1.0)
    predicted = scaled.argmax(axis=1)
    toward = (rows - means[predicted]) * np.sign(weight[predicted])
    energy = np.maximum(_energy(scaled, reference.centred), _LEAST * reference.energy)
    errors = np.maximum(toward, 0).sum(axis=1) / energy + np.maximum(-toward, 0).sum(axis=1) / reference.energy
    lengths = np.maximum(np.abs(rows).sum(axis=1), _LEAST * reference.length)
    return np.asarray(np.divide(errors, lengths, out=errors, where=lengths > 0), dtype=np.float32)


def _energy(logits: NDArray[np.float64], centred: bool) -> NDArray[np.float64]:
    if centred:
        applies = np.isfinite(logits)
        logits = logits - logits.mean(axis=1, keepdims=True, where=applies)
    energy: NDArray[np.float64] = logsumexp(logits, axis=1)
    return energy


@dataclass(eq=False)
class CADRefScorer(Scorer):
    """`cadref_score`; no labels are read.

    A class that no ID training row is predicted to be of has no mean in the authors' code (NaN): it takes that of all
    rows. Softmax heads are as good with any number added to all logits, which logsumexp is not indifferent to: where
    it is not above 0 on average over ID training rows, it is taken of logits less their mean, and is above 0 then.
    """

    name: ClassVar[str] = "cadref"
    title: ClassVar[str] = "CADRef"
    says: ClassVar[str] = "relative distance to the predicted class's mean, part of it by energy"
    paper: ClassVar[str] = "Ling 2025"
    cost: ClassVar[str] = "C + D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "logits", "head", "bank"})

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> Reference:
        """Means of the predicted classes, of lengths and of energies."""
        weight = np.asarray(train.need_head(self.name).weight, dtype=np.float64)
        moments, length, energies = FeatureMoments(scatter=False), 0.0, []
        for block in train.blocks():
            features, logits = block.need("features", self.name), scaled_logits(block.need("logits", self.name), 1.0)
            moments.add(features, logits.argmax(axis=1))
            length += float(np.abs(features).sum(dtype=np.float64))
            energies.append([_energy(logits, centred) for centred in (False, True)])
        plain, centred = (np.concatenate(each) for each in zip(*energies, strict=True))
        chosen = plain if plain.mean() > 0 else centred
        energy = float(chosen.mean()) or 1.0  # of one class alone
        means = np.tile(moments.mean, (len(weight), 1))
        means[moments.classes] = moments.class_means
        return Reference(
            weight,
            means,
            length / len(train),
            energy,
            chosen is centred,
            len(weight) - len(moments.classes),
            int((chosen < _LEAST * energy).sum()),
        )

    def judge(self, x: ScoreInputs, memory: Reference) -> Floats:
        """Relative distance to the predicted class's mean, [n]."""
        return cadref_score(x.need("features", self.name), x.need("logits", self.name), memory)

    def facts(self, memory: Reference) -> dict[str, Any]:
        """Classes without a mean of their own, where there are any."""
        return {"classes_never_predicted": memory.n_unpredicted} if memory.n_unpredicted else {}

    def remark(self, memory: Reference) -> str:
        """What differs from the paper, where it does."""
        said = {
            "classes that no ID training row is predicted to be of have the mean of all rows": memory.n_unpredicted,
            "energies are of logits less their mean, for those of ID training rows are not above 0": memory.centred,
            "ID training rows with hardly any energy count as having a hundredth of the mean": memory.n_capped,
        }
        return "; ".join(what for what, holds in said.items() if holds)
