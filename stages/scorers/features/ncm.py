"""Distance to the nearest class mean, among the routed expert's classes where there are experts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.id_data.lazy import Floats
from stages.scorers.inputs import ScoreInputs
from stages.scorers.neighbours.bank import FeatureBank
from stages.scorers.scorer import Scorer
from stages.scorers.shared.arrays import checked_features, l2_normalise
from stages.scorers.shared.moments import FeatureMoments


def class_means(features: ArrayLike, labels: NDArray[np.integer]) -> tuple[NDArray[np.float64], NDArray[np.integer]]:
    """Mean of each class's ℓ2-normalised features, and the classes that have rows, ascending.

    Args:
        features: [n, D], any float type.
        labels: [n].

    Returns:
        [C, D] float64, not normalised again; [C].

    >>> class_means([[3.0, 0.0], [0.0, 4.0], [0.0, 2.0]], np.array([7, 7, 9]))[0].tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """
    return _class_means([(np.asarray(features), labels)])


def _class_means(
    blocks: Iterable[tuple[NDArray[np.floating], NDArray[np.integer]]],
) -> tuple[NDArray[np.float64], NDArray[np.integer]]:
    moments = FeatureMoments(scatter=False)
    for features, labels in blocks:
        moments.add(l2_normalise(checked_features(features, "class mean")), labels)
    return moments.class_means, moments.classes


@dataclass(eq=False)
class NCMScorer(Scorer):
    """√(2 − 2·cos) to the nearest class mean of the ℓ2-normalised ID training features; higher = more OOD.

    Nearest class mean: Mensink et al., "Distance-Based Image Classification: Generalizing to New Classes at Near-Zero
    Cost", TPAMI 2013; as an OOD score the *cosine to prototype*, −max_c cos(z, μ_c), of Bitterwolf et al., "In or Out?
    Fixing ImageNet Out-of-Distribution Detection Evaluation", ICML 2023. That one takes the means of the features as
    they are; here every row counts alike, and the distance is on kNN's scale. With experts a row is compared with the
    classes of its own expert.
    """

    name: ClassVar[str] = "ncm"
    title: ClassVar[str] = "NCM"
    says: ClassVar[str] = "distance to the nearest mean of normalised features"
    paper: ClassVar[str] = "Mensink 2013"
    cost: ClassVar[str] = "C·D"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "bank", "labels"})
    side_by_side: ClassVar[bool] = False  # faiss has threads of its own

    def learn(self, train: ScoreInputs, select: ScoreInputs | None) -> FeatureBank:
        """Takes the class means.

        Raises:
            InputError: no labels, or NaN or inf in a feature.
        """
        who = "a class mean"
        blocks = ((block.need("features", who), block.need("labels", who)) for block in train.blocks())
        return FeatureBank(_class_means(blocks)[0], device="cpu")

    def judge(self, x: ScoreInputs, memory: FeatureBank) -> Floats:
        """Distance to the nearest class mean, [n] in [0, 2]."""
        return memory.search(x.need("features", self.name), k=1)[0][:, 0]
